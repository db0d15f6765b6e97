"""Rows of data files: found, read, checked, and named by file and line in every error."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from shared.data.dialects import SPEAKERS, translate, unread_keys
from shared.data.formats import ARRAY, READERS, read_values
from shared.errors import ConfigError, DataError, did_you_mean
from shared.hub import download, is_hub_id, looked_in, near_paths

ROLES = ("system", "developer", "user", "assistant", "tool")
Kind = Literal["text", "prompt", "messages"]
ALPACA = ("instruction", "input")  # keys by which a row is known for one of Alpaca's
PAIRS = (  # names that a prompt and its completion often have
    ("question", "answer"), ("query", "response"), ("instruction", "response"), ("prompt", "response"),
    ("input", "output"), ("problem", "solution"), ("source", "target"),
)  # fmt: skip
FITS = {  # what to do with a file of another kind, by its suffix
    ".gz": "unpack it: gunzip", ".zip": "unpack it: unzip",
    ".txt": 'write every text as {"text": "..."} on a line of a .jsonl file',
    **{suffix.upper(): f"rename it to end in {suffix}" for suffix in READERS},
}  # fmt: skip
ALSO_VALID = ("valid", "validation", "val", "dev", "eval")  # how others call the rows to evaluate on
NAMES = {"valid": ("valid", "validation")}  # of a split's files; the hub's data sets use the long one


@dataclass(frozen=True)
class Row:
    """One checked row: its kind, its fields, and where it stands ("train.jsonl:3")."""

    kind: Kind
    fields: dict[str, Any]
    source: str
    unread: tuple[str, ...] = ()  # keys of the file's row that hold something and are not in `fields`


def find_data(path_or_id: str) -> Path:
    """Return the local file or folder of a path, a hub data set (org/name) or one folder of it (org/name:config)."""
    path = Path(path_or_id).expanduser()
    name, _, config = path_or_id.partition(":")
    if path.exists():
        return path
    hint = f'did you mean "{near[0]}"?' if (near := near_paths(path)) else None
    if not is_hub_id(name) or ":" in config:
        expected = "a folder with train.jsonl, a file, or a hub id, which has the form org/name"
        raise DataError(f"no data at {path}{looked_in(path)}", code="E210", expected=expected, fix=hint)
    if get_close_matches(path.suffix, READERS, n=1, cutoff=0.7):  # .jsnl too: no data set's name ends so
        what = f"no such file: {path_or_id}; not a hub id either"
        raise DataError(what + looked_in(path), code="E210", fix=hint or "check the path")
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
            fix = FITS.get(path.suffix)
            raise DataError(f"{path.name} is no data file", code="E210", expected=f"one of {known}", fix=fix)
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
        raise DataError(
            f"{path} has no {own or split}.jsonl", code="E210", expected=f"{own or split} with one of {known}",
            fix=folder_advice(path, own or split, split=split),
        )  # fmt: skip
    return []


def folder_advice(folder: Path, wanted: str, *, split: str) -> str:
    """Return what may make a split's file out of what a folder holds, and what that is."""
    inside = sorted(folder.iterdir())
    if not inside:
        return "this folder is empty: give another, or a file"
    holds = f"it holds: {', '.join(item.name for item in inside[:5])}"
    files = [item for item in inside if item.is_file()]
    for item in files:
        stem, kind = item.name.partition(".")[0], item.suffix.lower()
        if not get_close_matches(stem.lower(), [wanted.lower()], cutoff=0.7):
            continue
        if kind in READERS:
            setting = f", or data.splits: {{{split}: {stem}}}" if item.suffix == kind and stem != wanted else ""
            return f"rename {item.name} to {wanted}{kind}{setting}; {holds}"
        if fix := FITS.get(item.suffix):
            return f"{item.name}: {fix}; {holds}"
    rows = [item for item in files if item.suffix in READERS]
    return f"give the file itself: {rows[0]}; {holds}" if len(rows) == 1 else holds


def other_valid(folder: Path) -> str | None:
    """Return the name, without its suffix, of a folder's file that may hold the rows to evaluate on."""
    files = [item for item in sorted(folder.iterdir()) if item.is_file() and item.suffix in READERS]
    stems = [item.stem for item in files if item.stem not in NAMES["valid"] and item.stem != "train"]
    return next((stem for stem in stems if get_close_matches(stem.lower(), ALSO_VALID, n=1, cutoff=0.8)), None)


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
        raise no_rows(files[0])
    return rows


