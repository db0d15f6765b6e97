"""Values of data files: JSON (lines or an array), CSV, TSV and Parquet, each with the place it stands at."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from shared.errors import CapabilityError, DataError

MAX_LINE = 50_000_000
MARK = b"\xef\xbb\xbf"  # of UTF-8, where a file begins
BLANK = re.compile(r"[ \t\n\r]*")
ARRAY = (
    "this is a JSON array: name the file .json, or write one object per line"  # what to do about one in a .jsonl file
)
LFS = b"version https://git-lfs.github.com/spec/"
SEPARATORS = {".csv": ",", ".tsv": "\t"}
NAMES_OF_MARKS = {";": "semicolon", "\t": "tab", ",": "comma", "|": "bar"}


def read_values(file: Path) -> Iterator[tuple[Any, str]]:
    """Yield every value of a file and its place, "train.jsonl:3"; blank lines are passed over. Raises DataError."""
    with readable(file):
        yield from READERS[file.suffix](file)


@contextmanager
def readable(file: Path) -> Iterator[None]:
    """Raise DataError for a file that cannot be read in the block, or that only points to one."""
    try:
        with file.open("rb") as stream:
            if stream.read(len(LFS)) == LFS:
                what = f"{file.name} is a pointer of Git LFS, not the file"
                raise DataError(what, code="E211", fix="git lfs pull, or download the file itself")
        yield
    except OSError as error:
        raise unreadable(file, error) from None


def unreadable(file: Path, error: OSError) -> DataError:
    """Return the error for a file that cannot be opened or read."""
    return DataError(f"cannot read {file}: {error.strerror}", code="E211", fix="check the path and its permissions")


def read_lines(file: Path) -> Iterator[tuple[Any, str]]:
    """Yield the value of every line."""
    with file.open("rb") as stream:
        for number, raw in enumerate(raw_lines(stream), start=1):
            if not is_blank_line(raw):
                source = f"{file.name}:{number}"
                yield parse_line(raw, source=source), source


def raw_lines(stream: BinaryIO) -> Iterator[bytes]:
    """Yield lines, the beginning of one that is too long: a file without line ends may be larger than memory."""
    return iter(partial(stream.readline, MAX_LINE + 1), b"")


def is_blank_line(raw: bytes) -> bool:
    """Return whether a line holds nothing but blanks, and the mark that some editors put in front of a file."""
    return not raw.removeprefix(MARK).strip()


def read_json(file: Path) -> Iterator[tuple[Any, str]]:
    """Yield the values of a JSON array, or of lines; the place of an array's value is the line where it begins."""
    with file.open("rb") as stream:
        if not stream.read(4096).removeprefix(MARK).lstrip().startswith(b"["):
            whole = read_object(file)
            yield from read_lines(file) if whole is None else iter([(whole, f"{file.name}:1")])
            return
    text = to_text(file.read_bytes(), source=file.name)
    at, line, decoder = text.index("[") + 1, 1, json.JSONDecoder(object_pairs_hook=each_once)
    seen, behind = 0, "["
    while behind in ("[", ","):
        at = skip(text, at)
        if behind == "[" and text[at : at + 1] == "]":
            break
        line, seen = line + text.count("\n", seen, at), at
        source = f"{file.name}:{line}"
        with json_faults(source, array=True):
            value, at = decoder.raw_decode(text, at)
        yield value, source
        at = skip(text, at)
        behind, at = text[at : at + 1], at + 1
        if not behind:
            raise unended(source)
        if behind not in (",", "]"):
            raise DataError(
                f"{source}: not JSON: a value is followed by {behind!r}", code="E211", expected="a comma or ]"
            )
    if skip(text, at) < len(text) and text[at - 1] == "]":
        raise DataError(
            f"{file.name}: not JSON: more behind the array", code="E211", expected="one array, or one object per line"
        )


def read_object(file: Path) -> dict[str, Any] | None:
    """Return the one object that a file holds over several lines, None where it holds anything else."""
    if file.stat().st_size > MAX_LINE:
        return None
    raw = file.read_bytes()
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):  # lines, mostly
        return None
    return parse_line(raw, source=f"{file.name}:1") if isinstance(found, dict) else None


