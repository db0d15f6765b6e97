"""`mlxlora preview`: what a run would learn from its rows, seen before it is run; loads no model."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from shared.config import DataConfig, RunConfig
from shared.data.batch import Plan, micro_batches
from shared.data.layout import GPU_MICRO_TOKENS, Layout
from shared.data.notices import notices_of, sample_rows
from shared.data.rows import Row, content_hash
from shared.data.sources import count_rows, drop_long, load_rows, num_drawn, weigh
from shared.data.tokenize import Tokenizer, tokenize_rows, tokenize_some
from shared.errors import DataError
from shared.folder import ModelFolder, find_folder, open_folder
from shared.jobs.prepare import prepare
from shared.strict import beyond_positions
from shared.types import Example

BARS = 10
UPDATES = 20  # whose padding is looked at
PROBLEMS = 5  # that are kept in full
HALF = "\ufffd"  # what a decoder gives for a part of a character


@dataclass(frozen=True)
class Piece:
    """A token as text, or as many as make whole characters."""

    text: str
    ids: tuple[int, ...]
    supervised: bool
    special: bool


@dataclass(frozen=True)
class Shown:
    """A row as the model gets it, cut at data.max_length."""

    source: str
    pieces: tuple[Piece, ...]
    tokens: int
    supervised: int
    cut: int  # tokens left out at the end


@dataclass(frozen=True)
class Bar:
    """Rows whose length, before the cut, is from `low` to `high` tokens."""

    low: int
    high: int
    rows: int


@dataclass(frozen=True)
class Split:
    """The facts of a split; tokens are counted behind the cut."""

    name: str
    rows: int
    kinds: dict[str, int]
    tokens: int
    supervised: int
    longest: int  # before the cut
    cut_rows: int
    cut_tokens: int
    duplicates: int  # rows that stand earlier in the same split
    leaks: int  # rows that are training rows too
    lengths: tuple[Bar, ...]
    problems: tuple[str, ...]  # rows that training would refuse: the first ones
    num_problems: int
    notices: tuple[str, ...]  # what the model does not get of the rows, and what is odd about them


@dataclass(frozen=True)
class Padding:
    """How the first updates would be cut: share of positions that are padding, and micro-batches per update."""

    micro_tokens: int
    sorted_share: float
    sorted_batches: float
    packed_batches: float  # packed rows have no padding


@dataclass(frozen=True)
class Preview:
    """What the rows of a config are to a model."""

    model: str
    data: str
    train_on: str
    max_length: int
    sources: dict[str, int]  # training rows of each
    dropped: dict[str, int]  # why -> rows that data.drop leaves out
    updates_per_epoch: int
    splits: tuple[Split, ...]
    padding: Padding | None
    shown: tuple[Shown, ...]


def preview(config: RunConfig, *, rows: int = 5) -> Preview:
    """Return the facts of a config's rows, and the first `rows` training rows token by token."""
    loaded = load_rows(config.data)
    base = open_folder(find_folder(config.model))
    tokenizer = Tokenizer(base.path)
    splits: list[Split] = []
    train: list[Example] = []
    seen: set[str] = set()
    counts = loaded.counts
    for name, rows_of in (("train", loaded.train), ("valid", loaded.valid)):
        if not rows_of:
            continue
        hashes = [content_hash([row]) for row in rows_of]
        whole, problems = tokenize_whole(rows_of, tokenizer, config.data)
        if "too_long" in loaded.dropped:
            before = len(whole)
            whole, kept = drop_long(whole, counts if name == "train" else (before,), most=config.data.max_length)
            counts = kept if name == "train" else counts
            loaded.dropped["too_long"] += before - len(whole)
        leaks = sum(key in seen for key in hashes)
        found = describe(name, rows_of, whole, problems, hashes, leaks=leaks, config=config.data)
        notices = tell(rows_of, tokenizer, config.data)
        if long := beyond_positions(min(found.longest, config.data.max_length), most_positions(base)):
            notices.append(long)
        splits.append(replace(found, notices=tuple(notices)))
        train, seen = train or whole, seen or set(hashes)
    weights = weigh(config.data.sources, counts)
    drawn = sum(num_drawn(weights)) or sum(counts)
    return Preview(
        model=config.model,
        data=", ".join(source.path for source in config.data.sources),
        train_on=config.data.train_on,
        max_length=config.data.max_length,
        sources=dict(zip([source.path for source in config.data.sources], counts, strict=True)),
        dropped=loaded.dropped,
        updates_per_epoch=Plan(drawn, config.train.batch_size, config.train.seed).updates_per_epoch,
        splits=tuple(splits),
        padding=find_padding([cut_off(example, config.data.max_length) for example in train], config),
        shown=tuple(show(example, tokenizer, config.data.max_length) for example in train[:rows]),
    )


def tell(rows: Sequence[Row], tokenizer: Tokenizer, data: DataConfig) -> list[str]:
    """Return what is to be told of rows, a line each."""
    found = notices_of(sample_rows(rows), tokenizer, total=len(rows), keep=data.cache)
    return [notice.text for notice in found]


def most_positions(base: ModelFolder) -> int | None:
    """Return how many positions a model was made for, None where its config does not say."""
    return base.config.get("max_position_embeddings")


