"""What a run needs before its model is loaded: the base's headers, the rows, the tokenizer, all of it checked."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.config import DataConfig, RunConfig, parse_scheme
from shared.data.batch import Plan
from shared.data.cache import tokenize_cached
from shared.data.rows import Row, content_hash
from shared.data.sources import Weights, drop_long, load_rows, num_drawn, weigh
from shared.data.stream import Encoding, Stream, check_ids, open_stream, streams
from shared.data.tokenize import Tokenizer, tokenize_rows
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
    plan: Plan
    dropped: dict[str, int]  # why -> rows that the config leaves out
    kind: str  # of the first row: text, prompt or messages
    data_hash: str
    data_files: dict[str, str]
    leaks: int  # validation rows that are training rows too


def prepare(config: RunConfig) -> Prepared:
    """Read and check everything small: the base's headers, the rows, the tokenizer."""
    parse_scheme(config.quantization)
    if streams(config):
        return prepare_stream(config)
    found = load_rows(config.data, valid_too=config.evaluation.every is not None)
    rows, valid_rows = found.train, found.valid if config.evaluation.every is not None else []
    if config.evaluation.batches != "all":
        valid_rows = valid_rows[: config.evaluation.batches * config.train.batch_size]
    seen = {content_hash([row]) for row in rows} if valid_rows else set()
    base = open_folder(find_folder(config.model))
    tokenizer = Tokenizer(base.path)
    train, valid = (make_examples(some, tokenizer, config.data) for some in (rows, valid_rows))
    counts, dropped = found.counts, found.dropped
    if "too_long" in dropped:
        whole = len(train) + len(valid)
        train, counts = drop_long(train, counts, most=config.data.max_length)
        valid, _ = drop_long(valid, (len(valid),), most=config.data.max_length)
        dropped = {**dropped, "too_long": whole - len(train) - len(valid)}
    weights = weigh(config.data.sources, counts)
    check_vocabulary(base, [*train, *valid])
    return Prepared(
        config=pin(config, model=base.path, data=found.roots),
        base=base,
        tokenizer=tokenizer,
        train=train,
        plan=Plan(sum(num_drawn(weights)) or len(train), config.train.batch_size, config.train.seed, weights),
        dropped=dropped,
        valid=valid,
        kind=rows[0].kind,
        data_hash=examples_hash(train, weights),
        data_files={name: sha256(file) for name, file in found.files.items()},
        leaks=sum(content_hash([row]) in seen for row in valid_rows),
    )


def prepare_stream(config: RunConfig) -> Prepared:
    """Do as `prepare`, but leave the training rows in their files: checked now, tokenized when they are due."""
    evaluates, batches = config.evaluation.every is not None, config.evaluation.batches
    most = None if batches == "all" else batches * config.train.batch_size
    found = open_stream(config.data, valid_too=evaluates, most_valid=most)
    base = open_folder(find_folder(config.model))
    tokenizer = Tokenizer(base.path)
    valid_rows = found.valid[:most]
    valid = make_examples(valid_rows, tokenizer, config.data) if valid_rows else []
    how = Encoding(tokenizer, config.data.train_on, config.data.max_length, vocabulary_of(base))
    train, seen = Stream(found.index, how), set(found.index.found.leaks)
    weights = weigh(config.data.sources, tuple(found.index.found.counts))
    if valid:
        check_vocabulary(base, valid)
    hashes = {name: sha256(file) for name, file in found.files.items() if name not in found.index.found.sha256}
    return Prepared(
        config=pin(config, model=base.path, data=found.roots),
        base=base,
        tokenizer=tokenizer,
        train=train,
        plan=Plan(sum(num_drawn(weights)) or len(train), config.train.batch_size, config.train.seed, weights),
        dropped=found.dropped,
        valid=valid,
        kind=found.index.found.kind,
        data_hash=train.digest(weights),
        data_files=hashes | found.index.found.sha256,
        leaks=sum(content_hash([row]) in seen for row in valid_rows),
    )


def pin(config: RunConfig, *, model: Path, data: Sequence[Path]) -> RunConfig:
    """Return the config with the commits of what came from the hub: org/name@commit."""
    pairs = zip(config.data.sources, data, strict=True)
    sources = [source.model_copy(update={"path": pinned(source.path, root)}) for source, root in pairs]
    return config.model_copy(update={"model": pinned(config.model, model), "data": config.data.with_sources(sources)})


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
