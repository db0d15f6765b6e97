"""Where every row of files lies that are larger than memory: one pass that checks each row and keeps 18 bytes of it.

The index is a file: entries of the training rows, source by source, then of the rows parted off to evaluate on. It is
kept between runs under the files' names, sizes and times; what the pass found out stands beside it as JSON.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
import shutil
import struct
import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Lock
from typing import IO, TYPE_CHECKING, Any

from shared.data.cache import cache_folder, digest_of, shrink
from shared.data.formats import is_blank_line, parse_line, raw_lines, readable, unreadable
from shared.data.rows import Kind, Row, content_hash, make_row
from shared.data.sources import is_empty, is_parted
from shared.durable import write_whole
from shared.errors import DataError, StorageError

if TYPE_CHECKING:
    from shared.config import DataConfig  # pydantic, which a plain script on a GPU server may lack

ENTRY = struct.Struct("<QIIH")  # first byte, bytes, line from 1, number of the file
MAX_BYTES = 8 * 2**30  # of all indexes together, but for a new one; above it those used longest ago go
KEPT = "rows"  # the folder of the cache
MOST_OPEN = 64  # files: a process on a Mac may have 256 open
STALE_S = 3600  # since a process that writes an index wrote last: it was killed
LONGEST = 200  # rows whose numbers are kept: the estimate of memory asks for them
CODE = ("dialects.py", "formats.py", "index.py", "rows.py", "sources.py")  # what decides which rows there are


@dataclass(frozen=True)
class Part:
    """One file of a source: the name it has in errors, and in the manifest."""

    path: Path
    source: int  # number of its source
    prefix: str  # "folder/" where there are several sources
    label: str
    stamp: list[int]  # of the file before it is read


@dataclass
class Found:
    """What one pass over the files found."""

    counts: list[int]  # training rows of each source
    num_valid: int = 0  # rows parted off
    kind: Kind = "text"  # of the first row
    empty: int = 0  # rows left out because they have nothing to learn
    leaks: list[str] = field(default_factory=list[str])  # hashes of validation rows that are training rows too
    longest: list[int] = field(default_factory=list[int])  # numbers of the training rows with the most bytes
    sha256: dict[str, str] = field(default_factory=dict[str, str])  # label -> of the file


class Files:
    """Files by number, of which those used last are open; safe to use from several threads."""

    def __init__(self, paths: Sequence[Path], stamps: Sequence[list[int]]) -> None:
        self.paths, self.stamps = paths, stamps
        self.opened: OrderedDict[int, int] = OrderedDict()  # number -> descriptor, the one used last at the end
        self.lock = Lock()

    def __del__(self) -> None:
        for one in self.opened.values():
            os.close(one)

    def read(self, number: int, *, start: int, length: int) -> bytes:
        """Return bytes of a file; raises DataError where it is not what it was, or is gone."""
        path = self.paths[number]
        try:
            with self.lock:
                one = self.descriptor(number)
                same = stamp(os.fstat(one)) == self.stamps[number]
                raw = os.pread(one, length, start)
        except OSError as error:
            raise unreadable(path, error) from None
        if not same:
            raise changed(path)
        return raw

    def descriptor(self, number: int) -> int:
        """Return a file's descriptor; of MOST_OPEN files the one used longest ago is closed for another."""
        if number not in self.opened:
            while len(self.opened) >= MOST_OPEN:
                os.close(self.opened.popitem(last=False)[1])
            self.opened[number] = os.open(self.paths[number], os.O_RDONLY)
        self.opened.move_to_end(number)
        return self.opened[number]


class Index:
    """Rows by number, read from their files when they are asked for; takes no memory for those that are not.

    Raises DataError where a file is not the one that was indexed. Safe to use from several threads.
    """

    def __init__(self, file: Path, parts: Sequence[Part], found: Found, columns: Mapping[Any, str]) -> None:
        self.parts, self.found, self.columns = parts, found, columns
        self.entries = os.open(file, os.O_RDONLY)
        self.files = Files([part.path for part in parts], [part.stamp for part in parts])
        self.num_train = sum(found.counts)

    def __del__(self) -> None:
        os.close(self.entries)

    def place(self, number: int) -> tuple[int, int, int, int]:
        """Return first byte, length, line and file of a row; those parted off follow the training rows."""
        return ENTRY.unpack(os.pread(self.entries, ENTRY.size, number * ENTRY.size))

    def source(self, number: int) -> str:
        """Return where a row stands, "train.jsonl:3"."""
        _, _, line, file = self.place(number)
        return f"{self.parts[file].prefix}{self.parts[file].path.name}:{line}"

    def row(self, number: int) -> Row:
        """Return a row as the pass over the files saw it."""
        start, length, _, file = self.place(number)
        source, raw = self.source(number), self.files.read(file, start=start, length=length)
        return make_row(parse_line(raw, source=source), source=source, columns=self.columns)


def changed(path: Path) -> DataError:
    """Return the error for a file that is another one than the run began with."""
    fix = "let nothing write to it, and run the command again"
    return DataError(f"{path} was changed while the run reads it", code="E211", fix=fix)


