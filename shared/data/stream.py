"""Training rows that are read and tokenized when an update takes them: the same rows and tokens as in memory.

An epoch's order is the same permutation as ever, a function of (seed, epoch), and an index finds any row by its number.
So a run that streams is the run that does not, bit for bit, and a resume needs to know nothing but the update's number.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np

from shared.data.cache import digest_of, tokenizer_files
from shared.data.index import Index, Part, open_index, stamp
from shared.data.rows import Row, content_hash, find_data, no_rows, split_files
from shared.data.sources import Weights, all_parted, check_valid, label, name_sources, read
from shared.data.tokenize import ROWS_AT_ONCE, Tokenizer, tokenize_row, tokenize_rows
from shared.errors import ConfigError, ModelError
from shared.types import Example

if TYPE_CHECKING:
    from shared.config import DataConfig, RunConfig  # pydantic, which a plain script on a GPU server may lack

STREAM_BYTES = 10**9  # of the training files together: in memory, rows and tokens take several times that
EVEN = 200  # rows of a sample, besides the longest


@dataclass(frozen=True)
class Encoding:
    """How rows become examples."""

    tokenizer: Tokenizer
    train_on: str
    max_length: int
    vocabulary: int | None  # ids from here on have no embedding; None: not known


class Stream(Sequence[Example]):
    """The training examples, each made when it is asked for; raises DataError or ModelError with file:line then."""

    def __init__(self, index: Index, encoding: Encoding) -> None:
        self.rows, self.encoding = index, encoding

    def __len__(self) -> int:
        return self.rows.num_train

    @overload
    def __getitem__(self, at: int) -> Example: ...
    @overload
    def __getitem__(self, at: slice) -> list[Example]: ...
    def __getitem__(self, at: int | slice) -> Example | list[Example]:
        if isinstance(at, slice):
            return [self[number] for number in range(*at.indices(len(self)))]
        if not -len(self) <= at < len(self):
            raise IndexError(at)
        how = self.encoding
        row = self.rows.row(int(at) % len(self))
        example = tokenize_row(row, how.tokenizer, train_on=how.train_on, max_length=how.max_length)
        check_ids(example, how.vocabulary, folder=how.tokenizer.folder)
        return example

    def __iter__(self) -> Iterator[Example]:
        """Yield all examples in order, some thousand tokenized together."""
        how = self.encoding
        for start in range(0, len(self), ROWS_AT_ONCE):
            rows = [self.rows.row(number) for number in range(start, min(start + ROWS_AT_ONCE, len(self)))]
            for example in tokenize_rows(rows, how.tokenizer, train_on=how.train_on, max_length=how.max_length):
                check_ids(example, how.vocabulary, folder=how.tokenizer.folder)
                yield example

    @cached_property
    def sample(self) -> list[Example]:
        """Return some of the examples: an even choice, and those of the longest rows."""
        return [self[number] for number in dict.fromkeys([*self.even, *self.rows.found.longest])]

    @property
    def even(self) -> list[int]:
        """Return the numbers of an even choice of rows."""
        return np.linspace(0, len(self) - 1, min(EVEN, len(self)), dtype=int).tolist()

    @property
    def sample_rows(self) -> list[Row]:
        """Return an even choice of the rows."""
        return [self.rows.row(number) for number in self.even]

    def digest(self, weights: Weights) -> str:
        """Return the SHA-256 of the files, what is taken of them, the tokenizer's files, and the sample's tokens."""
        found, folder = self.rows.found, self.encoding.tokenizer.folder
        makers = [[file.name, digest_of(file)] for file in tokenizer_files(folder)]  # rows beyond the sample tell too
        facts = [list(found.sha256.values()), found.counts, found.num_valid, found.empty, weights, makers]
        digest = hashlib.sha256(json.dumps(facts).encode())
        for example in self.sample:
            digest.update(example.tokens.tobytes() + example.supervised.tobytes())
        return digest.hexdigest()


def check_ids(example: Example, vocabulary: int | None, *, folder: Path) -> None:
    """Raise ModelError where an example has an id that the model has no embedding for."""
    largest = int(example.tokens.max())
    if vocabulary is not None and largest >= vocabulary:
        raise ModelError(
            f"{folder}: the tokenizer gives id {largest} ({example.source}), the model has {vocabulary}",
            code="E307",
            fix="model and tokenizer must belong together; download the folder again",
        )


def sample_of(examples: Sequence[Example]) -> Sequence[Example]:
    """Return examples, some of them where they are not in memory: for lengths, never for the loss."""
    return examples.sample if isinstance(examples, Stream) else examples


def source_of(examples: Sequence[Example], number: int) -> str:
    """Return where an example stands, "train.jsonl:3", without making it."""
    return examples.rows.source(number) if isinstance(examples, Stream) else examples[number].source


@dataclass(frozen=True)
class Streamed:
    """The rows of both splits where those to train on stay in their files."""

    index: Index
    valid: list[Row]
    roots: tuple[Path, ...]
    files: dict[str, Path]
    dropped: dict[str, int]


def against_streaming(config: RunConfig) -> str | None:
    """Return the setting that needs all rows before the first update, and why; None: nothing does."""
    if config.train.compile is True:
        return "train.compile true: its shapes come from the lengths of all rows"
    if "duplicate" in config.data.drop:
        return "data.drop duplicate: every row would have to be remembered"
    if "too_long" in config.data.drop:
        return "data.drop too_long: every row would have to be tokenized first"
    return None


def streams(config: RunConfig, *, least: int = STREAM_BYTES) -> bool:
    """Return whether training rows are to be streamed; raises ConfigError where they cannot be but are to.

    least: bytes from which on files are streamed where the config says auto.
    """
    data, against = config.data, against_streaming(config)
    if data.streaming is True and against is not None:
        raise ConfigError(f"data.streaming true with {against}", fix="set data.streaming: false", code="E204")
    if data.streaming is False or against is not None:
        return False
    files = train_files(data)
    other = file_without_lines(files)
    if other is not None and data.streaming is True:
        raise ConfigError(
            f"data.streaming true, but {other.name} has no lines to be read one by one",
            expected=".jsonl", fix="write the rows as .jsonl, or set data.streaming: false", code="E204",
        )  # fmt: skip
    return other is None and (data.streaming is True or num_bytes(files) >= least)


def told_first(config: RunConfig, *, least: int = STREAM_BYTES) -> str | None:
    """Return how many rows are read, and why so, for files that take minutes or much memory; None for smaller ones.

    least: bytes from which on it is told.
    """
    files = train_files(config.data)
    if (size := num_bytes(files)) < least:
        return None
    amount = f"{size / 1e9:.1f} GB of training rows"
    if streams(config, least=least):
        return f"{amount} are streamed; each is checked once before the first update, which the next run need not do"
    other = file_without_lines(files)
    why = f"{other.name} has no lines to be read one by one" if other else "data.streaming false"
    return f"{amount} are read into memory: {against_streaming(config) or why}"


def num_bytes(files: Sequence[Path]) -> int:
    """Return the bytes of all files."""
    return sum(file.stat().st_size for file in files)


def can_stream(data: DataConfig, roots: Sequence[Path]) -> bool:
    """Return whether the rows of sources found there can be streamed, and are the same then as in memory."""
    return not {"duplicate", "too_long"} & set(data.drop) and file_without_lines(train_files(data, roots)) is None


def train_files(data: DataConfig, roots: Sequence[Path] | None = None) -> list[Path]:
    """Return the files of all sources' training rows; raises DataError where there is none.

    roots: where the sources are; None: to be found, for which the hub is asked.
    """
    found = [find_data(source.path) for source in data.sources] if roots is None else roots
    return [file for root in found for file in split_files(root, "train", names=data.splits)]


def file_without_lines(files: Sequence[Path]) -> Path | None:
    """Return the first file that is not read line by line."""
    return next((file for file in files if file.suffix != ".jsonl"), None)


def open_stream(
    data: DataConfig, *, valid_too: bool = True, most_valid: int | None = None, held_out: Collection[str] = ()
) -> Streamed:
    """Return where the rows are that a config names, all of them checked; raises DataError with file:line.

    most_valid: rows to evaluate on that are wanted at most. held_out: hashes of others, to tell which are trained on.
    """
    valid: list[Row] = []
    parts: list[Part] = []
    files: dict[str, Path] = {}
    dropped: dict[str, int] = dict.fromkeys(data.drop, 0)
    roots = tuple(find_data(source.path) for source in data.sources)
    for number, (root, prefix) in enumerate(zip(roots, name_sources(roots), strict=True)):
        for split in ("train", "valid") if valid_too else ("train",):
            found = split_files(root, split, names=data.splits)
            check_valid(found, split, data)
            files |= {prefix + label(file, root): file for file in found}
            if split == "train":
                parts += [Part(file, number, prefix, prefix + label(file, root), stamp(file.stat())) for file in found]
            elif found:
                valid += some(read(found, data, dropped, prefix=prefix), found[0], prefix)
    index = open_index(parts, data, valid={*held_out, *(content_hash([row]) for row in valid)})
    check_counts(index, data, roots)
    if "empty" in dropped:
        dropped["empty"] += index.found.empty
    parted = range(index.num_train, index.num_train + index.found.num_valid)
    valid += [index.row(number) for number in (parted[:most_valid] if valid_too else ())]
    return Streamed(index, valid, roots, files, dropped)


def some(rows: Iterator[Row], file: Path, prefix: str) -> list[Row]:
    """Return rows; raises DataError where there are none."""
    found = list(rows)
    if not found:
        raise no_rows(file, prefix=prefix)
    return found


def check_counts(index: Index, data: DataConfig, roots: Sequence[Path]) -> None:
    """Raise DataError for a source that has no row to train on."""
    for root, count in zip(roots, index.found.counts, strict=True):
        if count == 0 and data.valid_split is not None:
            raise all_parted(root)
        if count == 0:
            raise no_rows(root, dropped=index.found.empty)
