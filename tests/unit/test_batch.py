"""Every row is used once per epoch, and no cut into micro-batches changes what is learned."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest

from shared.data.batch import Plan, make_batch, micro_batches, update_batches
from shared.data.cut import MICRO_COST, cut, halve, split
from shared.data.layout import Layout
from shared.errors import OutOfMemory
from shared.types import Example


def facts(batches):
    """Return what a set of micro-batches teaches, whatever the cut: (slot, place, target, weight), sorted."""
    found = []
    for batch in batches:
        T = batch.tokens_BT.shape[1]
        for position, target, weight in zip(batch.positions_N, batch.targets_N, batch.weights_N, strict=True):
            b, t = divmod(int(position), T)
            found.append((int(batch.slots_S[b]), t, int(target), float(weight)))
    return sorted(found)


def contents(batches):
    """Return every row's tokens by slot."""
    return {
        int(slot): batch.tokens_BT[b, : batch.lengths_S[b]].tolist()
        for batch in batches
        for b, slot in enumerate(batch.slots_S)
    }


@pytest.fixture
def examples(make_examples):
    return make_examples([5, 17, 3, 9, 9, 30, 2, 12, 8, 8, 21])


@pytest.mark.parametrize(("num_rows", "batch_size"), [(10, 3), (9, 3), (1, 4), (5, 5), (100, 16)])
def test_every_row_is_used_exactly_once_per_epoch(num_rows, batch_size):
    plan = Plan(num_rows, batch_size, seed=7)
    for epoch in range(3):
        steps = range(epoch * plan.updates_per_epoch + 1, (epoch + 1) * plan.updates_per_epoch + 1)
        rows = np.concatenate([plan.rows(step) for step in steps])
        assert sorted(rows) == list(range(num_rows))


def test_the_last_partial_batch_is_used():
    plan = Plan(10, 4, seed=0)
    assert plan.updates_per_epoch == 3
    assert [len(plan.rows(step)) for step in (1, 2, 3, 4)] == [4, 4, 2, 4]


def test_each_epoch_has_an_order_of_its_own():
    plan = Plan(50, 50, seed=0)
    assert not np.array_equal(plan.rows(1), plan.rows(2))


def test_the_rows_of_an_update_are_a_function_of_seed_and_step():
    assert np.array_equal(Plan(50, 8, seed=1).rows(9), Plan(50, 8, seed=1).rows(9))
    assert not np.array_equal(Plan(50, 8, seed=1).rows(9), Plan(50, 8, seed=2).rows(9))


@pytest.mark.parametrize("budget", [1, 16, 30, 64, 10_000])
def test_a_cut_respects_its_budget_unless_a_single_row_exceeds_it(examples, budget):
    batches = micro_batches(examples, Layout(budget))
    assert all(batch.tokens_BT.size <= budget or len(batch.lengths_S) == 1 for batch in batches)


@pytest.mark.parametrize("budget", [1, 16, 30, 64, 10_000])
def test_every_cut_teaches_the_same(examples, budget):
    whole = [make_batch(examples, range(len(examples)))]
    batches = micro_batches(examples, Layout(budget))
    assert facts(batches) == facts(whole)
    assert contents(batches) == contents(whole)


def test_a_cut_keeps_similar_lengths_together():
    lengths = [100, 1, 99, 2, 98, 3]
    groups = cut(lengths, micro_tokens=300)
    padded = sum(max(lengths[place] for place in group) * len(group) for group in groups)
    assert padded <= 100 * 3 + 3 * 3


def test_a_cut_does_not_depend_on_anything_but_lengths():
    assert cut([3, 9, 4, 8], micro_tokens=18) == cut([3, 9, 4, 8], micro_tokens=18) == [[1, 3], [2, 0]]
    assert cut([5, 5, 5], micro_tokens=10) == [[0, 1], [2]]


