"""The rows of a run: of one source or several, without those that the config drops, parted into train and valid."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.data.dialects import translate
from shared.data.formats import count_values, read_values
from shared.data.rows import Row, content_hash, find_data, make_row, no_rows, split_files
from shared.errors import ConfigError, DataError
from shared.seeds import generator, permutation, row_order
from shared.types import Example

if TYPE_CHECKING:
    from shared.config import DataConfig, SourceConfig  # pydantic, which a plain script on a GPU server may lack

Weights = tuple[tuple[int, float], ...]  # of each source: its rows, and how often one epoch takes each


@dataclass(frozen=True)
class Rows:
    """The rows of both splits, source by source, and what was left out."""

    train: list[Row]
    valid: list[Row]
    counts: tuple[int, ...]  # training rows of each source
    roots: tuple[Path, ...]  # where each source is
    files: dict[str, Path]
    dropped: dict[str, int]  # why -> rows


def load_rows(data: DataConfig, *, valid_too: bool = True) -> Rows:
    """Return the rows that a config names, with those of valid files or without; raises DataError with file:line."""
    train: list[Row] = []
    valid: list[Row] = []
    counts: list[int] = []
    files: dict[str, Path] = {}
    dropped: dict[str, int] = dict.fromkeys(data.drop, 0)
    seen: set[str] = set()
    roots = tuple(find_data(source.path) for source in data.sources)
    for root, prefix in zip(roots, name_sources(roots), strict=True):
        before = len(train)
        for split, rows in (("train", train), ("valid", valid)):
            found = split_files(root, split, names=data.splits) if split == "train" or valid_too else []
            check_valid(found, split, data)
            files |= {prefix + label(file, root): file for file in found}
            known, left_out = len(rows), sum(dropped.values())
            rows += keep(read(found, data, dropped, prefix=prefix), seen, dropped)
            if found and len(rows) == known:
                raise no_rows(found[0], prefix=prefix, dropped=sum(dropped.values()) - left_out)
        kept, parted = part(train[before:], share=data.valid_split)
        if not kept:
            raise all_parted(root)
        train[before:], valid = kept, valid + parted
        counts.append(len(kept))
    return Rows(train, valid, tuple(counts), roots, files, dropped)


def all_parted(root: Path) -> DataError:
    """Return the error for a source of which data.valid_split leaves nothing."""
    what = f"data.valid_split leaves no row of {root} to train on"
    return DataError(what, fix="a smaller one, or more rows", code="E204")


def count_rows(data: DataConfig, *, valid_too: bool = True) -> tuple[int, ...]:
    """Return how many training rows each source has, as `load_rows` does; none is kept where that can be told without.

    Where the settings leave none out, rows are not even read. Raises DataError.
    """
    if "duplicate" in data.drop:
        return load_rows(data, valid_too=valid_too).counts
    roots = tuple(find_data(source.path) for source in data.sources)
    counts: list[int] = []
    for root, prefix in zip(roots, name_sources(roots), strict=True):
        files, share = split_files(root, "train", names=data.splits), data.valid_split
        dropped: dict[str, int] = dict.fromkeys(data.drop, 0)
        if dropped or share is not None:
            rows = read(files, data, dropped, prefix=prefix)
            found = Counter(share is None or not is_parted(content_hash([row]), share) for row in rows)
        else:
            found = Counter({True: sum(count_values(file) for file in files)})
        if not found.total():
            raise no_rows(files[0], prefix=prefix, dropped=sum(dropped.values()))
        if not found[True]:
            raise all_parted(root)
        counts.append(found[True])
    return tuple(counts)


def name_sources(roots: Sequence[Path]) -> list[str]:
    """Return what stands before a file's name in errors: nothing, of several sources their folders.

    >>> name_sources([Path("x.csv")]), name_sources([Path("a/x.csv"), Path("b/x.csv"), Path("c/a/x.csv")])
    ([''], ['a/', 'b/', 'a-3/'])
    """
    folders = [(root if root.is_dir() else root.parent).name for root in roots]
    if len(roots) == 1:
        return [""]
    return [f"{name}-{n + 1}/" if name in folders[:n] else f"{name}/" for n, name in enumerate(folders)]


def check_valid(found: list[Path], split: str, data: DataConfig) -> None:
    """Refuse to make a split that is there."""
    if data.valid_split is not None and split == "valid" and found:
        raise ConfigError(f"data.valid_split, but there is {found[0].name}", fix="remove one of them", code="E204")


def label(file: Path, root: Path) -> str:
    """Return how a file is called in the manifest."""
    return str(file.relative_to(root)) if root.is_dir() else file.name


def read(files: list[Path], data: DataConfig, dropped: dict[str, int], *, prefix: str) -> Iterator[Row]:
    """Yield the checked rows of files, without empty ones where these are dropped."""
    for file in files:
        for value, source in named_values(file, prefix):
            if "empty" in dropped and isinstance(value, dict) and is_empty(value, source, data):
                dropped["empty"] += 1
                continue
            yield make_row(value, source=source, columns=data.columns)


def named_values(file: Path, prefix: str) -> Iterator[tuple[Any, str]]:
    """Yield what `read_values` does, its places and errors under the name of the source."""
    try:
        for value, place in read_values(file):
            yield value, prefix + place
    except DataError as error:
        what = prefix + error.what if error.what.startswith(file.name) else error.what
        raise DataError(what, code=error.code, expected=error.expected, fix=error.fix) from None


def is_empty(value: dict[str, Any], source: str, data: DataConfig) -> bool:
    """Return whether a row has nothing to learn: no text, no completion, or no assistant's turn with words or calls.

    >>> from shared.config import DataConfig
    >>> is_empty({"prompt": "q", "completion": " "}, "a:1", DataConfig(path="a"))
    True
    """
    row = translate(value, source=source, columns=data.columns)
    if "messages" in row:
        turns = row["messages"] if isinstance(row["messages"], list) else []
        said = [turn for turn in turns if isinstance(turn, dict) and turn.get("role") == "assistant"]
        return not any(turn.get("tool_calls") or not is_blank(turn.get("content")) for turn in said)
    key = next((key for key in ("completion", "text") if key in row), None)
    return key is not None and is_blank(row[key])


def is_blank(value: Any) -> bool:
    """Return whether a value is null, or a text without a character that is seen."""
    return value is None or (isinstance(value, str) and not value.strip())


def keep(rows: Iterator[Row], seen: set[str], dropped: dict[str, int]) -> Iterator[Row]:
    """Yield rows, each once where duplicates are dropped; `seen` is added to."""
    for row in rows:
        key = content_hash([row]) if "duplicate" in dropped else ""
        if key and key in seen:
            dropped["duplicate"] += 1
            continue
        seen.add(key)
        yield row


def part(rows: list[Row], *, share: float | None) -> tuple[list[Row], list[Row]]:
    """Return rows in two, about `share` of them in the second; content decides, so equal rows stay together."""
    if share is None:
        return rows, []
    second = [is_parted(content_hash([row]), share) for row in rows]
    return (
        [row for row, out in zip(rows, second, strict=True) if not out],
        [row for row, out in zip(rows, second, strict=True) if out],
    )


def is_parted(key: str, share: float) -> bool:
    """Return whether a row of this content hash is parted off to evaluate on.

    >>> is_parted("0" * 64, 0.1), is_parted("f" * 64, 0.1)
    (True, False)
    """
    return int(key[:16], 16) < share * 2**64


def drop_long(examples: list[Example], counts: tuple[int, ...], *, most: int) -> tuple[list[Example], tuple[int, ...]]:
    """Return the examples of at most so many tokens, and how many each source has of them; raises DataError."""
    fits = np.array([len(example.tokens) <= most for example in examples], dtype=bool)
    origins = np.repeat(np.arange(len(counts)), counts)[: len(examples)]
    left = np.bincount(origins[fits], minlength=len(counts))
    if not left.all() and examples:
        raise DataError(f"all rows of a source have more than {most} tokens", fix="raise data.max_length", code="E213")
    return [example for example, fit in zip(examples, fits, strict=True) if fit], tuple(left.tolist())


def weigh(sources: tuple[SourceConfig, ...], counts: tuple[int, ...]) -> Weights:
    """Return the weights of a plan: none where every row is taken once."""
    if all(source.weight == 1 for source in sources):
        return ()
    return tuple((count, source.weight) for source, count in zip(sources, counts, strict=True))


def num_drawn(weights: Weights) -> list[int]:
    """Return how many rows an epoch takes of each source, one at least.

    >>> num_drawn(((100, 0.5), (10, 3.0)))
    [50, 30]
    """
    return [max(round(rows * weight), 1) for rows, weight in weights]


@lru_cache(maxsize=2)  # every update of an epoch asks for it
def epoch_rows(weights: Weights, *, seed: int, epoch: int, num_rows: int) -> np.ndarray:
    """Return the row numbers of an epoch in its order, (num_rows,) integers.

    A source of weight 0.5 gives one half of its rows in one epoch and the other in the next; of weight 2 each twice.
    """
    order = row_order(seed=seed, epoch=epoch, num_rows=num_rows)
    if not weights:
        return order
    first, drawn = 0, []
    for number, ((rows, _), count) in enumerate(zip(weights, num_drawn(weights), strict=True)):
        turn = permutation(generator(seed, "source", number), rows)
        drawn.append(first + turn[np.arange(epoch * count, (epoch + 1) * count) % rows])
        first += rows
    return np.concatenate(drawn)[order]