def count_updates(config: RunConfig) -> int:
    """Return the updates of a run; epochs have rows counted, and read only where the config leaves some out."""
    if config.train.updates is not None:
        return config.train.updates
    epochs = config.train.epochs or 1
    if "too_long" in config.data.drop:
        return prepare(config).plan.updates_per_epoch * epochs
    counts = count_rows(config.data, valid_too=config.evaluation.every is not None)
    drawn = sum(num_drawn(weigh(config.data.sources, counts))) or sum(counts)
    return Plan(drawn, config.train.batch_size, config.train.seed).updates_per_epoch * epochs


def tokenize_whole(
    rows: Sequence[Row], tokenizer: Tokenizer, data: DataConfig
) -> tuple[list[Example], list[DataError]]:
    """Return the examples of rows in full length, and what is wrong with those that training would refuse.

    Raises DataError where it would refuse all of them.
    """
    examples: list[Example] = []
    problems: list[DataError] = []
    for found in tokenize_some(rows, tokenizer, train_on=data.train_on, max_length=sys.maxsize):
        if isinstance(found, DataError):
            problems.append(found)
            continue
        examples.append(found)
        long = "too_long" in data.drop and len(found.tokens) > data.max_length
        if not long and not found.supervised[: data.max_length].any():
            what = f"{found.source}: no supervised token within data.max_length {data.max_length}"
            problems.append(DataError(f"{what} ({len(found.tokens)} tokens)", code="E213"))
    if len(problems) == len(rows):
        tokenize_rows(rows, tokenizer, train_on=data.train_on, max_length=data.max_length)  # raises what training would
    return examples, problems


def describe(
    name: str, rows: Sequence[Row], whole: Sequence[Example], problems: Sequence[DataError], hashes: Sequence[str], *,
    leaks: int, config: DataConfig,
) -> Split:  # fmt: skip
    """Return the facts of a split."""
    lengths = np.array([len(example.tokens) for example in whole], dtype=np.int64)
    kept = np.minimum(lengths, config.max_length)
    kinds = [row.kind for row in rows]
    return Split(
        name=name,
        rows=len(rows),
        kinds={kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        tokens=int(kept.sum()),
        supervised=sum(int(example.supervised[: config.max_length].sum()) for example in whole),
        longest=int(lengths.max(initial=0)),
        cut_rows=int((lengths > config.max_length).sum()),
        cut_tokens=int((lengths - kept).sum()),
        duplicates=len(hashes) - len(set(hashes)),
        leaks=leaks,
        lengths=histogram(lengths),
        problems=tuple(problem.what for problem in problems[:PROBLEMS]),
        num_problems=len(problems),
        notices=(),
    )


def histogram(lengths: np.ndarray) -> tuple[Bar, ...]:
    """Return at most BARS bars of equal width.

    >>> [(bar.low, bar.high, bar.rows) for bar in histogram(np.array([1, 2, 2, 25]))]
    [(1, 3, 3), (4, 6, 0), (7, 9, 0), (10, 12, 0), (13, 15, 0), (16, 18, 0), (19, 21, 0), (22, 24, 0), (25, 27, 1)]
    """
    if not len(lengths):
        return ()
    width = -(-int(lengths.max()) // BARS)
    counts = np.bincount((lengths - 1) // width)
    return tuple(Bar(n * width + 1, (n + 1) * width, int(count)) for n, count in enumerate(counts))


def find_padding(examples: Sequence[Example], config: RunConfig) -> Padding | None:
    """Return how the first updates would be cut, None where training would refuse a row."""
    if not examples or not all(example.supervised.any() for example in examples):
        return None
    asked = config.train.micro_tokens
    micro_tokens = GPU_MICRO_TOKENS if asked == "auto" else asked
    plan = Plan(len(examples), config.train.batch_size, config.train.seed)
    steps = range(1, min(UPDATES, plan.updates_per_epoch) + 1)
    updates = [[examples[row] for row in plan.rows(step)] for step in steps]
    padded = [batch for some in updates for batch in micro_batches(some, Layout(micro_tokens))]
    packed = [batch for some in updates for batch in micro_batches(some, Layout(micro_tokens, packed=True))]
    positions = sum(batch.tokens_BT.size for batch in padded)
    return Padding(
        micro_tokens=micro_tokens,
        sorted_share=1 - sum(batch.num_tokens for batch in padded) / positions,
        sorted_batches=len(padded) / len(updates),
        packed_batches=len(packed) / len(updates),
    )


def cut_off(example: Example, most: int) -> Example:
    """Return an example as training has it."""
    return Example(example.tokens[:most], example.supervised[:most], example.source)


def show(example: Example, tokenizer: Tokenizer, most: int) -> Shown:
    """Return a row's pieces."""
    kept = cut_off(example, most)
    return Shown(
        source=example.source,
        pieces=tuple(pieces(kept, tokenizer)),
        tokens=len(kept.tokens),
        supervised=int(kept.supervised.sum()),
        cut=len(example.tokens) - len(kept.tokens),
    )


def pieces(example: Example, tokenizer: Tokenizer) -> Iterator[Piece]:
    """Yield the text of every token, of several at once where a character is spread over them.

    A token's text is what it adds to that of the one before: alone, some tokenizers drop its blank in front.
    """

    def text(start: int, end: int) -> str:
        return tokenizer.inner.decode(ids[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    ids = example.tokens.tolist()
    before = start = 0
    for end in range(1, len(ids) + 1):
        whole = text(before, end)
        if whole.endswith(HALF) and end < len(ids):
            continue
        added = whole[len(text(before, start)) :] if start else whole
        supervised = bool(example.supervised[start:end].any())
        yield Piece(added, tuple(ids[start:end]), supervised, any(map(tokenizer.is_special, ids[start:end])))
        before, start = start, end