def test_each_supervised_token_is_predicted_from_the_place_before_it(examples):
    for batch in micro_batches(examples, Layout(64)):
        flat, T = batch.tokens_BT.reshape(-1), batch.tokens_BT.shape[1]
        assert np.array_equal(flat[batch.positions_N + 1], batch.targets_N)
        assert ((batch.positions_N + 1) % T != 0).all()  # the target stands in the same row
        assert (batch.positions_N % T + 1 < batch.lengths_S[batch.positions_N // T]).all()


def test_each_supervised_token_of_an_update_is_learned_once(examples):
    batches = micro_batches(examples, Layout(40))
    assert sum(len(batch.targets_N) for batch in batches) == sum(int(example.supervised.sum()) for example in examples)
    assert sum(batch.num_tokens for batch in batches) == sum(len(example.tokens) for example in examples)


def test_a_known_row_gives_the_batch_that_one_writes_down_by_hand():
    row = Example(np.array([7, 8, 9, 4], dtype=np.int32), np.array([False, False, True, True]), "x:1")
    other = Example(np.array([5, 6], dtype=np.int32), np.array([False, True]), "x:2")
    batch = make_batch([row, other], [3, 1])
    assert batch.tokens_BT.tolist() == [[7, 8, 9, 4], [5, 6, 0, 0]]
    assert batch.lengths_S.tolist() == [4, 2]
    assert batch.positions_N.tolist() == [1, 2, 4]
    assert batch.targets_N.tolist() == [9, 4, 6]
    assert batch.weights_N.tolist() == [1, 1, 1]
    assert batch.slots_S.tolist() == [3, 1]


def test_arrays_have_the_documented_types(examples):
    batch = make_batch(examples, range(len(examples)))
    kinds = {
        name: getattr(batch, name).dtype for name in ("tokens_BT", "lengths_S", "slots_S", "positions_N", "targets_N")
    }
    assert set(kinds.values()) == {np.dtype(np.int32)}
    assert batch.weights_N.dtype == np.float32


def test_update_batches_are_the_plans_rows(examples):
    plan = Plan(len(examples), 4, seed=5)
    batches = update_batches(examples, plan, 2, Layout(20))
    assert contents(batches) == {slot: examples[row].tokens.tolist() for slot, row in enumerate(plan.rows(2))}


def test_splitting_keeps_every_row_and_every_target(examples):
    for batch in micro_batches(examples, Layout(64)):
        parts = list(split(batch))
        assert facts(parts) == facts([batch])
        assert contents(parts) == contents([batch])
        assert [len(part.lengths_S) for part in parts] in (
            [1],
            [-(-len(batch.lengths_S) // 2), len(batch.lengths_S) // 2],
        )


def test_halving_ends_at_single_rows_and_loses_nothing(examples):
    micro = [make_batch(examples, range(len(examples)))]
    wanted = facts(micro), contents(micro)
    while max(len(batch.lengths_S) for batch in micro) > 1:
        micro = halve(micro)
        assert (facts(micro), contents(micro)) == wanted
    assert len(micro) == len(examples)


def test_halving_single_rows_says_how_long_they_are_and_what_to_do(make_examples):
    with pytest.raises(OutOfMemory, match=r"(?s)a single row of 30 tokens.*fix: .*data.max_length: 15"):
        halve([make_batch([example], [0]) for example in make_examples([30, 4])])


def test_a_cut_has_the_least_cost_of_all_cuts():
    """Against every way to cut eight sorted rows."""
    for seed in range(20):
        lengths = np.random.default_rng(seed).integers(1, 400, 8).tolist()
        ordered = sorted(lengths, reverse=True)
        costs = []
        for bits in product([False, True], repeat=7):
            edges = [0, *(n + 1 for n, is_edge in enumerate(bits) if is_edge), 8]
            groups = [ordered[a:b] for a, b in pairwise(edges)]
            if all(len(group) == 1 or group[0] * len(group) <= 1000 for group in groups):
                costs.append(sum(group[0] * len(group) + MICRO_COST for group in groups))
        found = [[lengths[place] for place in group] for group in cut(lengths, micro_tokens=1000)]
        assert sum(max(group) * len(group) + MICRO_COST for group in found) == min(costs)


def test_hardly_any_padding_remains(make_examples):
    lengths = np.random.default_rng(0).integers(20, 400, 64).tolist()
    batches = micro_batches(make_examples(lengths), Layout(4096))
    assert 1 - sum(lengths) / sum(batch.tokens_BT.size for batch in batches) < 0.08
