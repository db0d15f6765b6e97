"""Batches made ahead are the batches, whoever makes them and whatever happens in between."""

from __future__ import annotations

import threading
from dataclasses import astuple

import numpy as np
import pytest

from shared.data.ahead import Ahead
from shared.data.batch import Plan, update_batches
from shared.data.layout import Layout
from shared.seeds import row_order


@pytest.fixture
def make(make_examples):
    """Return the micro-batches of a step of a run."""
    examples, plan = make_examples([5, 9, 40, 7, 12, 30, 8]), Plan(num_rows=7, batch_size=3, seed=4)
    return lambda step, layout: update_batches(examples, plan, step, layout)


def same(some, others):
    return len(some) == len(others) and all(
        np.array_equal(a, b)
        for one, other in zip(some, others, strict=True)
        for a, b in zip(astuple(one), astuple(other), strict=True)
    )


def test_every_update_gets_its_own_batches(make):
    ahead = Ahead(make)
    for step in range(1, 12):
        assert same(ahead.take(step, Layout(64)), make(step, Layout(64)))


def test_smaller_pieces_are_made_anew_and_any_step_may_follow(make):
    ahead = Ahead(make)
    for step, micro in ((1, 64), (2, 64), (3, 20), (4, 20), (9, 20), (9, 20), (1, 64)):
        assert same(ahead.take(step, Layout(micro)), make(step, Layout(micro)))


def test_the_next_update_is_made_while_this_one_is_at_work():
    begun, callers = threading.Event(), {}

    def note(step, layout):
        callers[step] = threading.current_thread()
        if step == 2:
            begun.set()
        return []

    ahead = Ahead(note)
    ahead.take(1, Layout(8))
    assert begun.wait(timeout=60), "made although nobody has asked for it yet"
    ahead.take(2, Layout(8))
    assert callers[1] is threading.main_thread()
    assert callers[2] is not threading.main_thread()


def test_an_exception_comes_out_of_the_update_it_belongs_to():
    def fail(step, layout):
        if step == 3:
            raise MemoryError("no room for update 3")
        return []

    ahead = Ahead(fail)
    ahead.take(1, Layout(8))
    ahead.take(2, Layout(8))
    with pytest.raises(MemoryError, match="update 3"):
        ahead.take(3, Layout(8))
    assert ahead.take(4, Layout(8)) == []


def test_the_order_of_an_epoch_is_made_once_and_cannot_be_changed():
    order = row_order(seed=1, epoch=2, num_rows=10)
    assert row_order(seed=1, epoch=2, num_rows=10) is order
    assert sorted(order.tolist()) == list(range(10))
    with pytest.raises(ValueError, match="read-only"):
        order[0] = 0