def skip(text: str, at: int) -> int:
    """Return the next place that is not blank."""
    found = BLANK.match(text, at)
    return found.end() if found else at


def read_table(file: Path) -> Iterator[tuple[Any, str]]:
    """Yield a CSV or TSV file's rows as objects; the place is the line where a row begins."""
    csv.field_size_limit(MAX_LINE)
    with file.open(encoding="utf-8-sig", newline="") as stream:
        rows = csv.reader(stream, delimiter=SEPARATORS[file.suffix], strict=True)
        header: list[str] | None = None
        line = 1
        while True:
            source = f"{file.name}:{line}"
            try:
                row = next(rows, None)
            except UnicodeDecodeError:
                raise not_utf8(file) from None
            except csv.Error as error:
                raise DataError(
                    f"{source}: not CSV: {error}", code="E211", fix='between quotes, write "" for a quote'
                ) from None
            line = rows.line_num + 1
            if row is None:
                return
            if header is None:
                header = row
                check_header(row, source=source, kind=file.suffix)
            elif len(row) not in (0, len(header)):
                raise DataError(
                    f"{source}: {len(row)} cells, the header has {len(header)}", code="E211",
                    fix='put a text with separators in it into quotes: "one, two"',
                )  # fmt: skip
            elif row:
                yield dict(zip(header, row, strict=True)), source


def not_utf8(file: Path) -> DataError:
    """Return the error for a table that is not UTF-8, with the first line that is not: the reader is ahead of it."""
    with file.open("rb") as stream:
        for line, raw in enumerate(stream, start=1):
            try:
                to_text(raw, source=f"{file.name}:{line}")
            except DataError as error:
                fix = "save the file as UTF-8; spreadsheets call it CSV UTF-8"
                return DataError(error.what, code=error.code, fix=fix)
    return DataError(f"{file.name}: not UTF-8", code="E211", fix="save the file as UTF-8")


def check_header(header: list[str], *, source: str, kind: str) -> None:
    """Refuse a table's first line where a column stands twice, or where other separators than the file's stand."""
    if len(set(header)) < len(header):
        raise DataError(f"{source}: a column stands twice", code="E211", expected="a name for each column")
    own = SEPARATORS[kind]
    other = next((mark for mark in NAMES_OF_MARKS if mark in header[0] and mark != own), None) if header else None
    if len(header) == 1 and other is not None:
        fitting = next((name for name, mark in SEPARATORS.items() if mark == other), None)
        raise DataError(
            f"{source}: the file looks {NAMES_OF_MARKS[other]}-separated: its header is one cell, {header[0]!r}",
            code="E211", expected=f"{NAMES_OF_MARKS[own]}s between the cells of a {kind} file",
            fix=f"rename it to {fitting}" if fitting else f"save it with {NAMES_OF_MARKS[own]}s",
        )  # fmt: skip


def read_parquet(file: Path) -> Iterator[tuple[Any, str]]:
    """Yield a Parquet file's rows as objects, without the fields of inner objects that are null; counted from 1."""
    number = 0
    with parquet_table(file) as table:
        for batch in table.iter_batches(batch_size=1000):
            for value in batch.to_pylist():
                number += 1
                yield {key: without_null(inner) for key, inner in value.items()}, f"{file.name}:{number}"


