"""Micro-batches in smaller pieces, for when memory runs out: same rows, same update."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from shared.errors import OutOfMemory
from shared.types import Batch


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
