"""Models and data sets of the Hugging Face hub: pinned, resumed, verified, and with a remedy for every refusal."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from difflib import SequenceMatcher, get_close_matches
from pathlib import Path
from typing import Any

from shared.errors import MlxloraError

HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w.-][\w./-]*))?")  # org/name, or org/name@revision
COMMIT = re.compile(r"[0-9a-f]{40}")
LONGEST_WAIT_S = 60  # that a server may ask for before the next request
NO_ANSWER_S = 30  # where the client itself would wait for ever
CHUNK = 2**20
LIKE = 0.6  # of two names that may be meant for each other


def is_hub_id(text: str) -> bool:
    """Return whether a model or data set can only be one of the hub: no path of this machine, and org/name.

    >>> is_hub_id("org/name@v1.0"), is_hub_id("./folder"), is_hub_id("name")
    (True, False, False)
    """
    return not text.startswith(".") and bool(HUB_ID.fullmatch(text)) and not Path(text).expanduser().exists()


def is_offline() -> bool:
    """Return whether nothing may reach for the network."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def near_paths(path: Path) -> list[str]:
    """Return what lies where a path that does not exist would lie, or in folders of similar names, nearest first."""
    folder = path.parent
    near = get_close_matches(folder.name, [item.name for item in entries(folder.parent) if item.is_dir()])
    items = [
        item for place in dict.fromkeys([folder, *(folder.parent / name for name in near)]) for item in entries(place)
    ]
    likeness = {
        str(item): max(like(path.name, item.name), like(path.stem, item.stem)) for item in items if item != path
    }
    return sorted((name for name in likeness if likeness[name] >= LIKE), key=lambda name: -likeness[name])


def looked_in(path: Path) -> str:
    """Return the folder that a relative path was looked for in, as a message has it behind the path."""
    return "" if path.is_absolute() else f" (looked in {Path.cwd()})"


def like(one: str, other: str) -> float:
    """Return how similar two names are, from 0 to 1.

    >>> like("train", "trian")
    0.8
    """
    return SequenceMatcher(None, one, other).ratio()


def entries(folder: Path) -> list[Path]:
    """Return what is in a folder, nothing where it cannot be read."""
    with suppress(OSError):
        return sorted(folder.iterdir())
    return []


def split_revision(text: str) -> tuple[str, str | None]:
    """Return id and revision of org/name@revision; a path stays whole.

    >>> split_revision("org/name@v1.0"), split_revision("/a/b@c")
    (('org/name', 'v1.0'), ('/a/b@c', None))
    """
    found = HUB_ID.fullmatch(text) if is_hub_id(text) else None
    return (found[1], found[2]) if found else (text, None)


def commit_of(path: Path) -> str | None:
    """Return the commit that a downloaded folder is of, None for any other folder."""
    return path.name if path.parent.name == "snapshots" and COMMIT.fullmatch(path.name) else None


def pinned(text: str, path: Path) -> str:
    """Return org/name@commit, with a data set's :config, for what was downloaded to `path`; other names as they are."""
    name, colon, config = text.partition(":")
    commit = commit_of(path.parent if config else path)
    return f"{split_revision(name)[0]}@{commit}{colon}{config}" if commit and is_hub_id(name) else text


def download(text: str, *, kind: str, patterns: Sequence[str], error: type[MlxloraError], code: str) -> Path:
    """Return the local folder of a hub id; what is there already is not downloaded again.

    kind: "model" or "dataset". Raises `error` of that code, with what the hub said and what to do.
    """
    from huggingface_hub import set_client_factory, snapshot_download

    set_client_factory(make_client)
    name, revision = split_revision(text)
    began = time.time() - 1  # clocks of file systems lag a little
    try:
        found = snapshot_download(name, repo_type=kind, revision=revision, allow_patterns=list(patterns))
    except Exception as problem:  # the client raises errors of several libraries
        what, fix = explain(problem, name, kind, revision)
        near = near_paths(Path(text.partition(":")[0]))  # a mistyped path can look like a name of the hub
        raise error(what, fix=f'did you mean "{near[0]}"? Else: {fix}' if near else fix, code=code) from None
    for file in sorted(Path(found).rglob("*")):
        check_file(file, began=began, error=error, code=code)
    return Path(found)


def make_client() -> Any:
    """Return the hub library's HTTP client with a limit on every wait."""
    from huggingface_hub.utils._http import default_client_factory

    client = default_client_factory()
    client.event_hooks = {
        "request": [*client.event_hooks["request"], limit_wait],
        "response": [refuse_long_wait],
    }
    return client


