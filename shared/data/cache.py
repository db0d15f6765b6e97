"""Tokenized rows, kept between runs under a hash of all that decides them.

A file holds the examples of some rows: SHA-256 of what follows, then lengths, token ids and supervised bits. A file
that is absent, damaged, or cannot be written costs time, never correctness: the rows are tokenized again.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import numpy as np

from shared.data.rows import Row
from shared.durable import write_whole
from shared.types import Example

FORMAT = b"mlxlora tokens 1"  # of the file; a new one is never taken for an old one
DIGEST = hashlib.sha256().digest_size
MAX_BYTES = 2 * 2**30  # some 400 million tokens; above it the files used longest ago go
CODE = ("rows.py", "template.py", "tokenize.py", "tokenizer_class.py")  # what makes tokens here: a change is a miss
LIBRARIES = ("transformers", "tokenizers", "jinja2")
TEXTS = (".json", ".jinja", ".model", ".tiktoken", ".txt")  # what a tokenizer reads in a model folder
FOLDER = "MLXLORA_CACHE"


def cache_folder() -> Path:
    """Return where files live: $MLXLORA_CACHE, else the system's place for caches of a user."""
    if os.environ.get(FOLDER):
        return Path(os.environ[FOLDER]).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mlxlora"
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if os.path.isabs(root) else Path.home() / ".cache") / "mlxlora"


def tokenize_cached(
    rows: Sequence[Row], *, model: Path, train_on: str, max_length: int, make: Callable[[], list[Example]]
) -> list[Example]:
    """Return the examples of rows for a model folder: from the cache, else what `make` returns, kept for next time.

    What `make` raises is not kept.
    """
    file, found = None, None
    try:
        file = cache_folder() / "tokens" / make_key(rows, model, train_on=train_on, max_length=max_length)
        found = read(file, rows)
    except (OSError, ValueError, ImportError, RuntimeError):  # no home, say, or a library without its metadata
        pass
    if found is None:
        found = make()
        if file is not None and found:
            keep(file, found)
    return found


def make_key(rows: Sequence[Row], folder: Path, *, train_on: str, max_length: int) -> str:
    """Return the SHA-256 of all that decides tokens: rows in order, tokenizer, template, settings, versions."""
    facts = {
        "train_on": train_on,
        "max_length": max_length,
        "code": [digest_of(Path(__file__).with_name(name)) for name in CODE],
        "versions": [version(name) for name in LIBRARIES],
        "folder": {str(file.relative_to(folder)): digest_of(file) for file in tokenizer_files(folder)},
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for row in rows:  # keys as they stand: a template may print an object's keys in their order
        digest.update(json.dumps([row.kind, row.fields], ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def tokenizer_files(folder: Path) -> list[Path]:
    """Return a model folder's files but for its weights."""
    found = [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]
    return sorted(file for file in found if file.suffix in TEXTS and ".safetensors" not in file.name)


def digest_of(file: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def to_bytes(examples: Sequence[Example]) -> bytes:
    """Return examples as a file holds them, without their checksum."""
    lengths = np.array([len(example.tokens) for example in examples], dtype="<i8")
    tokens = np.concatenate([example.tokens for example in examples]).astype("<i4")
    supervised = np.packbits(np.concatenate([example.supervised for example in examples]))
    return FORMAT + lengths.tobytes() + tokens.tobytes() + supervised.tobytes()


def from_bytes(data: memoryview, rows: Sequence[Row]) -> list[Example]:
    """Return the examples that `to_bytes` wrote for these rows; raises ValueError."""
    at = len(FORMAT)
    lengths = np.frombuffer(data, dtype="<i8", count=len(rows), offset=at)
    total, at = int(lengths.sum()), at + lengths.nbytes
    tokens = np.frombuffer(data, dtype="<i4", count=total, offset=at).astype(np.int32)
    bits = np.frombuffer(data, dtype=np.uint8, offset=at + tokens.nbytes)
    supervised = np.unpackbits(bits, count=total).astype(bool)
    ends = np.cumsum(lengths)
    return [
        Example(tokens[end - length : end], supervised[end - length : end], row.source)
        for row, length, end in zip(rows, lengths.tolist(), ends.tolist(), strict=True)
    ]


def read(file: Path, rows: Sequence[Row]) -> list[Example] | None:
    """Return what a file holds, None where it is absent or damaged; raises OSError or ValueError likewise."""
    if not file.is_file():
        return None
    raw = memoryview(file.read_bytes())
    data = raw[DIGEST:]
    if hashlib.sha256(data).digest() != raw[:DIGEST] or data[: len(FORMAT)] != FORMAT:
        return None
    found = from_bytes(data, rows)
    with suppress(OSError):
        os.utime(file)  # used now: the last to go
    return found


def keep(file: Path, examples: Sequence[Example]) -> None:
    """Write a file whole or not at all, and remove those used longest ago beyond the bound; never raises OSError."""
    data = to_bytes(examples)
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, hashlib.sha256(data).digest() + data)
        shrink(file.parent, most=MAX_BYTES)


def shrink(folder: Path, *, most: int) -> None:
    """Remove the files used longest ago until at most `most` bytes are left."""
    found: list[tuple[float, int, Path]] = []
    for file in folder.iterdir():
        with suppress(FileNotFoundError):  # another process has renamed or removed it meanwhile
            found.append((file.stat().st_mtime, file.stat().st_size, file))
    total = 0
    for _, size, file in sorted(found, reverse=True):
        total += size
        if total > most:
            file.unlink(missing_ok=True)
