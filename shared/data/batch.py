"""Which rows an update takes, and how they are cut into micro-batches.

The rows of update u are a pure function of (seed, u): that is the mathematics. The cut is not: rows are
sorted by length inside the update and cut by a budget of positions, so that hardly any padding remains,
and every cut gives the same update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shared.data.cut import cut
from shared.seeds import row_order
from shared.types import Batch, Example

# B rows, T tokens, N supervised positions
AUTO_MICRO_TOKENS = 4096


@dataclass(frozen=True)
class Plan:
    """The rows of every update of a run: epochs in a new order each, the last partial batch included."""

    num_rows: int
    batch_size: int
    seed: int

    @property
    def updates_per_epoch(self) -> int:
        """Return how many updates one pass over the rows takes."""
        return -(-self.num_rows // self.batch_size)

    def rows(self, step: int) -> np.ndarray:
        """Return the row numbers of update `step` (from 1), in the epoch's order."""
        epoch, place = divmod(step - 1, self.updates_per_epoch)
        order = row_order(seed=self.seed, epoch=epoch, num_rows=self.num_rows)
        return order[place * self.batch_size : (place + 1) * self.batch_size]


def make_batch(examples: Sequence[Example], slots: Sequence[int]) -> Batch:
    """Return the micro-batch of these examples; slots: their places in the update."""
    lengths_B = np.array([len(example.tokens) for example in examples], dtype=np.int32)
    T = int(lengths_B.max())
    tokens_BT = np.zeros((len(examples), T), dtype=np.int32)
    positions, targets = [], []
    for b, example in enumerate(examples):
        tokens_BT[b, : len(example.tokens)] = example.tokens
        at = np.flatnonzero(example.supervised)
        positions.append(b * T + at - 1)  # the hidden state one place earlier predicts it
        targets.append(example.tokens[at])
    positions_N, targets_N = np.concatenate(positions).astype(np.int32), np.concatenate(targets)
    return Batch(
        tokens_BT=tokens_BT,
        lengths_B=lengths_B,
        slots_B=np.array(slots, dtype=np.int32),
        positions_N=positions_N,
        targets_N=targets_N,
        weights_N=np.ones(len(targets_N), dtype=np.float32),
    )


def micro_batches(examples: Sequence[Example], *, micro_tokens: int) -> list[Batch]:
    """Return the micro-batches of one update's (or a whole evaluation's) examples."""
    groups = cut([len(example.tokens) for example in examples], micro_tokens=micro_tokens)
    return [make_batch([examples[place] for place in group], group) for group in groups]


def update_batches(examples: Sequence[Example], plan: Plan, step: int, *, micro_tokens: int) -> list[Batch]:
    """Return the micro-batches of update `step`."""
    return micro_batches([examples[row] for row in plan.rows(step)], micro_tokens=micro_tokens)