@contextmanager
def parquet_table(file: Path) -> Iterator[Any]:
    """Open a Parquet file; raises DataError for what pyarrow does not read, CapabilityError without it."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise CapabilityError(
            f"{file.name} is a Parquet file, which pyarrow reads", code="E401", fix="pip install 'mlxlora[parquet]'"
        ) from None
    try:
        with parquet.ParquetFile(file) as table:
            yield table
    except pyarrow.ArrowException as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{file.name}: not a Parquet file: {reason}", code="E211", fix="download or write it again"
        ) from None


def count_values(file: Path) -> int:
    """Return how many values `read_values` gives; lines and a Parquet file are counted without reading any."""
    if file.suffix == ".parquet":
        with readable(file), parquet_table(file) as table:
            return table.metadata.num_rows
    if file.suffix == ".jsonl":
        with readable(file), file.open("rb", buffering=2**20) as stream:
            return sum(not is_blank_line(raw) for raw in raw_lines(stream))
    return sum(1 for _ in read_values(file))


def without_null(value: Any) -> Any:
    """Return a value without null fields: a column of objects has the keys of all of them in each."""
    if isinstance(value, list):
        return [without_null(inner) for inner in value]
    if isinstance(value, dict):
        return {key: without_null(inner) for key, inner in value.items() if inner is not None}
    return value


READERS: dict[str, Callable[[Path], Iterator[tuple[Any, str]]]] = {
    ".jsonl": read_lines, ".json": read_json, ".csv": read_table, ".tsv": read_table, ".parquet": read_parquet,
}  # fmt: skip


def parse_line(raw: bytes, *, source: str) -> Any:
    """Return the value of a line; raises DataError."""
    if len(raw) > MAX_LINE:
        raise DataError(
            f"{source}: a line of more than {MAX_LINE} bytes", code="E211", expected="one JSON object per line"
        )
    text = to_text(raw.rstrip(), source=source)
    with json_faults(source):
        return json.loads(text, object_pairs_hook=each_once)


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object; raises KeyError where a key stands in it twice, as nobody knows which of them is meant."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise KeyError(next(key for key in found if keys.count(key) > 1))
    return found


def to_text(raw: bytes, *, source: str) -> str:
    """Return bytes as text; raises DataError."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{source}: not UTF-8 at byte {error.start}", code="E211", fix="save the file as UTF-8"
        ) from None


def unended(source: str) -> DataError:
    """Return the error for a file that ends within its array; source: where the last value begins."""
    what = f"{source}: not JSON: the array does not end"
    return DataError(what, code="E211", expected="a ] behind the last object", fix="is the file whole? write it again")


@contextmanager
def json_faults(source: str, *, array: bool = False) -> Iterator[None]:
    """Raise DataError under the place's name for what is not JSON; array: of a file that holds one, not a line."""
    try:
        yield
    except json.JSONDecodeError as error:
        if array and (error.msg.startswith("Unterminated") or not error.doc[error.pos :].strip()):
            raise unended(source) from None
        near = error.doc[max(error.pos - 15, 0) : error.pos + 15].strip()
        raise DataError(
            f"{source}: not JSON: {error.msg.removesuffix(' at')} at column {error.colno}, near {near!r}",
            code="E211",
            expected="an array of JSON objects" if array else "one JSON object per line",
            fix=json_advice(error.doc, error.pos),
        ) from None
    except KeyError as error:
        raise DataError(f'{source}: the key "{error.args[0]}" stands twice', fix="remove one of them") from None
    except RecursionError:
        raise DataError(f"{source}: nested too deeply", code="E211", expected="a flat object") from None
    except ValueError:  # Python reads no integer of more than 4300 digits
        raise DataError(f"{source}: a number that is too long to read", code="E211", expected="texts") from None


def json_advice(text: str, at: int) -> str | None:
    """Return what to do about the commonest ways in which a text is not JSON, None where it is none of them.

    >>> json_advice('{"a": 1,}', 8)
    'remove the comma before }'
    """
    before, behind = text[:at].rstrip(), text[at:].lstrip()
    if before.endswith(",") and behind[:1] in ("}", "]"):
        return f"remove the comma before {behind[0]}"
    if behind.startswith(",") and behind[1:2] in ("}", "]"):  # newer Pythons point at the comma
        return f"remove the comma before {behind[1]}"
    if behind == "," and "\n" not in text:
        return "remove the comma at the end: rows are lines, with nothing between them"
    if behind.startswith("{") and before.endswith("}"):
        return "a line for each object" if "\n" not in text else "a comma between the objects"
    if behind.startswith("'"):
        return "JSON has double quotes; Python's json.dumps writes them"
    if before.startswith("[") and not behind:
        return ARRAY
    if before == "{" and not behind:
        return "write every row on one line, or all rows as an array into a .json file"
    return None
