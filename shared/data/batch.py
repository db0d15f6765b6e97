"""Which rows an update takes, and the micro-batches that they are cut into.

The rows of update u are a pure function of (seed, u): that is the mathematics. The layout is not: examples are packed
end to end, or sorted by length and padded, and every layout gives the same update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shared.data.cut import Segment, cut, join, pack
from shared.data.layout import Layout
from shared.data.shapes import shaped_batches
from shared.data.sources import Weights, epoch_rows
from shared.types import Batch, Example, PaddingSide


@dataclass(frozen=True)
class Plan:
    """The rows of every update of a run: epochs in a new order each, the last partial batch included."""

    num_rows: int
    batch_size: int
    seed: int
    weights: Weights = ()

    @property
    def updates_per_epoch(self) -> int:
        """Return how many updates one pass over the rows takes."""
        return -(-self.num_rows // self.batch_size)

    def rows(self, step: int) -> np.ndarray:
        """Return the row numbers of update `step` (from 1), in the epoch's order."""
        epoch, place = divmod(step - 1, self.updates_per_epoch)
        order = epoch_rows(self.weights, seed=self.seed, epoch=epoch, num_rows=self.num_rows)
        return order[place * self.batch_size : (place + 1) * self.batch_size]


def make_batch(
    examples: Sequence[Example], slots: Sequence[int], *, packed: bool = False, padding_side: PaddingSide = "right"
) -> Batch:
    """Return the micro-batch of these examples; slots: their places in the update."""
    segments = [make_segment(example, slot) for example, slot in zip(examples, slots, strict=True)]
    return join(segments, packed=packed, padding_side=padding_side)


def make_segment(example: Example, slot: int) -> Segment:
    """Return an example with its targets, each predicted by the hidden state one place earlier."""
    at = np.flatnonzero(example.supervised)
    weights_N = np.ones(len(at), dtype=np.float32)
    return Segment(example.tokens, slot, positions_N=at - 1, targets_N=example.tokens[at], weights_N=weights_N)


def micro_batches(examples: Sequence[Example], layout: Layout) -> list[Batch]:
    """Return the micro-batches of one update's (or a whole evaluation's) examples."""
    divide = pack if layout.packed else cut
    groups = divide([len(example.tokens) for example in examples], micro_tokens=layout.micro_tokens)
    how = {"packed": layout.packed, "padding_side": layout.padding_side}
    return [make_batch([examples[place] for place in group], group, **how) for group in groups]


def update_batches(examples: Sequence[Example], plan: Plan, step: int, layout: Layout) -> list[Batch]:
    """Return the micro-batches of update `step`."""
    chosen = [examples[row] for row in plan.rows(step)]
    if layout.shapes:
        segments = [make_segment(example, slot) for slot, example in enumerate(chosen)]
        return shaped_batches(segments, layout.shapes, padding_side=layout.padding_side)
    return micro_batches(chosen, layout)
