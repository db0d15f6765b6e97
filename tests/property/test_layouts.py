"""Properties of micro-batches: every example once, within the budget, nothing lost by cutting them again."""

from __future__ import annotations

import time

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from shared import seeds
from shared.data.batch import make_batch, make_segment, micro_batches
from shared.data.cut import halve, join, pack, split, take_apart
from shared.data.layout import Layout
from shared.types import Batch, Example

LENGTHS = st.lists(st.integers(2, 500), min_size=1, max_size=60)
BUDGET = st.integers(1, 2000)
SIDES = st.sampled_from(["right", "left"])
FIELDS = ("tokens_BT", "starts_S", "lengths_S", "slots_S", "positions_N", "targets_N", "weights_N")


@st.composite
def updates(draw) -> list[Example]:
    """Draw an update's examples: at least one supervised token each, never the first."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    examples = []
    for number, length in enumerate(draw(st.lists(st.integers(2, 40), min_size=1, max_size=12))):
        supervised = random.random(length) < 0.5
        supervised[0], supervised[-1] = False, True
        examples.append(Example(random.integers(0, 99, length, dtype=np.int32), supervised, f"x:{number + 1}"))
    return examples


def same(one: Batch, other: Batch) -> bool:
    pairs = [(getattr(one, name), getattr(other, name)) for name in FIELDS]
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


def facts(batches: list[Batch]) -> list[tuple[int, int, int, float]]:
    """Return what a set of micro-batches teaches, by loops: (slot, place, target, weight), sorted."""
    found = []
    for batch in batches:
        for s, (start, length) in enumerate(zip(batch.starts_S, batch.lengths_S, strict=True)):
            for n, position in enumerate(batch.positions_N):
                if start <= position < start + length and batch.weights_N[n]:
                    found.append((int(batch.slots_S[s]), int(position - start), int(batch.targets_N[n]), 1.0))
    return sorted(found)


@given(LENGTHS, BUDGET)
def test_packing_takes_every_example_once_and_keeps_its_budget(lengths, micro_tokens):
    groups = pack(lengths, micro_tokens=micro_tokens)
    assert sorted(place for group in groups for place in group) == list(range(len(lengths)))
    sums = [sum(lengths[place] for place in group) for group in groups]
    assert all(group for group in groups)
    assert all(total <= micro_tokens or len(group) == 1 for total, group in zip(sums, groups, strict=True))


@given(LENGTHS, BUDGET)
def test_packed_groups_differ_by_no_more_than_an_example(lengths, micro_tokens):
    """Longest first into the shortest: a group is ahead of the shortest by no more than what came to it last."""
    groups = pack(lengths, micro_tokens=micro_tokens)
    sums = [sum(lengths[place] for place in group) for group in groups]
    for total, group in zip(sums, groups, strict=True):
        assert total - min(sums) <= min(lengths[place] for place in group)


@given(LENGTHS, BUDGET)
def test_packing_needs_no_more_groups_than_the_next_smaller_number_would_overfill(lengths, micro_tokens):
    """At least as many as the tokens fill, and fewer than two for every budget's worth of what shares a group."""
    groups = pack(lengths, micro_tokens=micro_tokens)
    assert len(groups) >= min(-(-sum(lengths) // micro_tokens), len(lengths))
    if max(lengths) * 2 <= micro_tokens:
        assert len(groups) <= 2 * -(-sum(lengths) // micro_tokens)


@given(updates(), st.booleans(), SIDES)
def test_what_was_joined_comes_apart_and_joins_to_the_same(examples, packed, side):
    segments = [make_segment(example, slot) for slot, example in enumerate(examples)]
    batch = join(segments, packed=packed, padding_side=side)
    again = list(take_apart(batch))
    for one, other in zip(segments, again, strict=True):
        assert one.slot == other.slot
        for name in ("tokens", "positions_N", "targets_N", "weights_N"):
            assert np.array_equal(getattr(one, name), getattr(other, name)), name
    assert same(join(again, packed=packed, padding_side=side), batch)


@given(updates(), st.booleans(), SIDES)
def test_halves_teach_what_the_whole_teaches_down_to_single_examples(examples, packed, side):
    micro = [make_batch(examples, range(len(examples)), packed=packed, padding_side=side)]
    taught = facts(micro)
    assert len(taught) == sum(int(example.supervised.sum()) for example in examples)
    while max(len(batch.lengths_S) for batch in micro) > 1:
        micro = halve(micro)
        assert facts(micro) == taught
        assert all(ends_on(side, batch) for batch in micro)
        if packed:
            assert all(batch.tokens_BT.size == batch.num_tokens for batch in micro)  # nothing padded by the split
    assert len(micro) == len(examples)
    assert all(same(one, next(split(one))) for one in micro)


@given(updates(), BUDGET, st.booleans(), SIDES)
def test_every_layout_teaches_the_same(examples, micro_tokens, packed, side):
    batches = micro_batches(examples, Layout(micro_tokens, packed=packed, padding_side=side))
    assert facts(batches) == facts([make_batch(examples, range(len(examples)))])
    for batch in batches:
        assert ends_on(side, batch)
        assert np.array_equal(batch.tokens_BT.reshape(-1)[batch.positions_N + 1], batch.targets_N)


def ends_on(side: str, batch: Batch) -> bool:
    """Return whether every row of a micro-batch has its padding on that side, and names it."""
    rows, width = batch.tokens_BT.shape
    pads = [width - int(length) if side == "left" else 0 for length in batch.lengths_S]
    return batch.pads_B.tolist() == (pads if len(pads) == rows and not batch.is_packed else [0] * rows)


@given(updates(), st.booleans(), SIDES)
def test_places_are_those_of_the_obvious_loop(examples, packed, side):
    slots = [7 * n + 3 for n in range(len(examples))]
    batch = make_batch(examples, slots, packed=packed, padding_side=side)
    slots_BT, times_BT = batch.places()
    assert slots_BT.shape == times_BT.shape == batch.tokens_BT.shape
    for slot, start, length in zip(batch.slots_S, batch.starts_S, batch.lengths_S, strict=True):
        for place in range(length):
            assert slots_BT.reshape(-1)[start + place] == slot
            assert times_BT.reshape(-1)[start + place] == place


@given(updates(), st.sampled_from([0.1, 0.5]))
@settings(max_examples=30)
def test_dropout_of_a_packed_example_is_that_of_the_padded_one_token_by_token(examples, p):
    from mlxlora.adapters import Dropout as OnMLX
    from torch_backend.adapters import Dropout as OnTorch

    packed, padded = (make_batch(examples, range(len(examples)), packed=flag) for flag in (True, False))
    left = make_batch(examples, range(len(examples)), padding_side="left")
    masks = []
    for batch in (packed, padded, left):
        keys = {"seed": 1, "step": 9, "places": batch.places()}
        on_mlx, on_torch = OnMLX(p=p), OnTorch(p=p)
        on_mlx.begin(**keys)
        on_torch.begin(**keys, device="cpu")
        both = [np.array(on_mlx.mask("a.q_proj", width=8)), on_torch.mask("a.q_proj", width=8).numpy()]
        assert np.array_equal(*both)
        masks.append(both[0].reshape(-1, 8))
    for n, length in enumerate(packed.lengths_S):
        batches = zip(masks, (packed, padded, left), strict=True)
        one, *others = (mask[b.starts_S[n] : b.starts_S[n] + length] for mask, b in batches)
        assert all(np.array_equal(one, other) for other in others)
        exact = seeds.dropout_mask(seed=1, step=9, name="a.q_proj", slots=[n], shape=(int(length), 8), p=p)[0]
        assert np.array_equal(one, exact)


def test_a_large_evaluation_is_packed_in_little_time():
    """Of 20,000 rows two fill two thirds of a micro-batch: their number of groups is far from what the tokens fill.

    By one group at a time it took 0.4 s for 2,000 rows, and four times as long for twice as many.
    """
    began = time.process_time()
    assert 10_000 <= len(pack([350] * 20_000, micro_tokens=1024)) <= 10_100
    assert time.process_time() - began < 20
