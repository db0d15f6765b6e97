"""What a run needs before its model is loaded: the base's headers, the rows, the tokenizer, all of it checked."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from shared.config import DataConfig, RunConfig, parse_scheme
from shared.data.batch import Plan
from shared.data.cache import tokenize_cached
from shared.data.rows import Row, content_hash
from shared.data.sources import Weights, drop_long, load_rows, num_drawn, weigh
from shared.data.stream import Encoding, Stream, check_ids, open_stream, streams
from shared.data.tokenize import Tokenizer, tokenize_rows
from shared.evaluating.exams import Exam
from shared.evaluating.held_out import HeldOut, count_leaks, keep_short, load_held_out, make_exam, pinned_sets
from shared.folder import ModelFolder, find_folder, open_folder, sha256
from shared.hub import pinned
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
    data_files: dict[str, str]
    leaks: dict[str, int]  # rows to evaluate on that are training rows too: "valid.jsonl" or a set's name -> how many


def prepare(config: RunConfig) -> Prepared:
    """Read and check everything small: the base's headers, the rows, the tokenizer."""
    parse_scheme(config.quantization)
    if streams(config):
        return prepare_stream(config)
    found = load_rows(config.data, valid_too=config.evaluation.every is not None)
    base = open_folder(find_folder(config.model))
    tokenizer = Tokenizer(base.path)
    counts, dropped = found.counts, found.dropped
    held_out = load_held_out(config, found.valid, dropped)
    train = make_examples(found.train, tokenizer, config.data)
    tests = {name: make_examples(rows, tokenizer, config.data) for name, rows in held_out.rows.items() if rows}
    if "too_long" in dropped:
        whole, most = len(train) + sum(map(len, tests.values())), config.data.max_length
        train, counts = drop_long(train, counts, most=most)
        tests = keep_short(held_out, tests, most=most)
        dropped = {**dropped, "too_long": whole - len(train) - sum(map(len, tests.values()))}
    weights = weigh(config.data.sources, counts)
    check_vocabulary(base, [*train, *chain(*tests.values())])
    seen = {content_hash([row]) for row in found.train} if any(held_out.rows.values()) else set[str]()
    return Prepared(
        config=pin(config, held_out, model=base.path, data=found.roots),
        base=base,
        tokenizer=tokenizer,
        train=train,
        plan=Plan(sum(num_drawn(weights)) or len(train), config.train.batch_size, config.train.seed, weights),
        dropped=dropped,
        valid=tests.pop("", []),
        sets=tests,
        exam=make_exam(held_out, tokenizer, config),
        kind=found.train[0].kind,
        data_hash=examples_hash(train, weights),
        data_files={name: sha256(file) for name, file in {**found.files, **held_out.files}.items()},
        leaks=count_leaks(held_out, seen),
    )


def prepare_stream(config: RunConfig) -> Prepared:
    """Do as `prepare`, but leave the training rows in their files: checked now, tokenized when they are due."""
    evaluates, batches = config.evaluation.every is not None, config.evaluation.batches
    most = None if batches == "all" else batches * config.train.batch_size
    found = open_stream(config.data, valid_too=evaluates, most_valid=most)
    base = open_folder(find_folder(config.model))
    tokenizer = Tokenizer(base.path)
    held_out = load_held_out(config, found.valid, found.dropped)
    tests = {name: make_examples(rows, tokenizer, config.data) for name, rows in held_out.rows.items() if rows}
    how = Encoding(tokenizer, config.data.train_on, config.data.max_length, vocabulary_of(base))
    train = Stream(found.index, how)
    weights = weigh(config.data.sources, tuple(found.index.found.counts))
    if tests:
        check_vocabulary(base, list(chain(*tests.values())))
    files = {**found.files, **held_out.files}
    hashes = {name: sha256(file) for name, file in files.items() if name not in found.index.found.sha256}
    return Prepared(
        config=pin(config, held_out, model=base.path, data=found.roots),
        base=base,
        tokenizer=tokenizer,
        train=train,
        plan=Plan(sum(num_drawn(weights)) or len(train), config.train.batch_size, config.train.seed, weights),
        dropped=found.dropped,
        valid=tests.pop("", []),
        sets=tests,
        exam=make_exam(held_out, tokenizer, config),
        kind=found.index.found.kind,
        data_hash=train.digest(weights),
        data_files=hashes | found.index.found.sha256,
        leaks=count_leaks(held_out, set(found.index.found.leaks)),
    )


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


def examples_hash(examples: Sequence[Example], weights: Weights) -> str:
    """Return the SHA-256 of all tokens and masks, in order: what rows, template and tokenizer make together."""
    digest = hashlib.sha256(repr(weights).encode() if weights else b"")
    for example in examples:
        digest.update(len(example.tokens).to_bytes(8, "little"))
        digest.update(example.tokens.tobytes() + example.supervised.tobytes())
    return digest.hexdigest()
