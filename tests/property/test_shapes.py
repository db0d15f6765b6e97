"""Properties of the few shapes of compiled updates: they hold every row, waste little, and change nothing."""

from __future__ import annotations

from functools import cache
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.data.batch import Plan, make_batch, make_segment, update_batches
from shared.data.cut import MICRO_COST, halve, join, take_apart
from shared.data.layout import Layout
from shared.data.shapes import MOST_SHAPES, choose_shapes, expected_cost, fill, shaped_batches
from shared.types import Shape
from tests.property.test_layouts import SIDES, facts, same, updates

SHAPES = st.lists(st.builds(Shape, st.integers(1, 4), st.integers(1, 40), st.integers(1, 40)), max_size=4)


@given(updates(), st.integers(1, 20), st.integers(1, 200), SIDES)
@settings(max_examples=40)
def test_every_micro_batch_has_one_of_at_most_eight_shapes_and_teaches_the_same(
    examples, batch_size, micro_tokens, side
):
    shapes = choose_shapes(examples, batch_size=batch_size, micro_tokens=micro_tokens)
    assert 1 <= len(shapes) <= MOST_SHAPES
    assert all(shape.rows * shape.tokens <= micro_tokens or shape.rows == 1 for shape in shapes)
    assert max(shape.tokens for shape in shapes) == max(len(example.tokens) for example in examples)
    batches = shaped_batches(segments(examples), shapes, padding_side=side)
    assert {batch.shape for batch in batches} <= set(shapes)
    assert facts(batches) == facts([make_batch(examples, range(len(examples)))])
    assert sum(batch.num_tokens for batch in batches) == sum(len(example.tokens) for example in examples)
    assert sum(batch.num_supervised for batch in batches) == sum(int(row.supervised.sum()) for row in examples)


@given(updates(), st.integers(1, 200), SIDES)
@settings(max_examples=40)
def test_what_was_padded_comes_apart_without_the_padding(examples, micro_tokens, side):
    shapes = choose_shapes(examples, batch_size=len(examples), micro_tokens=micro_tokens)
    for batch in shaped_batches(segments(examples), shapes, padding_side=side):
        assert not batch.is_packed
        width, real = batch.tokens_BT.shape[1], batch.lengths_S > 0
        assert np.array_equal(batch.pads_B, np.where(real, width - batch.lengths_S, 0) if side == "left" else 0 * real)
        assert batch.places()[0].shape == batch.tokens_BT.shape
        again = join(list(take_apart(batch)), packed=False)
        assert same(again, make_batch([examples[slot] for slot in again.slots_S], again.slots_S.tolist()))
        if len(again.lengths_S) > 1:
            assert facts(halve([batch])) == facts([batch])


@given(updates(), SHAPES)
@settings(max_examples=40)
def test_filling_takes_the_fewest_positions_of_all_ways_to_fill_in_order(examples, shapes):
    """Against every way to cut the sorted rows, each piece in the cheapest shape that holds it."""
    examples = examples[:7]
    lengths, targets = [len(row.tokens) for row in examples], [int(row.supervised.sum()) for row in examples]
    shapes = [*shapes, Shape(1, max(lengths), max(targets))]
    order = sorted(range(len(lengths)), key=lambda n: (-lengths[n], n))
    costs = []
    for number in range(len(order)):
        for inner in combinations(range(1, len(order)), number):
            groups = [order[a:b] for a, b in pairwise([0, *inner, len(order)])]
            costs.append(sum(least_cost(group, lengths, targets, shapes) for group in groups))
    groups = fill(lengths, targets, shapes)
    assert [place for group, _ in groups for place in group] == order
    assert sum(shape.rows * shape.tokens + MICRO_COST for _, shape in groups) == min(costs)


def segments(examples):
    return [make_segment(example, slot) for slot, example in enumerate(examples)]


def least_cost(group, lengths, targets, shapes):
    needed = len(group), max(lengths[n] for n in group), sum(targets[n] for n in group)
    fitting = [s for s in shapes if s.rows >= needed[0] and s.tokens >= needed[1] and s.targets >= needed[2]]
    return min((s.rows * s.tokens + MICRO_COST for s in fitting), default=float("inf"))


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_the_choice_has_the_least_expected_cost_of_all_divisions(make_examples, batch_size):
    """Against every division of eleven widths into at most eight."""
    lengths = [3, 9, 9, 14, 20, 22, 40, 41, 64, 100, 180, 181]
    widths = sorted(set(lengths))

    @cache
    def cost_between(low, high):
        share = sum(low < length <= high for length in lengths) / len(lengths)
        return expected_cost(share, high, batch_size=batch_size, micro_tokens=256)[0]

    def cost(edges):
        return sum(cost_between(low, high) for low, high in pairwise([0, *edges]))

    ways = [(*inner, 181) for number in range(MOST_SHAPES) for inner in combinations(widths[:-1], number)]
    found = choose_shapes(make_examples(lengths), batch_size=batch_size, micro_tokens=256)
    assert cost([shape.tokens for shape in found]) == pytest.approx(min(map(cost, ways)), rel=1e-12)


def test_the_expected_cost_is_that_of_random_updates():
    random = np.random.default_rng(0)
    cost, rows = expected_cost(0.3, 50, batch_size=16, micro_tokens=1000)
    drawn = np.ceil(random.binomial(16, 0.3, 200_000) / rows).mean() * (rows * 50 + MICRO_COST)
    assert cost == pytest.approx(drawn, rel=0.01)


def test_mixed_lengths_keep_padding_below_a_fifth_in_real_updates(make_examples):
    lengths = np.clip(np.exp(np.random.default_rng(0).normal(np.log(130), 0.7, 400)), 34, 397).astype(int).tolist()
    examples, plan = make_examples(lengths), Plan(400, 16, 0)
    layout = Layout(1024, shapes=choose_shapes(examples, batch_size=16, micro_tokens=1024))
    batches = [b for step in range(1, plan.updates_per_epoch + 1) for b in update_batches(examples, plan, step, layout)]
    assert len({batch.shape for batch in batches}) <= MOST_SHAPES
    assert 1 - sum(lengths) / sum(batch.tokens_BT.size for batch in batches) < 0.2
