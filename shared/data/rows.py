"""Rows of JSONL files: read, checked, and named by file and line in every error."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shared.errors import DataError, did_you_mean
from shared.folder import HUB_ID

ROLES = ("system", "developer", "user", "assistant", "tool")
Kind = Literal["text", "prompt", "messages"]
# What users bring from elsewhere, and where to look for it.
FOREIGN = {"conversations": "ShareGPT", "instruction": "Alpaca", "chosen": "a preference set", "input": "Alpaca"}
MAX_LINE = 50_000_000


@dataclass(frozen=True)
class Row:
    """One checked row: its kind, its fields, and where it stands ("train.jsonl:3")."""

    kind: Kind
    fields: dict[str, Any]
    source: str


def find_data(path_or_id: str) -> Path:
    """Return the local file or folder of a path or a hub data set of JSONL files."""
    path = Path(path_or_id).expanduser()
    if path.exists():
        return path
    if not HUB_ID.fullmatch(path_or_id) or path_or_id.startswith("."):
        raise DataError(f"no data at {path}", expected="a folder with train.jsonl, or a JSONL file")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path_or_id, repo_type="dataset", allow_patterns=["*.jsonl"]))
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f'"{path_or_id}" does not exist here, and the hub did not give it: {reason}',
            fix="check the name and the network",
        ) from None


def split_file(path: Path, split: str) -> Path | None:
    """Return the file of a split, None where the folder has none; a single file is its own train split."""
    if path.is_file():
        if path.suffix not in (".jsonl", ".json"):
            raise DataError(f"{path.name} is not a JSONL file", expected="one JSON object per line, in *.jsonl")
        return path if split == "train" else None
    file = path / f"{split}.jsonl"
    if file.is_file():
        return file
    if split == "train":
        near = sorted(item.name for item in path.iterdir())[:5]
        raise DataError(
            f"{path} has no train.jsonl", expected="train.jsonl", fix=f"it holds: {', '.join(near) or 'nothing'}"
        )
    return None


def read_rows(file: Path) -> list[Row]:
    """Return all rows of a JSONL file; blank lines are passed over. Raises DataError with file:line."""
    rows = list(iterate_rows(file))
    if not rows:
        raise DataError(f"{file.name} has no rows", expected="one JSON object per line")
    return rows


def iterate_rows(file: Path) -> Iterator[Row]:
    """Yield checked rows one by one."""
    try:
        with file.open("rb") as stream:
            for number, raw in enumerate(stream, start=1):
                if raw.strip():
                    yield parse_row(raw, source=f"{file.name}:{number}")
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}", fix="check the path and its permissions") from None


def parse_row(raw: bytes, *, source: str) -> Row:
    """Return one row of a line; raises DataError."""
    if len(raw) > MAX_LINE:
        raise DataError(f"{source}: a line of {len(raw)} bytes", expected=f"at most {MAX_LINE}")
    try:
        value = json.loads(raw.rstrip().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: not UTF-8 at byte {error.start}", fix="save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        near = error.doc[max(error.pos - 15, 0) : error.pos + 15].strip()
        raise DataError(
            f"{source}: not JSON: {error.msg.removesuffix(' at')} at column {error.pos + 1}, near {near!r}",
            expected="one JSON object per line",
        ) from None
    except RecursionError:
        raise DataError(f"{source}: nested too deeply", expected="a flat object") from None
    except ValueError:  # Python reads no integer of more than 4300 digits
        raise DataError(f"{source}: a number that is too long to read", expected="texts") from None
    if not isinstance(value, dict):
        raise DataError(f"{source}: a {type(value).__name__}", expected="a JSON object")
    return check_row(value, source=source)


def check_row(value: dict[str, Any], *, source: str) -> Row:
    """Return a row of one of the three kinds, told by its keys."""
    if "messages" in value:
        check_messages(value["messages"], source=source)
        check_tools(value.get("tools"), source=source)
        fields = {key: value[key] for key in ("messages", "tools") if value.get(key) is not None}
        for key, field in fields.items():  # names and arguments of calls can hold half characters too
            check_text(json.dumps(field, ensure_ascii=False), source=source, key=key, may_be_empty=False)
        return Row("messages", fields, source)
    if "prompt" in value or "completion" in value:
        for key in ("prompt", "completion"):
            check_text(value.get(key), source=source, key=key, may_be_empty=key == "prompt")
        return Row("prompt", {key: value[key] for key in ("prompt", "completion")}, source)
    if "text" in value:
        check_text(value["text"], source=source, key="text", may_be_empty=False)
        return Row("text", {"text": value["text"]}, source)
    raise unknown_row(value, source=source)


def unknown_row(value: dict[str, Any], *, source: str) -> DataError:
    """Return the error for a row without a known key: the keys seen, and the nearest known one."""
    seen = ", ".join(sorted(map(str, value))[:8]) or "none"
    foreign = next((f" (this looks like {name})" for key, name in FOREIGN.items() if key in value), "")
    near = next(
        (hint for key in value if "mean" in (hint := did_you_mean(str(key), ["text", "prompt", "messages"]))), None
    )
    return DataError(
        f"{source}: unknown row, its keys are: {seen}{foreign}",
        expected='{"text"}, {"prompt", "completion"} or {"messages": [...]}', fix=near,
    )  # fmt: skip


def check_text(value: Any, *, source: str, key: str, may_be_empty: bool) -> None:
    """Refuse what is not a text that can be encoded."""
    if not isinstance(value, str):
        found = "null or missing" if value is None else f"a {type(value).__name__}"
        raise DataError(f'{source}: "{key}" is {found}', expected="a text")
    if not value and not may_be_empty:
        raise DataError(f'{source}: "{key}" is empty', fix="fill it in or remove the row")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f'{source}: "{key}" has half a surrogate pair at {error.start}', fix="repair the text"
        ) from None


def check_messages(messages: Any, *, source: str) -> None:
    """Refuse what is not a list of {"role", "content"} with known roles and at least one assistant turn."""
    if not isinstance(messages, list) or not messages:
        raise DataError(f'{source}: "messages" is empty or not a list', expected='[{"role", "content"}, ...]')
    for n, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"{source}: message {n} has no role", expected='{"role": "user", "content": "..."}')
        if message["role"] not in ROLES:
            raise DataError(
                f'{source}: message {n} has role "{message["role"]}"', fix=did_you_mean(message["role"], ROLES)
            )
        if message.get("tool_calls") and message.get("content") is None:
            continue
        check_text(message.get("content"), source=f"{source}: message {n}", key="content", may_be_empty=True)
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{source}: no assistant message, so nothing to learn", fix="add one or remove the row")


def check_tools(tools: Any, *, source: str) -> None:
    """Refuse tools that are not a list of descriptions."""
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise DataError(f'{source}: "tools" is not a list of objects', expected='[{"type": "function", ...}, ...]')


def content_hash(rows: list[Row]) -> str:
    """Return the SHA-256 of the rows' content, in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.kind, row.fields], sort_keys=True, ensure_ascii=False).encode())
    return digest.hexdigest()