def no_rows(file: Path, *, prefix: str = "", dropped: int = 0) -> DataError:
    """Return the error for a file without rows; dropped: how many data.drop has left out of it."""
    if dropped:
        what = f"{prefix}{file.name} has no rows left: data.drop leaves out all {dropped}"
        return DataError(what, code="E211", fix="another data.drop, or other rows")
    kind = {".csv": "a header, and rows below it", ".tsv": "a header, and rows below it", ".parquet": "a table of rows"}
    expected = kind.get(file.suffix, "one JSON object per line")
    return DataError(f"{prefix}{file.name} has no rows", code="E211", expected=expected, fix="is it the right file?")


def iterate_rows(file: Path, *, columns: Mapping[Any, str] | None = None) -> Iterator[Row]:
    """Yield checked rows one by one; columns: our key -> the file's."""
    for value, source in read_values(file):
        yield make_row(value, source=source, columns=columns)


def make_row(value: Any, *, source: str, columns: Mapping[Any, str] | None = None) -> Row:
    """Return a checked row of a file's value; raises DataError."""
    if not isinstance(value, dict):
        fix = 'write it as {"text": "..."}' if isinstance(value, str) else None
        if isinstance(value, list) and value and isinstance(value[0], dict):
            turns = not {"role", "from"}.isdisjoint(value[0])
            fix = 'write it as {"messages": [...]}' if turns else ARRAY
        raise DataError(f"{source}: {kind_of(value)}", expected="a JSON object", fix=fix)
    row = check_row(translate(value, source=source, columns=columns), source=source)
    unread = () if columns else unread_keys(value, source=source)
    return replace(row, unread=unread) if unread else row


