"""The run folder: made or refused before anything is loaded, described by a manifest."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shared.callbacks import Metrics
from shared.config import DataConfig, RunConfig
from shared.config_file import to_yaml
from shared.durable import put_back, sync, write_json, write_whole
from shared.errors import CheckpointError, ConfigError, StorageError, did_you_mean
from shared.folder import sha256
from shared.masking import mask
from shared.protocols import Backend
from shared.running import checkpoint
from shared.types import Capability

# Settings that may change between a run and its resume: they change neither the mathematics nor the data.
FREE = (
    "output", "backend", "device", "log", "checkpoint", "evaluation",
    "train.micro_tokens", "train.recompute", "train.compile", "data.packing", "data.padding_side", "data.cache",
    "data.streaming",
    "model", "adapter.start",  # these and the next by hash, wherever they lie
    "data.path", "data.splits", "data.columns", "data.drop", "data.valid_split",
)  # fmt: skip


FOLDERS = ("checkpoints", "adapter", "model")  # what a run replaces as a whole
TRACKED = ("sinks", "tensorboard", "wandb", "profile")  # what trackers and profilers keep of it
WRITTEN = (*FOLDERS, *TRACKED, "config.yaml", "manifest.json", "metrics.jsonl", "report.html")


@dataclass(frozen=True)
class Identity:
    """What must be the same for a resume to be the same run."""

    settings: Mapping[str, Any]  # flat: "optimizer.lr" -> value
    data: str  # hash of the training rows' tokens and masks; of streamed ones of their files and some tokens
    base: str  # hash of the base's weights and config
    streamed: bool = False
    other_data: Callable[[], str] | None = None  # the hash of the same rows where they are read the other way

    def as_dict(self) -> dict[str, Any]:
        """Return it as state.json keeps it."""
        return {"settings": dict(self.settings), "data": self.data, "base": self.base, "streamed": self.streamed}


def flat_settings(config: RunConfig) -> dict[str, Any]:
    """Return the settings that decide the result, one level deep."""
    flat: dict[str, Any] = {}
    for key, value in config.model_dump(mode="json").items():
        items = {f"{key}.{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {key: value}
        flat.update({name: v for name, v in items.items() if name not in FREE and name.split(".")[0] not in FREE})
    return flat


def check_output(config: RunConfig, resume: str) -> None:
    """Raise ConfigError or CheckpointError for a run folder or a --resume that cannot be used."""
    folder = config.output_dir
    check_inputs(config)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output: {folder} is a file", code="E205", expected="a folder, or a name for a new one")
    theirs = [name for name in FOLDERS if (folder / name).exists()]
    if theirs and not is_run(folder):
        raise ConfigError(
            f'output: {folder} is not the folder of a run, and a run would replace "{theirs[0]}" in it',
            code="E205",
            fix="choose another --output",
        )
    if resume not in ("auto", "never") and not Path(resume).expanduser().is_dir():
        raise CheckpointError(
            f"--resume: no folder at {resume}", code="E320", expected="auto, never, a run folder or a checkpoint folder"
        )


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run's: by its manifest, or where that got lost by a checkpoint."""
    committed = (folder / "checkpoints").glob(f"step-*/{checkpoint.MARKER}")
    return (folder / "manifest.json").is_file() or any(committed)


def check_inputs(config: RunConfig) -> None:
    """Raise ConfigError where a run would write over what it reads: the model, an adapter, or data."""
    folder = config.output_dir.resolve()
    inputs = [("model", config.model), ("adapter.start", config.adapter.start)]
    inputs += [("data.path", source.path) for source in config.data.sources]
    inputs += [(f"evaluation.sets.{name}", path) for name, path in config.evaluation.sets.items()]
    for key, text in inputs:
        path = Path(text or "").expanduser()
        if text is None or not path.exists():
            continue
        place = path.resolve()
        below = place.relative_to(folder).parts if place.is_relative_to(folder) else ("",)
        same = not below and not is_run(folder)  # a run that began so may go on
        if same or (below and below[0] in WRITTEN):
            what = f"output: {config.output_dir} is the folder of {key}" if same else f"output: {key} {text} lies in it"
            raise ConfigError(
                f"{what}, and the run would write over files there", code="E205", fix="choose another --output"
            )


