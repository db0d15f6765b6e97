"""Rows of data files: found, read, checked, and named by file and line in every error."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shared.data.dialects import translate
from shared.data.formats import READERS, read_values
from shared.errors import ConfigError, DataError, did_you_mean
from shared.hub import download, is_hub_id

ROLES = ("system", "developer", "user", "assistant", "tool")
Kind = Literal["text", "prompt", "messages"]
# What users bring from elsewhere, and where to look for it.
FOREIGN = {"instruction": "Alpaca", "chosen": "a preference set", "input": "Alpaca"}
NAMES = {"valid": ("valid", "validation")}  # of a split's files; the hub's data sets use the long one


@dataclass(frozen=True)
class Row:
    """One checked row: its kind, its fields, and where it stands ("train.jsonl:3")."""

    kind: Kind
    fields: dict[str, Any]
    source: str


def find_data(path_or_id: str) -> Path:
    """Return the local file or folder of a path, a hub data set (org/name) or one folder of it (org/name:config)."""
    path = Path(path_or_id).expanduser()
    name, _, config = path_or_id.partition(":")
    if path.exists() or not is_hub_id(name) or ":" in config:
        if not path.exists():
            raise DataError(f"no data at {path}", code="E210", expected="a folder with train.jsonl, or a file")
        return path
    if path.suffix in READERS:
        near = [str(file) for file in path.parent.glob("*") if file.suffix in READERS]
        fix = did_you_mean(path_or_id, near) if near else "check the path"
        raise DataError(f"no such file: {path_or_id}; not a hub id either", code="E210", fix=fix)
    patterns = [f"{config}/*{suffix}" if config else f"*{suffix}" for suffix in READERS]
    root = download(name, kind="dataset", patterns=patterns, error=DataError, code="E210")
    if config and not (root / config).is_dir():
        raise DataError(
            f'{name} has no files of a config "{config}"', code="E210", fix="look up the folders of the data set"
        )
    return root / config


def split_files(path: Path, split: str, *, names: Mapping[Any, str] | None = None) -> list[Path]:
    """Return the files of a split, none where a folder has none; a single file is its own train split.

    train.jsonl, or parts: train-00000.parquet, train/0.parquet, either of them also in data/. names: what the folder
    calls our splits; what is named has to be there.
    """
    own = (names or {}).get(split)
    known = ", ".join(READERS)
    if path.is_file():
        if path.suffix not in READERS:
            raise DataError(f"{path.name} is no data file", code="E210", expected=f"one of {known}")
        return [path] if split == "train" else []
    for name in (own,) if own else NAMES.get(split, (split,)):
        for pattern in (name, f"{name}-*", f"{name}/*", f"data/{name}-*", f"data/{name}/*"):
            found = sorted(file for suffix in READERS for file in path.glob(f"{pattern}{suffix}"))
            if len({file.suffix for file in found}) > 1:
                raise DataError(
                    f"{path} has {found[0].name} and {found[-1].name}", code="E210", fix="leave one kind there"
                )
            if found:
                return found
    if split == "train" or own:
        near = sorted(item.name for item in path.iterdir())[:5]
        raise DataError(
            f"{path} has no {own or split}.jsonl", code="E210", expected=f"{own or split} with one of {known}",
            fix=f"it holds: {', '.join(near) or 'nothing'}",
        )  # fmt: skip
    return []


def find_split(path: Path, split: str | None = None) -> list[Path]:
    """Return a file itself, or the files of a folder's split (of None: valid, else test, else train) to evaluate on."""
    if path.is_file():
        if split is not None:
            raise ConfigError(f"--split {split}: {path.name} is a file, which has no splits", fix="leave out --split")
        return split_files(path, "train")
    files = split_files(path, split) if split else []
    for name in ("valid", "test", "train") if split is None else ():
        files = files or split_files(path, name)
    if not files:
        raise DataError(f"{path} has no {split}.jsonl", code="E210", fix="choose another --split")
    return files


def read_rows(*files: Path, columns: Mapping[Any, str] | None = None) -> list[Row]:
    """Return all rows of files; blank lines are passed over. Raises DataError with file:line."""
    rows = [row for file in files for row in iterate_rows(file, columns=columns)]
    if not rows:
        raise DataError(f"{files[0].name} has no rows", code="E211", expected="one JSON object per line")
    return rows


def iterate_rows(file: Path, *, columns: Mapping[Any, str] | None = None) -> Iterator[Row]:
    """Yield checked rows one by one; columns: our key -> the file's."""
    for value, source in read_values(file):
        yield make_row(value, source=source, columns=columns)


def make_row(value: Any, *, source: str, columns: Mapping[Any, str] | None = None) -> Row:
    """Return a checked row of a file's value; raises DataError."""
    if not isinstance(value, dict):
        raise DataError(f"{source}: a {type(value).__name__}", expected="a JSON object")
    return check_row(translate(value, source=source, columns=columns), source=source)


def as_json(field: Any, *, source: str, key: str) -> str:
    """Return a field as JSON; raises DataError for dates, bytes and the like, which a Parquet file may hold."""
    try:
        return json.dumps(field, ensure_ascii=False)
    except TypeError as error:
        raise DataError(f'{source}: "{key}": {error}', expected="texts, numbers, lists and objects") from None


def check_row(value: dict[str, Any], *, source: str) -> Row:
    """Return a row of one of the three kinds, told by its keys."""
    if "messages" in value:
        check_messages(value["messages"], source=source)
        check_tools(value.get("tools"), source=source)
        fields = {key: value[key] for key in ("messages", "tools") if value.get(key) is not None}
        for key, field in fields.items():  # names and arguments of calls can hold half characters too
            check_text(as_json(field, source=source, key=key), source=source, key=key, may_be_empty=False)
        return Row("messages", fields, source)
    asked = next((key for key in ("prompt", "completion") if value.get(key) is not None), None)
    if asked and value.get("text") is not None:
        raise DataError(
            f'{source}: both "text" and "{asked}", and each would be another row to learn from',
            fix="take one out of the row, or say in data.columns which to read",
        )
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
