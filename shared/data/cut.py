"""How an update is cut into micro-batches, and in smaller pieces where memory runs out: same rows, same update."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heapreplace

import numpy as np

from shared.errors import OutOfMemory
from shared.types import Batch, PaddingSide

MICRO_COST = 64  # positions that a micro-batch's fixed cost is worth: cut where it saves more (benchmarks/LOG.md)

STEPS = 100  # groups up to which their number is tried one by one


@dataclass(frozen=True)
class Segment:
    """One example in a micro-batch."""

    tokens: np.ndarray  # (T,) int32
    slot: int  # its place in the update
    positions_N: np.ndarray  # of the hidden states that predict the targets, from 0
    targets_N: np.ndarray
    weights_N: np.ndarray


def join(segments: Sequence[Segment], *, packed: bool, padding_side: PaddingSide = "right") -> Batch:
    """Return segments as one micro-batch: end to end in one row, or a row each, padded on one side."""
    lengths_S = np.array([len(segment.tokens) for segment in segments], dtype=np.int32)
    width = int(lengths_S.sum() if packed else lengths_S.max())
    starts_S = np.cumsum(lengths_S) - lengths_S if packed else np.arange(len(segments)) * width
    if padding_side == "left" and not packed:
        starts_S = starts_S + width - lengths_S
    tokens = np.zeros((1 if packed else len(segments)) * width, dtype=np.int32)
    for segment, start in zip(segments, starts_S, strict=True):
        tokens[start : start + len(segment.tokens)] = segment.tokens
    positions = [segment.positions_N + start for segment, start in zip(segments, starts_S, strict=True)]
    return Batch(
        tokens_BT=tokens.reshape(-1, width),
        starts_S=starts_S.astype(np.int32),
        lengths_S=lengths_S,
        slots_S=np.array([segment.slot for segment in segments], dtype=np.int32),
        positions_N=np.concatenate(positions).astype(np.int32),
        targets_N=np.concatenate([segment.targets_N for segment in segments]),
        weights_N=np.concatenate([segment.weights_N for segment in segments]),
        padding_side="right" if packed else padding_side,
    )


def take_apart(batch: Batch) -> Iterator[Segment]:
    """Yield the segments that were joined, without what they were padded with."""
    tokens = batch.tokens_BT.reshape(-1)
    for start, length, slot in zip(batch.starts_S, batch.lengths_S, batch.slots_S, strict=True):
        if length == 0:
            continue
        inside = (batch.positions_N >= start) & (batch.positions_N < start + length - 1)  # the last predicts nothing
        yield Segment(
            tokens[start : start + length],
            int(slot),
            positions_N=batch.positions_N[inside] - start,
            targets_N=batch.targets_N[inside],
            weights_N=batch.weights_N[inside],
        )


def pack(lengths: Sequence[int], *, micro_tokens: int) -> list[list[int]]:
    """Return groups of places of nearly equal sums, each at most `micro_tokens` long or a single example.

    There are as few groups as fit (beyond STEPS of them up to a hundredth more). Longest first, each into the group
    that is shortest so far.

    >>> pack([3, 9, 4, 8], micro_tokens=100), pack([3, 9, 4, 8], micro_tokens=12)
    ([[1, 3, 2, 0]], [[1, 0], [3, 2]])
    """
    order = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    wanted = max(-(-sum(lengths) // micro_tokens), sum(2 * length > micro_tokens for length in lengths))
    while True:
        wanted = min(wanted, len(order))
        groups: list[list[int]] = [[] for _ in range(wanted)]
        sums = [(0, number) for number in range(wanted)]  # a heap
        for place in order:
            total, number = sums[0]
            groups[number].append(place)
            heapreplace(sums, (total + lengths[place], number))
        if wanted == len(order) or all(total <= micro_tokens or len(groups[number]) == 1 for total, number in sums):
            return groups
        wanted += max(wanted // STEPS, 1)  # by ones, 20,000 rows of an evaluation would take a minute


def cut(lengths: Sequence[int], *, micro_tokens: int) -> list[list[int]]:
    """Return groups of places, longest rows first, each at most `micro_tokens` positions or a single row.

    Of all cuts of the sorted rows it is the one with the fewest positions, padding included, where every group costs
    another MICRO_COST positions.

    >>> cut([3, 9, 4, 8], micro_tokens=18), cut([200, 900, 210, 890], micro_tokens=4096)
    ([[1, 3], [2, 0]], [[1, 3], [2, 0]])
    """
    order = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    best, begins = [0], [0]  # of the first n rows: the least cost, and where the last group begins
    for end in range(1, len(order) + 1):
        cost, start = best[end - 1] + lengths[order[end - 1]] + MICRO_COST, end - 1
        for begin in range(end - 2, -1, -1):
            positions = lengths[order[begin]] * (end - begin)
            if positions > micro_tokens:
                break
            if best[begin] + positions + MICRO_COST < cost:
                cost, start = best[begin] + positions + MICRO_COST, begin
        best.append(cost)
        begins.append(start)
    groups: list[list[int]] = []
    end = len(order)
    while end:
        groups.append(order[begins[end] : end])
        end = begins[end]
    return groups[::-1]


def halve(micro: Sequence[Batch]) -> list[Batch]:
    """Return the same rows in micro-batches of half the examples; raises OutOfMemory where all have one."""
    if all(len(batch.lengths_S) == 1 for batch in micro):
        longest = max(batch.tokens_BT.shape[1] for batch in micro)
        raise OutOfMemory(
            f"out of memory with a single row of {longest} tokens",
            fix=f"data.max_length: {max(longest // 2, 2)}, or train.recompute: true, or quantization: affine-4bit-g64",
        )
    return [part for batch in micro for part in split(batch)]


def split(batch: Batch) -> Iterator[Batch]:
    """Yield a micro-batch in two halves, or as it is when it has one example."""
    segments = list(take_apart(batch))
    middle = -(-len(segments) // 2)
    for part in (segments[:middle], segments[middle:]):
        if part:
            yield join(part, packed=batch.is_packed, padding_side=batch.padding_side)
