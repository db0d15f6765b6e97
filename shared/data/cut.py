"""How an update is cut into micro-batches, and in smaller pieces where memory runs out: same rows, same update."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from shared.errors import OutOfMemory
from shared.types import Batch

MICRO_COST = 64  # positions that a micro-batch's fixed cost is worth: cut where it saves more (benchmarks/LOG.md)


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
    """Return the same rows in micro-batches of half the rows; raises OutOfMemory where all have one row."""
    if all(len(batch.lengths_B) == 1 for batch in micro):
        longest = max(batch.tokens_BT.shape[1] for batch in micro)
        raise OutOfMemory(
            f"out of memory with a single row of {longest} tokens",
            fix=f"data.max_length: {max(longest // 2, 2)}, or train.recompute: true, or quantization: affine-4bit-g64",
        )
    return [part for batch in micro for part in split(batch)]


def split(batch: Batch) -> Iterator[Batch]:
    """Yield a micro-batch in two halves, or as it is when it has one row."""
    rows = len(batch.lengths_B)
    T = batch.tokens_BT.shape[1]
    middle = -(-rows // 2)
    for first, last in ((0, middle), (middle, rows)):
        if first == last:
            continue
        inside = (batch.positions_N >= first * T) & (batch.positions_N < last * T)
        yield Batch(
            tokens_BT=batch.tokens_BT[first:last],
            lengths_B=batch.lengths_B[first:last],
            slots_B=batch.slots_B[first:last],
            positions_N=batch.positions_N[inside] - np.int32(first * T),
            targets_N=batch.targets_N[inside],
            weights_N=batch.weights_N[inside],
        )