def open_run(folder: Path) -> bool:
    """Make the run folder and check that it can be written; return whether it is new. Raises StorageError."""
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-test-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
        with suppress(OSError):  # a parent that may not be read
            sync(folder.resolve().parent)
    except OSError as error:
        file = next((place for place in (folder, *folder.parents) if place.is_file()), None)
        reason = f"{file} is a file" if file else error.strerror
        raise StorageError(f"output: cannot write in {folder}: {reason}", fix="choose another --output") from None
    return made


def clear(folder: Path) -> None:
    """Remove an earlier run's results: checkpoints, metrics, adapter and reports."""
    for name in (*FOLDERS, *TRACKED):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("metrics.jsonl", "manifest.json", "report.html"):  # config.yaml may be what this run is read from
        (folder / name).unlink(missing_ok=True)


def find_checkpoint(
    folder: Path, resume: str, identity: Callable[[], Identity], note: Callable[[str], None], *,
    allowed: Collection[str] = (),
) -> checkpoint.Checkpoint | None:  # fmt: skip
    """Return the checkpoint to go on from, None for a fresh start.

    resume: "auto" (the newest valid one of the run folder), "never", or a checkpoint or run folder.
    allowed: keys of settings, "data" or "base", which may have changed since.
    """
    root = folder / "checkpoints"
    put_back(folder)
    checkpoint.sweep(root)
    if resume == "never":
        return None
    if resume == "auto":
        found, problems = checkpoint.newest(root)
        for problem in problems:
            note(f"passed over: {problem}")
        if found is None:
            check_fresh(folder, note)
    else:
        source = Path(resume).expanduser()
        found = from_path(source)
        if folder.resolve() not in (source.resolve(), *source.resolve().parents) and checkpoint.step_dirs(root):
            raise ConfigError(
                f"{folder} holds a run of its own, and --resume names another",
                fix="choose another --output",
                code="E205",
            )
    if found is None:
        return None
    changed = check_identity(found, as_begun(identity(), found, note), allowed=allowed)
    if not changed:
        return found
    note(f"changed since update {found.step}: {'; '.join(changed.values())}")
    return replace(found, state={**found.state, "loop": {**found.state["loop"], "finished": False}})


def as_begun(own: Identity, found: checkpoint.Checkpoint, note: Callable[[str], None]) -> Identity:
    """Return a run's identity with the hash of its rows as they were read when the checkpoint was made.

    A file may have grown past the size from which it is streamed, or `data.streaming` have been set: rows, order and
    tokens are the same, so only the hash is another.
    """
    theirs = found.state.get("identity", {})
    if theirs.get("data") == own.data or theirs.get("streamed") == own.streamed or own.other_data is None:
        return own  # an older checkpoint does not say whether its rows were streamed
    before, now = ("in memory", "streamed") if own.streamed else ("streamed", "in memory")
    note(f"training rows are {now} now and were {before} before: all of them are compared first")
    return replace(own, data=own.other_data())


def check_fresh(folder: Path, note: Callable[[str], None]) -> None:
    """Say that a run begins again; raises CheckpointError where that would cost a result that nobody can go on from."""
    done = [name for name in ("adapter", "model") if (folder / name).exists()]
    if done:
        raise CheckpointError(
            f"{folder} has a result ({done[0]}) but no checkpoint to go on from",
            code="E320",
            fix="choose another --output, or --resume never to train anew (removes the old run)",
        )
    if Metrics(folder / "metrics.jsonl").read():
        note("no checkpoint was saved yet, so training begins again at update 1")


def maker_of(backend: Backend) -> dict[str, Any]:
    """Return what computes, as state.json keeps it: backend, device and versions."""
    found = backend.probe()
    return {"backend": found.name, "device": found.device, "versions": dict(found.versions)}


