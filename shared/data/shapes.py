"""Few sizes of micro-batches, for compiled updates: chosen from the rows' lengths before a run, then only filled.

A compiled function is made anew for every size of its inputs. So an update's rows are cut into micro-batches of at most
MOST_SHAPES sizes, each padded up to its own; padding carries no loss.
Legend: R training rows from short to long, E widths that come into question, M rows of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from shared.data.cut import MICRO_COST, Segment, join
from shared.types import Batch, Example, PaddingSide, Shape

MOST_SHAPES = 8
WIDTHS = 32  # quantiles of the lengths that are tried as widths


def choose_shapes(examples: Sequence[Example], *, batch_size: int, micro_tokens: int) -> tuple[Shape, ...]:
    """Return at most MOST_SHAPES sizes, short to long, that hold every example.

    Of all divisions of the lengths at WIDTHS quantiles it is the one with the fewest positions expected in an update of
    `batch_size` random rows, where every micro-batch costs MICRO_COST more (`expected_cost`).
    """
    order = sorted(examples, key=lambda example: len(example.tokens))
    lengths_R = np.array([len(example.tokens) for example in order])
    targets_R = np.array([np.count_nonzero(example.supervised) for example in order])
    widths_E = np.unique(np.quantile(lengths_R, np.arange(WIDTHS + 1) / WIDTHS, method="higher"))
    ends = [0, *np.searchsorted(lengths_R, widths_E, side="right").tolist()]
    best: list[list[tuple[float, tuple[Shape, ...]]]] = [[(0.0, ())]]  # of the first e widths, by number of shapes
    for end, width in enumerate(widths_E.tolist(), start=1):
        found: dict[int, tuple[float, tuple[Shape, ...]]] = {}
        for begin in range(end):
            share = (ends[end] - ends[begin]) / len(order)
            cost, rows = expected_cost(share, width, batch_size=batch_size, micro_tokens=micro_tokens)
            shape = Shape(rows, width, room(targets_R[ends[begin] : ends[end]], rows))
            for before, shapes in best[begin]:
                number = len(shapes) + 1
                if number <= MOST_SHAPES and before + cost < found.get(number, (np.inf, ()))[0]:
                    found[number] = (before + cost, (*shapes, shape))
        best.append(list(found.values()))
    return min(best[-1])[1]


def expected_cost(share: float, width: int, *, batch_size: int, micro_tokens: int) -> tuple[float, int]:
    """Return the least expected positions, padding included, of an update's rows of one width, and M for it.

    share: of all rows, so that the number in an update is binomial (batch_size, share).
    """
    count = np.arange(batch_size + 1)
    factorials = np.concatenate([[0.0], np.cumsum(np.log(count[1:]))])
    ways = factorials[-1] - factorials - factorials[::-1]
    odds = np.exp(ways + count * np.log(share) + count[::-1] * np.log(max(1 - share, 1e-300)))
    rows_M = np.unique(np.geomspace(1, np.clip(micro_tokens // width, 1, batch_size), WIDTHS).astype(int))
    groups_M = np.ceil(count / rows_M[:, None]) @ odds
    costs_M = groups_M * (rows_M * width + MICRO_COST)
    return float(costs_M.min()), int(rows_M[costs_M.argmin()])


def room(targets: np.ndarray, rows: int) -> int:
    """Return places for the supervised positions of `rows` rows: two standard deviations above the mean.

    Any single row fits; where several do not, `fill` takes one fewer.
    """
    usual = rows * targets.mean() + 2 * np.sqrt(rows) * targets.std()
    return int(min(max(np.ceil(usual), targets.max()), rows * targets.max()))


def fill(lengths: Sequence[int], targets: Sequence[int], shapes: Sequence[Shape]) -> list[tuple[list[int], Shape]]:
    """Return groups of places, longest rows first, each with the size it is padded to.

    Of all ways to fill the shapes in this order it is the one with the fewest positions, where every group costs
    MICRO_COST more. Every row has to fit into a shape.

    >>> fill([3, 9, 4, 8], [1, 1, 1, 1], [Shape(2, 4, 2), Shape(2, 9, 2)])
    [([1, 3], Shape(rows=2, tokens=9, targets=2)), ([2, 0], Shape(rows=2, tokens=4, targets=2))]
    """
    order = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    sums = [0, *accumulate(targets[place] for place in order)]
    best: list[tuple[int, int, Shape | None]] = [(0, len(order), None)]  # of the rows from n on: cost, next n, shape
    for begin in range(len(order) - 1, -1, -1):
        ways = []
        for shape in shapes:
            end = min(begin + shape.rows, len(order))
            while sums[end] - sums[begin] > shape.targets:
                end -= 1
            if shape.tokens >= lengths[order[begin]] and end > begin:
                ways.append((shape.rows * shape.tokens + MICRO_COST + best[len(order) - end][0], end, shape))
        best.append(min(ways, key=lambda way: way[0]))
    groups, begin = [], 0
    while begin < len(order):
        _, end, shape = best[len(order) - begin]
        assert shape is not None
        groups.append((order[begin:end], shape))
        begin = end
    return groups


def shaped_batches(
    segments: Sequence[Segment], shapes: Sequence[Shape], *, padding_side: PaddingSide = "right"
) -> list[Batch]:
    """Return the micro-batches of one update's examples, each padded up to one of `shapes`."""
    lengths = [len(segment.tokens) for segment in segments]
    groups = fill(lengths, [len(segment.targets_N) for segment in segments], shapes)
    how: dict[str, Any] = {"packed": False, "padding_side": padding_side}
    batches = [(join([segments[place] for place in group], **how), shape) for group, shape in groups]
    return [pad(batch, shape) for batch, shape in batches]


def pad(batch: Batch, shape: Shape) -> Batch:
    """Return a micro-batch of a row each padded up to a size: rows of length 0, supervised positions of weight 0.

    Those positions are the last one of the last row, from which nothing is predicted.
    """
    rows, width = batch.tokens_BT.shape
    more, extra = (0, shape.rows - rows), (0, shape.targets - len(batch.targets_N))
    rows_N, times_N = np.divmod(batch.positions_N, width)
    front = shape.tokens - width if batch.padding_side == "left" else 0
    pads_B = np.pad(batch.pads_B + front, more)
    return Batch(
        tokens_BT=np.pad(batch.tokens_BT, (more, (front, shape.tokens - width - front))),
        starts_S=np.arange(shape.rows, dtype=np.int32) * shape.tokens + pads_B,
        lengths_S=np.pad(batch.lengths_S, more),
        slots_S=np.pad(batch.slots_S, more),
        positions_N=np.pad(
            rows_N * shape.tokens + times_N + front, extra, constant_values=shape.rows * shape.tokens - 1
        ),
        targets_N=np.pad(batch.targets_N, extra),
        weights_N=np.pad(batch.weights_N, extra),
        padding_side=batch.padding_side,
    )