def limit_wait(request: Any) -> None:
    """Give a request that would wait for ever an end."""
    limits = request.extensions.get("timeout") or {}
    request.extensions["timeout"] = {
        key: NO_ANSWER_S if limits.get(key) is None else limits[key] for key in ("connect", "read", "write", "pool")
    }


def refuse_long_wait(response: Any) -> None:
    """Raise TooBusy where the server wants to be left alone for longer than anybody watches."""
    asked = response.headers.get("Retry-After", "")
    if response.status_code in (429, 503) and asked.isdigit() and int(asked) > LONGEST_WAIT_S:
        raise TooBusy(f"({response.status_code}) for the next {asked} s")


class TooBusy(ConnectionError):
    """The server asks for a longer wait than LONGEST_WAIT_S."""


def explain(problem: BaseException, name: str, kind: str, revision: str | None) -> tuple[str, str]:
    """Return what the hub said of a model or data set, and what to do."""
    chain = causes(problem)
    kinds = {cls.__name__ for one in chain for cls in type(one).__mro__}
    what = f'"{name}" is no folder here, and the hub'
    busy = next((one for one in chain if isinstance(one, TooBusy)), None)
    response = next((found for one in chain if (found := getattr(one, "response", None)) is not None), None)
    if busy is not None:
        return f"{what} takes no requests {busy}", "try again then; with HF_TOKEN more is allowed"
    if "OfflineModeIsEnabled" in kinds or is_offline():
        return f'"{name}" is no folder here, is not downloaded, and the run is offline', "download it once, online"
    if response is not None:
        said = response.headers.get("X-Error-Code", "")
        return explain_status(response.status_code, said, what, name=name, kind=kind, revision=revision)
    if kinds & {"TimeoutException", "TimeoutError"}:
        return f"{what} does not answer", "try again later; HF_HUB_DOWNLOAD_TIMEOUT=60 waits longer"
    if "ConnectError" in kinds:
        return (
            f"{what} cannot be reached",
            "check the network, or the path of a folder; --offline takes what was downloaded",
        )
    if kinds & {"NetworkError", "ProtocolError"}:
        return f"{what} broke off every download", "run the command again: it goes on where the download stopped"
    first = (str(problem).strip() or type(problem).__name__).splitlines()[0]
    return f"{what} did not give it: {first}", "check the name and the network"


def explain_status(status: int, said: str, what: str, *, name: str, kind: str, revision: str | None) -> tuple[str, str]:
    """Return what an HTTP status means for a download, and what to do."""
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
    if said == "RevisionNotFound":
        return f'{what} has no revision "{revision}" of it', f"choose one of {page}/commits"
    if said == "GatedRepo" or status == 403:
        return f"{what} does not let you in ({status})", f"accept the terms at {page}, and set HF_TOKEN"
    if status == 404 or said == "RepoNotFound":
        return f"{what} knows no such {kind} ({status})", "check the name; for a private one set HF_TOKEN"
    if status == 401:
        return f"{what} wants a valid token (401)", "set HF_TOKEN to one of https://huggingface.co/settings/tokens"
    if status == 429:
        return f"{what} had too many requests from here (429)", "wait some minutes; with HF_TOKEN more is allowed"
    if status >= 500:
        return f"{what} is out of order ({status})", "try again later: what is downloaded is kept"
    return f"{what} answers with status {status}", "check the name and HF_TOKEN"


def causes(problem: BaseException | None) -> list[BaseException]:
    """Return an error and those it came from."""
    found: list[BaseException] = []
    while problem is not None and problem not in found:
        found.append(problem)
        problem = problem.__cause__ or problem.__context__
    return found


def check_file(file: Path, *, began: float, error: type[MlxloraError], code: str) -> None:
    """Remove a file that came since `began` and is not what the hub announced, and raise `error`.

    The cache names a file by its SHA-256 or, small ones, by git's hash.
    """
    blob = file.resolve()
    if blob.parent.name != "blobs" or not blob.is_file() or blob.stat().st_ctime < began:
        return
    if len(blob.name) in (40, 64) and digest(blob, git=len(blob.name) == 40) != blob.name:
        file.unlink()
        blob.unlink()
        raise error(
            f"{file.name} was damaged on its way from the hub: its hash is not {blob.name[:12]}...",
            fix="run the command again; it downloads this file anew",
            code=code,
        )


def digest(file: Path, *, git: bool) -> str:
    """Return the SHA-256 of a file, or the hash that git gives it."""
    found = hashlib.sha1(b"blob %d\0" % file.stat().st_size) if git else hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            found.update(chunk)
    return found.hexdigest()
