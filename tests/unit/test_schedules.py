"""Schedules are their closed forms."""

from __future__ import annotations

import itertools
import math

import pytest

from shared.config import ScheduleConfig
from shared.schedules import build_schedule, constant, cosine, warmup_steps, with_warmup


def test_cosine_is_its_closed_form():
    schedule = cosine(peak=2.0, updates=10, final=0.1)
    for step in range(1, 12):
        share = (step - 1) / 10
        assert schedule(step) == pytest.approx(0.2 + 1.8 * (1 + math.cos(math.pi * share)) / 2, rel=1e-14)


def test_cosine_starts_at_the_peak_halves_in_the_middle_and_stays_at_the_end():
    schedule = cosine(peak=1.0, updates=100, final=0.25)
    assert schedule(1) == 1.0
    assert schedule(51) == pytest.approx(0.625)
    assert schedule(101) == pytest.approx(0.25)
    assert schedule(10_000) == pytest.approx(0.25)


def test_cosine_never_rises():
    values = [cosine(peak=1.0, updates=50, final=0.0)(step) for step in range(1, 60)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(values))


def test_warmup_is_a_line_to_the_peak_that_never_is_zero():
    schedule = with_warmup(constant(peak=3.0), warmup=4)
    assert [schedule(step) for step in range(1, 7)] == pytest.approx([0.6, 1.2, 1.8, 2.4, 3.0, 3.0])


def test_behind_the_warmup_the_schedule_starts_from_its_own_first_step():
    after = cosine(peak=1.0, updates=10, final=0.0)
    schedule = with_warmup(after, warmup=3)
    assert [schedule(step) for step in range(4, 15)] == [after(step) for step in range(1, 12)]


def test_no_warmup_changes_nothing():
    after = cosine(peak=1.0, updates=10, final=0.0)
    assert [with_warmup(after, warmup=0)(step) for step in range(1, 12)] == [after(step) for step in range(1, 12)]


@pytest.mark.parametrize(
    ("warmup", "updates", "steps"),
    [(0.0, 100, 0), (0.03, 500, 15), (0.5, 9, 4), (1, 500, 1), (10, 500, 10), (900, 500, 500), (0.03, 1, 0)],
)
def test_warmup_is_a_share_below_one_and_a_count_from_one(warmup, updates, steps):
    assert warmup_steps(warmup, updates=updates) == steps


@pytest.mark.parametrize("name", ["constant", "cosine"])
@pytest.mark.parametrize("updates", [1, 2, 7, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.3, 5, 1000])
def test_every_learning_rate_of_a_run_is_positive_and_at_most_the_peak(name, updates, warmup):
    schedule = build_schedule(ScheduleConfig(name=name, warmup=warmup, final=0.0), lr=0.1, updates=updates)
    values = [schedule(step) for step in range(1, updates + 1)]
    assert all(0 < value <= 0.1 for value in values)


def test_a_run_reaches_its_peak_right_behind_the_warmup():
    schedule = build_schedule(ScheduleConfig(name="cosine", warmup=10, final=0.1), lr=0.5, updates=100)
    assert schedule(11) == 0.5
    assert max(schedule(step) for step in range(1, 101)) == 0.5
    assert schedule(101) == pytest.approx(0.05)


def test_a_schedule_is_pure():
    schedule = build_schedule(ScheduleConfig(), lr=1e-4, updates=50)
    assert schedule(20) == [schedule(step) for step in (50, 1, 20)][-1]