def as_made(capability: Capability, maker: Mapping[str, Any]) -> Capability:
    """Return what computed a run, for its manifest: this backend, or another of which its checkpoint says less."""
    if maker.get("backend", capability.name) == capability.name:
        return capability
    return replace(capability, name=maker["backend"], reason=maker["device"], versions=maker["versions"])


def changed_maker(found: checkpoint.Checkpoint | None, own: Mapping[str, Any]) -> Iterator[str]:
    """Yield what computes a run from here on, where it was something else before."""
    before = found.state["maker"] if found else {}
    changed = [
        f"{key} {before[key]} -> {own[key]}" for key in ("backend", "device") if before and before[key] != own[key]
    ]
    if before and not changed:
        versions = before["versions"]
        changed = [
            f"{key} {versions.get(key)} -> {now}" for key, now in own["versions"].items() if versions.get(key) != now
        ]
    if changed:
        yield f"{', '.join(changed)}: from here on equal to the run so far up to rounding, no longer bit for bit"


def changed_rows(folder: Path, own: Mapping[str, str], *, sets: Collection[str] = ()) -> Iterator[str]:
    """Yield that the validation rows are not those that the run so far was evaluated on; training rows are refused."""
    try:
        before = dict(manifest_of(folder)["data_sha256"])
    except (ValueError, KeyError, TypeError):
        return
    for name in ("valid.jsonl", *(f"evaluation.sets.{name}/" for name in sets)):
        changed = [key for key in before if key.startswith(name) and before[key] != own.get(key, before[key])]
        if changed:
            yield f"{changed[0]} has changed: losses of evaluations before and behind do not compare"


def begin(folder: Path, found: checkpoint.Checkpoint | None, *, resume: str) -> None:
    """Put the run folder where the run starts: an earlier run goes, or what is behind the checkpoint, None: all of it.

    Called when everything is loaded, so that a mistake in the config costs nobody a finished run.
    """
    if resume == "never":
        clear(folder)
    step, root = found.step if found else -1, folder / "checkpoints"
    checkpoint.drop_after(root, step)
    Metrics(folder / "metrics.jsonl").truncate(step)
    if found is not None and resume != "auto":  # of another run its best checkpoint may be the result of this one
        checkpoint.adopt(root, root_of(Path(resume).expanduser()), steps=found.state.get("needs", []))


def root_of(path: Path) -> Path:
    """Return the folder that holds the checkpoints of a run folder, or those beside a checkpoint."""
    if checkpoint.STEP_DIR.fullmatch(path.name):
        return path.resolve().parent
    return path / "checkpoints" if (path / "checkpoints").is_dir() else path


def from_path(path: Path) -> checkpoint.Checkpoint:
    """Return the checkpoint of a step-... folder, or the newest of a run folder."""
    if (path / checkpoint.STATE_FILE).exists() or checkpoint.STEP_DIR.fullmatch(path.name):
        try:
            return checkpoint.load(path)
        except CheckpointError as error:
            hint = error.fix or "name another checkpoint; --resume auto takes the newest whole one"
            raise CheckpointError(
                f"--resume: {error.what}", code=error.code, expected=error.expected, fix=hint
            ) from None
    found, _ = checkpoint.newest(root_of(path))
    if found is None:
        raise CheckpointError(
            f"--resume: no checkpoint in {path}", code="E320", expected="a folder with checkpoints/step-..."
        )
    return found


def differences(found: checkpoint.Checkpoint, own: Identity) -> dict[str, str]:
    """Return what has changed since a checkpoint, each in words under the key that --allow-change takes."""
    theirs = found.state.get("identity", {})
    before = {**default_settings(), **theirs.get("settings", {})}  # an older version knew fewer keys
    changed = {
        key: f"{key}: {before.get(key)!r} -> {own.settings.get(key)!r}"
        for key in sorted({*before, *own.settings})
        if before.get(key) != own.settings.get(key)
    }
    for key, what in (("data", "the training rows, the tokenizer or the chat template"), ("base", "the base's files")):
        new, old = getattr(own, key), str(theirs.get(key))
        if new != old:
            changed[key] = f"{key}: {what} (SHA-256 {old[:8]} -> {new[:8]})"
    return changed