def kind_of(value: Any) -> str:
    """Return what a value is, in the words of JSON.

    >>> kind_of(3), kind_of(None), kind_of([1])
    ('a number (3)', 'null', 'a list')
    """
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int | float):
        return f"a number ({json.dumps(value)[:20]})"
    names: dict[type, str] = {str: "a text", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")


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
    if value.get("chosen") is not None and value.get("completion") is None:
        raise preference_row(value, source=source)
    if "prompt" in value or "completion" in value:
        for key in ("prompt", "completion"):
            if value.get(key) is None:
                raise DataError(f'{source}: "{key}" is null or missing', expected="a text", fix=advice(value))
            check_text(value[key], source=source, key=key, may_be_empty=key == "prompt")
        return Row("prompt", {key: value[key] for key in ("prompt", "completion")}, source)
    if "text" in value:
        check_text(value["text"], source=source, key="text", may_be_empty=False)
        return Row("text", {"text": value["text"]}, source)
    raise unknown_row(value, source=source)


def preference_row(value: dict[str, Any], *, source: str) -> DataError:
    """Return the error for a row of answers that are better and worse, with the columns that make one of ours of it."""
    columns = "messages: chosen" if isinstance(value["chosen"], list) else "text: chosen"
    if isinstance(value["chosen"], str) and isinstance(value.get("prompt"), str):
        columns = "prompt: prompt, completion: chosen"
    return DataError(
        f'{source}: "chosen": this looks like a preference set, whose rejected answers nothing here learns from',
        fix=f"train on the chosen answers alone: data.columns: {{{columns}}}",
    )


def unknown_row(value: dict[str, Any], *, source: str) -> DataError:
    """Return the error for a row without a known set of keys: the keys seen, and what they may stand for."""
    foreign = ""
    if not set(ALPACA).isdisjoint(value):
        missing = next((f', "{key}" is missing' for key in ("instruction", "output") if value.get(key) is None), "")
        foreign = f" (this looks like Alpaca{missing})"
    return DataError(
        f"{source}: unknown row, its keys are: {quoted(sorted(map(str, value))[:8])}{foreign}",
        expected='{"text"}, {"prompt", "completion"} or {"messages": [...]}', fix=advice(value),
    )  # fmt: skip


def quoted(keys: Iterable[Any]) -> str:
    """Return keys as a message has them.

    >>> quoted(["a", "b c"]), quoted([])
    ('"a", "b c"', 'none')
    """
    return ", ".join(f'"{key}"' for key in keys) or "none"


def advice(value: dict[str, Any]) -> str | None:
    """Return what may make a known row of an unknown one."""
    if pair := next((pair for pair in PAIRS if all(isinstance(value.get(key), str) for key in pair)), None):
        return f"data.columns: {{prompt: {pair[0]}, completion: {pair[1]}}}"
    if (blank := next((key for key in value if key != key.strip()), None)) is not None:
        return f'the name "{blank}" has blanks around it; take them out'
    known = ["text", "prompt", "completion", "messages", "conversations"]
    if (rows := next((key for key, inner in value.items() if are_rows(inner, known)), None)) is not None:
        return f'write the list of "{rows}" alone: [{{...}}, ...]'
    mistyped = (hint for key in value if key not in known and "mean" in (hint := did_you_mean(str(key), known)))
    if (hint := next(mistyped, None)) is not None:
        return hint
    others = [key for key, inner in value.items() if isinstance(inner, str) and key not in known]
    halves = {"prompt", "completion"}.intersection(value)
    if others and len(halves) == 1:
        name = others[0] if len(others) == 1 else "NAME"
        columns = {"prompt": name, "completion": name} | {key: key for key in halves}
        among = f", NAME one of {quoted(others[:8])}" if len(others) > 1 else ""
        return f"data.columns: {{prompt: {columns['prompt']}, completion: {columns['completion']}}}{among}"
    if len(others) > 1 and set(known).isdisjoint(value):
        return "say which are which: --set 'data.columns={prompt: NAME, completion: NAME}', or {text: NAME}"
    return None


def are_rows(value: Any, known: Collection[str]) -> bool:
    """Return whether a value is a list of what look like rows."""
    return (
        isinstance(value, list) and bool(value) and isinstance(value[0], dict) and any(key in value[0] for key in known)
    )


def check_text(value: Any, *, source: str, key: str, may_be_empty: bool) -> None:
    """Refuse what is not a text that can be encoded."""
    if not isinstance(value, str):
        found = "null or missing" if value is None else kind_of(value)
        fix = f'write it as a text: "{value}"' if isinstance(value, int | float) and len(str(value)) < 40 else None
        raise DataError(f'{source}: "{key}" is {found}', expected="a text", fix=fix)
    if not value and not may_be_empty:
        drop = ", or data.drop: [empty]" if key in ("text", "completion") else ""
        raise DataError(f'{source}: "{key}" is empty', fix=f"fill it in or remove the row{drop}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f'{source}: "{key}" has half a surrogate pair at {error.start}', fix="repair the text"
        ) from None


def check_messages(messages: Any, *, source: str) -> None:
    """Refuse what is not a list of {"role", "content"} with known roles and at least one assistant turn."""
    if not isinstance(messages, list) or not messages:
        kind = f": {kind_of(messages)}" if messages != [] else ""
        quotes = "JSON has double quotes; json.dumps writes them" if isinstance(messages, str) else None
        raise DataError(
            f'{source}: "messages" is empty or not a list{kind}', expected='[{"role", "content"}, ...]', fix=quotes
        )
    for n, message in enumerate(messages):
        check_message(message, source=f"{source}: message {n}")
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{source}: no assistant message, so nothing to learn", fix="add one or remove the row")


def check_message(message: Any, *, source: str) -> None:
    """Refuse a message without a known role, a text or calls, or with a weight that is neither 0 nor 1."""
    if not isinstance(message, dict):
        raise DataError(f"{source} is {kind_of(message)}", expected='{"role": "user", "content": "..."}')
    role = message.get("role")
    if not isinstance(role, str):
        raise DataError(
            f"{source} has no role, its keys are: {quoted(message)}", expected='{"role": "user", "content": "..."}'
        )
    if role not in ROLES:
        hint = did_you_mean(SPEAKERS.get(role.lower(), role.lower()), ROLES)
        raise DataError(f'{source} has role "{role}"', fix=hint)
    for key in ("weight", "train"):
        if role == "assistant" and message.get(key, 1) not in (0, 1):
            raise DataError(f'{source}: "{key}" is {kind_of(message[key])}', expected="0 (not learned) or 1")
    if not (message.get("tool_calls") and message.get("content") is None):
        if message.get("content") is None and role == "assistant":
            raise DataError(f'{source}: "content" is null or missing', expected='a text, or "tool_calls" beside it')
        check_text(message.get("content"), source=source, key="content", may_be_empty=True)


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
