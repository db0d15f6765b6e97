"""What a run needs before its model is loaded: the base's headers, the rows, the tokenizer, all of it checked."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from shared.config import DataConfig, RunConfig
from shared.data.batch import Plan
from shared.data.cache import tokenize_cached
from shared.data.notices import Notice, notices_of, sample_rows
from shared.data.rows import Row, content_hash
from shared.data.sources import Weights, drop_long, load_rows, num_drawn, weigh
from shared.data.stream import Encoding, Stream, can_stream, check_ids, open_stream, streams
from shared.data.tokenize import Tokenizer, tokenize_rows
from shared.evaluating.exams import Exam
from shared.evaluating.held_out import (
    HeldOut,
    count_leaks,
    hashes_of,
    keep_short,
    load_sets,
    make_exam,
    most_rows,
    pinned_sets,
    with_valid,
)
from shared.folder import ModelFolder, find_folder, open_folder, sha256
from shared.hub import pinned
from shared.schemes import parse_scheme
from shared.types import Example


@dataclass(frozen=True)
class Prepared:
    """Everything a run needs that can be checked before the model is loaded."""

    config: RunConfig
    base: ModelFolder
    tokenizer: Tokenizer
    train: Sequence[Example]  # a list, or a Stream
    valid: list[Example]
    sets: dict[str, list[Example]]  # of evaluation.sets
    exam: Exam | None
    plan: Plan
    dropped: dict[str, int]  # why -> rows that the config leaves out
    kind: str  # of the first row: text, prompt or messages
    data_hash: str
    other_hash: Callable[[], str] | None  # of the same rows read the other way (data.streaming), None: not possible
    data_files: dict[str, str]
    leaks: dict[str, int]  # rows to evaluate on that are training rows too: "valid.jsonl" or a set's name -> how many
    samples: tuple[Sample, ...]  # of the training rows, then of those to evaluate on

    @cached_property
    def notices(self) -> list[Notice]:
        """Return what is to be told of the training rows, and of others what is not true of these."""
        told: dict[str, Notice] = {}
        for some in self.samples:
            for notice in notices_of(some.rows, self.tokenizer, total=some.total, keep=self.config.data.cache):
                told.setdefault(notice.about, notice)
        return list(told.values())


@dataclass(frozen=True)
class Sample:
    """Some rows, and how many there are."""

    rows: list[Row]
    total: int


@dataclass(frozen=True)
class Found:
    """The rows of a run, whichever way they are read."""

    train: Sequence[Example]
    tests: dict[str, list[Example]]  # "" of the valid split, and those of evaluation.sets
    held_out: HeldOut
    counts: tuple[int, ...]  # training rows of each source
    roots: tuple[Path, ...]
    dropped: dict[str, int]
    kind: str
    hashes: dict[str, str]  # file -> SHA-256
    seen: set[str]  # hashes of training rows, of those at least that are evaluated on too
    sample: Sample  # of the training rows


def prepare(config: RunConfig) -> Prepared:
    """Read and check everything small: the base's headers, the rows, the tokenizer.

    Streamed training rows are checked now too, but stay in their files and are tokenized when they are due.
    """
    parse_scheme(config.quantization)
    read = read_streamed if streams(config) else read_whole
    base = open_folder(find_folder(config.model))
    tokenizer = Tokenizer(base.path)
    found = read(config, base, tokenizer)
    weights, tests = weigh(config.data.sources, found.counts), dict(found.tests)
    left_out = {why: count + found.held_out.dropped.get(why, 0) for why, count in found.dropped.items()}
    return Prepared(
        config=pin(config, found.held_out, model=base.path, data=found.roots),
        base=base,
        tokenizer=tokenizer,
        train=found.train,
        valid=tests.pop("", []),
        sets=tests,
        exam=make_exam(found.held_out, tokenizer, config),
        plan=Plan(sum(num_drawn(weights)) or len(found.train), config.train.batch_size, config.train.seed, weights),
        dropped=left_out,
        kind=found.kind,
        data_hash=hash_of(found.train, weights),
        other_hash=hash_otherwise(found, weights, config, base),
        data_files=found.hashes,
        leaks=count_leaks(found.held_out, found.seen),
        samples=(
            found.sample,
            *(Sample(sample_rows(rows), len(rows)) for rows in found.held_out.rows.values() if rows),
        ),
    )


def read_whole(config: RunConfig, base: ModelFolder, tokenizer: Tokenizer) -> Found:
    """Return all rows of a run, tokenized."""
    found = load_rows(config.data, valid_too=config.evaluation.every is not None)
    held_out = with_valid(load_sets(config), found.valid, config)
    train, counts, dropped = make_examples(found.train, tokenizer, config.data), found.counts, found.dropped
    tests = {name: make_examples(rows, tokenizer, config.data) for name, rows in held_out.rows.items() if rows}
    if "too_long" in dropped:
        whole, most = len(train) + sum(map(len, tests.values())), config.data.max_length
        train, counts = drop_long(train, counts, most=most)
        tests = keep_short(held_out, tests, most=most)
        dropped = {**dropped, "too_long": whole - len(train) - sum(map(len, tests.values()))}
    check_vocabulary(base, [*train, *chain(*tests.values())])
    seen = {content_hash([row]) for row in found.train} if any(held_out.rows.values()) else set[str]()
    hashes = {name: sha256(file) for name, file in {**found.files, **held_out.files}.items()}
    some, kind = Sample(sample_rows(found.train), len(found.train)), found.train[0].kind
    return Found(train, tests, held_out, counts, found.roots, dropped, kind, hashes, seen, some)


def read_streamed(config: RunConfig, base: ModelFolder, tokenizer: Tokenizer) -> Found:
    """Return the training rows of a run where they stand, and those to evaluate on, tokenized."""
    sets = load_sets(config)
    valid_too = config.evaluation.every is not None
    rows = open_stream(config.data, valid_too=valid_too, most_valid=most_rows(config), held_out=hashes_of(sets))
    held_out, seen = with_valid(sets, rows.valid, config), rows.index.found
    train = Stream(rows.index, encoding(config, base, tokenizer))
    tests = {name: make_examples(some, tokenizer, config.data) for name, some in held_out.rows.items() if some}
    if tests:
        check_vocabulary(base, list(chain(*tests.values())))
    hashes = {name: seen.sha256.get(name) or sha256(file) for name, file in {**rows.files, **held_out.files}.items()}
    counts, leaks = tuple(seen.counts), set(seen.leaks)
    some = Sample(train.sample_rows, len(train))
    return Found(train, tests, held_out, counts, rows.roots, rows.dropped, seen.kind, hashes, leaks, some)


def encoding(config: RunConfig, base: ModelFolder, tokenizer: Tokenizer) -> Encoding:
    """Return how streamed rows become examples."""
    return Encoding(tokenizer, config.data.train_on, config.data.max_length, vocabulary_of(base))


def hash_of(train: Sequence[Example], weights: Weights) -> str:
    """Return the SHA-256 by which a resume knows its training rows."""
    return train.digest(weights) if isinstance(train, Stream) else examples_hash(train, weights)


def hash_otherwise(found: Found, weights: Weights, config: RunConfig, base: ModelFolder) -> Callable[[], str] | None:
    """Return what `hash_of` gives where `data.streaming` is the other way; it reads all rows. None: there is no way."""
    if isinstance(train := found.train, Stream):
        return lambda: examples_hash(train, weights)
    if not can_stream(config.data, found.roots):
        return None

    def stream_hash() -> str:
        index = open_stream(config.data, valid_too=False).index
        return Stream(index, encoding(config, base, Tokenizer(base.path))).digest(weights)

    return stream_hash


def pin(config: RunConfig, held_out: HeldOut, *, model: Path, data: Sequence[Path]) -> RunConfig:
    """Return the config with the commits of what came from the hub: org/name@commit."""
    pairs = zip(config.data.sources, data, strict=True)
    sources = [source.model_copy(update={"path": pinned(source.path, root)}) for source, root in pairs]
    evaluation = config.evaluation.model_copy(update={"sets": pinned_sets(config, held_out)})
    data_section = config.data.with_sources(sources)
    return config.model_copy(
        update={"model": pinned(config.model, model), "data": data_section, "evaluation": evaluation}
    )


def make_examples(rows: list[Row], tokenizer: Tokenizer, data: DataConfig) -> list[Example]:
    """Return the rows' examples, from the cache where it has them; then the tokenizer is not even loaded."""
    most = sys.maxsize if "too_long" in data.drop else data.max_length
    options: dict[str, Any] = {"train_on": data.train_on, "max_length": most}

    def make() -> list[Example]:
        return tokenize_rows(rows, tokenizer, **options)

    return tokenize_cached(rows, model=tokenizer.folder, make=make, **options) if data.cache else make()


def check_vocabulary(base: ModelFolder, examples: Sequence[Example]) -> None:
    """Raise ModelError where the tokenizer makes ids that the model has no embedding for."""
    largest = max(examples, key=lambda example: int(example.tokens.max()))
    check_ids(largest, vocabulary_of(base), folder=base.path)


def vocabulary_of(base: ModelFolder) -> int | None:
    """Return how many embeddings a model has, None where its config does not say."""
    size = base.config.get("vocab_size")
    return size if isinstance(size, int) else None


def examples_hash(examples: Iterable[Example], weights: Weights) -> str:
    """Return the SHA-256 of all tokens and masks, in order: what rows, template and tokenizer make together."""
    digest = hashlib.sha256(repr(weights).encode() if weights else b"")
    for example in examples:
        digest.update(len(example.tokens).to_bytes(8, "little"))
        digest.update(example.tokens.tobytes() + example.supervised.tobytes())
    return digest.hexdigest()