def stamp(status: os.stat_result) -> list[int]:
    """Return what changes with a file's content."""
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def open_index(parts: Sequence[Part], data: DataConfig, *, valid: set[str]) -> Index:
    """Return the index of files, made where none is kept; raises DataError with file:line.

    valid: hashes of the validation rows, to tell which of them are training rows too.
    """
    folder = index_folder(data)
    try:
        return find_index(folder, parts, data, valid)
    finally:
        if folder.name != KEPT:  # temporary: the cache is off, or cannot be used
            shutil.rmtree(folder, ignore_errors=True)


def find_index(folder: Path, parts: Sequence[Part], data: DataConfig, valid: set[str]) -> Index:
    """Return the index that a folder has of files, made where it has none."""
    key = make_key(parts, data, valid)
    rows, facts = folder / f"{key}.rows", folder / f"{key}.json"
    try:
        found = Found(**json.loads(facts.read_bytes()))
        if rows.stat().st_size != ENTRY.size * (sum(found.counts) + found.num_valid):
            raise ValueError("cut off")
        os.utime(rows)  # used now: the last to go
        os.utime(facts)
    except (OSError, ValueError, TypeError):
        found = make_index(rows, facts, parts, data, valid)
    return Index(rows, parts, found, data.columns)


def index_folder(data: DataConfig) -> Path:
    """Return where the index lies: the cache, or a folder that is gone as soon as the index is open."""
    if data.cache:
        with suppress(OSError, RuntimeError):
            folder = cache_folder() / KEPT
            folder.mkdir(parents=True, exist_ok=True)
            return folder
    return Path(tempfile.mkdtemp(prefix="mlxlora-rows-"))


def make_key(parts: Sequence[Part], data: DataConfig, valid: set[str]) -> str:
    """Return the SHA-256 of all that decides an index; of files their name, size and time, as their content is long."""
    facts = {
        "parts": [[str(one.path.resolve()), one.source, one.prefix, *one.stamp] for one in parts],
        "settings": [sorted(data.columns.items()), sorted(data.drop), data.valid_split],
        "valid": sorted(valid),
        "code": [digest_of(Path(__file__).with_name(name)) for name in CODE],
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def make_index(rows: Path, facts: Path, parts: Sequence[Part], data: DataConfig, valid: set[str]) -> Found:
    """Write an index and its facts, the facts last, and return them; raises StorageError where the disk refuses."""
    staged = rows.with_suffix(f".{os.getpid()}.tmp")
    try:
        remove_stale(rows.parent)
        shrink(rows.parent, most=MAX_BYTES)  # before: behind it, an index larger than that would be the first to go
        with staged.open("wb") as out:
            found = scan(out, parts, data, valid)
        os.replace(staged, rows)
        write_whole(facts, json.dumps(asdict(found)))
    except OSError as error:
        raise StorageError(
            f"cannot write the index of the rows in {rows.parent}: {error.strerror}", fix="free some space"
        ) from None
    finally:
        staged.unlink(missing_ok=True)
    return found


def remove_stale(folder: Path) -> None:
    """Remove what killed processes have left of the indexes they wrote; raises OSError."""
    for file in folder.glob("*.tmp"):
        with suppress(FileNotFoundError):
            if time.time() - file.stat().st_mtime > STALE_S:
                file.unlink()


def scan(out: IO[bytes], parts: Sequence[Part], data: DataConfig, valid: set[str]) -> Found:
    """Write the entries of every row of files and return what was found; raises DataError with file:line."""
    found = Found([0] * (1 + max(part.source for part in parts)))
    parted, longest, leaks = bytearray(), list[tuple[int, int]](), set[str]()
    hashing, number = bool(valid) or data.valid_split is not None, 0
    for file, part in enumerate(parts):
        for start, raw, line in lines_of(part, found):
            source = f"{part.prefix}{part.path.name}:{line}"
            value = parse_line(raw, source=source)
            if "empty" in data.drop and isinstance(value, dict) and is_empty(value, source, data):
                found.empty += 1
                continue
            row = make_row(value, source=source, columns=data.columns)
            key = content_hash([row]) if hashing else ""
            entry = ENTRY.pack(start, len(raw), line, file)
            if data.valid_split is not None and is_parted(key, data.valid_split):
                parted += entry
                continue
            if key in valid:
                leaks.add(key)
            found.kind = row.kind if number == 0 else found.kind
            out.write(entry)
            found.counts[part.source] += 1
            if len(longest) < LONGEST or len(raw) > longest[0][0]:
                (heapq.heappush if len(longest) < LONGEST else heapq.heapreplace)(longest, (len(raw), number))
            number += 1
    out.write(parted)
    found.num_valid = len(parted) // ENTRY.size
    found.leaks, found.longest = sorted(leaks), sorted(number for _, number in longest)
    return found


def lines_of(part: Part, found: Found) -> Iterator[tuple[int, bytes, int]]:
    """Yield first byte, bytes and number of every line that is not blank; note the file's SHA-256. Raises DataError."""
    digest, start = hashlib.sha256(), 0
    with readable(part.path), part.path.open("rb", buffering=2**20) as stream:
        for line, raw in enumerate(raw_lines(stream), start=1):
            digest.update(raw)
            if not is_blank_line(raw):
                yield start, raw, line
            start += len(raw)
        same = stamp(os.fstat(stream.fileno())) == part.stamp
    if not same:
        raise changed(part.path)
    found.sha256[part.label] = digest.hexdigest()