def default_settings() -> dict[str, Any]:
    """Return the settings that decide the result where a config says nothing."""
    return flat_settings(RunConfig(model="-", data=DataConfig(path="-")))


def check_identity(found: checkpoint.Checkpoint, own: Identity, *, allowed: Collection[str]) -> dict[str, str]:
    """Return what has changed since the checkpoint; raises CheckpointError for what is not allowed to."""
    changed = differences(found, own)
    refused = [key for key in changed if key not in allowed]
    if refused:
        never = [key for key in refused if key.startswith(SHAPING)]  # tensors of the checkpoint would not fit
        flags = " ".join(f"--allow-change {key}" for key in refused)
        raise CheckpointError(
            f"the run was started differently, so it cannot go on: {'; '.join(changed[key] for key in refused[:4])}",
            expected="the same settings, rows and base, or another --output",
            fix=("" if never else f"{flags} goes on all the same; ")
            + "--resume never starts anew (removes the old run)",
            code="E322",
        )
    return changed


SHAPING = ("adapter.type", "adapter.rank", "adapter.targets", "adapter.layers", "optimizer.name", "optimizer.state")


def check_allowed(allowed: Collection[str], config: RunConfig) -> None:
    """Raise ConfigError for an --allow-change that names nothing a resume compares."""
    known = [*flat_settings(config), "data", "base"]
    for key in allowed:
        if key not in known:
            raise ConfigError(
                f'--allow-change: "{key}" is nothing that a resume compares', fix=did_you_mean(key, known)
            )


def with_whole_paths(config: RunConfig, folder: Path) -> RunConfig:
    """Return the config with its run folder, and local paths, such that it works from any directory."""
    sources = [source.model_copy(update={"path": whole_path(source.path)}) for source in config.data.sources]
    start = Path(config.adapter.start).expanduser() if config.adapter.start else None
    whole = config.adapter.model_copy(update={"start": str(start.resolve()) if start else None})
    sets = {name: whole_path(path) for name, path in config.evaluation.sets.items()}
    return config.model_copy(
        update={
            "adapter": whole,
            "evaluation": config.evaluation.model_copy(update={"sets": sets}),
            "output": str(folder.resolve()),
            "model": whole_path(config.model),
            "data": config.data.with_sources(sources),
        }
    )


def whole_path(path: str) -> str:
    """Return a path that works from any directory, a hub id as it is."""
    local = Path(path).expanduser()
    return str(local.resolve()) if local.exists() else path


def hash_files(files: Sequence[Path]) -> Future[dict[str, str]]:
    """Return the SHA-256 of files by name, computed in the background."""
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hash")
    future = pool.submit(lambda: {file.name: sha256(file) for file in files})
    pool.shutdown(wait=False)
    return future


def joint_hash(hashes: Mapping[str, str]) -> str:
    """Return one SHA-256 for files that belong together, from theirs by name."""
    joined = "".join(f"{name}:{digest}" for name, digest in sorted(hashes.items()))
    return hashlib.sha256(joined.encode()).hexdigest()


def write_manifest(
    folder: Path, config: RunConfig, capability: Capability, *, base: Mapping[str, str], data: Mapping[str, str],
    facts: Mapping[str, Any], command: Sequence[str],
) -> None:  # fmt: skip
    """Write config.yaml and manifest.json."""
    manifest = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [mask(word) for word in command],
        "backend": capability.name,
        "device": capability.reason,
        "versions": {"python": platform.python_version(), **capability.versions},
        "hardware": {"machine": platform.machine(), "system": platform.platform(terse=True), "cores": os.cpu_count()},
        "seeds": {"train": config.train.seed},
        "base_sha256": dict(base),
        "data_sha256": dict(data),
        **facts,
    }
    write_whole(folder / "config.yaml", to_yaml(config))
    write_json(folder / "manifest.json", manifest)


def manifest_of(folder: Path) -> dict[str, Any]:
    """Return a run's manifest, empty where it is missing or damaged."""
    try:
        found = json.loads((folder / "manifest.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def command_line() -> list[str]:
    """Return the command that runs this process, without the interpreter's path."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]
