"""Schedules are their closed forms."""

from __future__ import annotations

import itertools
import math
from typing import get_args

import pytest
import torch
from transformers import get_scheduler

from shared.config import ScheduleConfig
from shared.config_file import build_config
from shared.jobs.train import train
from shared.schedules import build_schedule, constant, cosine, count_steps, falling, with_warmup


def test_cosine_is_its_closed_form():
    schedule = falling(cosine, peak=2.0, updates=10, final=0.1)
    for step in range(1, 12):
        share = (step - 1) / 10
        assert schedule(step) == pytest.approx(0.2 + 1.8 * (1 + math.cos(math.pi * share)) / 2, rel=1e-14)


def test_cosine_starts_at_the_peak_halves_in_the_middle_and_stays_at_the_end():
    schedule = falling(cosine, peak=1.0, updates=100, final=0.25)
    assert schedule(1) == 1.0
    assert schedule(51) == pytest.approx(0.625)
    assert schedule(101) == pytest.approx(0.25)
    assert schedule(10_000) == pytest.approx(0.25)


def test_cosine_never_rises():
    values = [falling(cosine, peak=1.0, updates=50, final=0.0)(step) for step in range(1, 60)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(values))


def test_warmup_is_a_line_to_the_peak_that_never_is_zero():
    schedule = with_warmup(constant(peak=3.0), warmup=4)
    assert [schedule(step) for step in range(1, 7)] == pytest.approx([0.6, 1.2, 1.8, 2.4, 3.0, 3.0])


def test_behind_the_warmup_the_schedule_starts_from_its_own_first_step():
    after = falling(cosine, peak=1.0, updates=10, final=0.0)
    schedule = with_warmup(after, warmup=3)
    assert [schedule(step) for step in range(4, 15)] == [after(step) for step in range(1, 12)]


def test_no_warmup_changes_nothing():
    after = falling(cosine, peak=1.0, updates=10, final=0.0)
    assert [with_warmup(after, warmup=0)(step) for step in range(1, 12)] == [after(step) for step in range(1, 12)]


@pytest.mark.parametrize(
    ("warmup", "updates", "steps"),
    [(0.0, 100, 0), (0.03, 500, 15), (0.5, 9, 4), (1, 500, 1), (10, 500, 10), (900, 500, 500), (0.03, 1, 0)],
)
def test_warmup_is_a_share_below_one_and_a_count_from_one(warmup, updates, steps):
    assert count_steps(warmup, updates=updates) == steps


NAMES = get_args(ScheduleConfig.model_fields["name"].annotation)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("updates", [1, 2, 7, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.3, 5, 1000])
def test_every_learning_rate_of_a_run_is_positive_and_at_most_the_peak(name, updates, warmup):
    final = 0.01 if name == "exponential" else 0.0
    schedule = build_schedule(ScheduleConfig(name=name, warmup=warmup, final=final), lr=0.1, updates=updates)
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


def test_an_exponential_that_would_end_at_zero_is_refused():
    with pytest.raises(ValueError, match="a final above 0"):
        ScheduleConfig(name="exponential")


LR, WARMUP, UPDATES = 0.5, 10, 60


def rates_of(scheduler, optimizer):
    """Return the learning rate of every update of a run."""
    rates = []
    for _ in range(UPDATES):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(
    ("name", "final", "options"),
    [
        ("linear", 0.0, {}),
        ("cosine", 0.0, {}),
        ("cosine_with_restarts", 0.0, {"num_cycles": 2}),
        ("polynomial", 0.1, {"lr_end": 0.1 * LR, "power": 2.0}),
        ("inverse_sqrt", 0.0, {}),
        ("warmup_stable_decay", 0.1, {"num_decay_steps": 15, "decay_type": "linear", "min_lr_ratio": 0.1}),
    ],
)
def test_behind_the_warmup_rates_are_those_of_transformers(name, final, options):
    """Its warm-up is another: it begins with an update at rate 0."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=LR)
    scheduler = get_scheduler(name, optimizer, WARMUP, UPDATES, scheduler_specific_kwargs=options)
    ours = build_schedule(ScheduleConfig(name=name, warmup=WARMUP, final=final, decay=15), lr=LR, updates=UPDATES)
    wanted = rates_of(scheduler, optimizer)[WARMUP:]
    assert [ours(step) for step in range(WARMUP + 1, UPDATES + 1)] == pytest.approx(wanted, rel=1e-12)


def test_exponential_is_that_of_torch():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=LR)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.01 ** (1 / UPDATES))
    ours = build_schedule(ScheduleConfig(name="exponential", warmup=0, final=0.01), lr=LR, updates=UPDATES)
    assert [ours(step) for step in range(1, UPDATES + 1)] == pytest.approx(rates_of(scheduler, optimizer), rel=1e-12)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("constant", "inverse_sqrt")])
def test_one_step_behind_the_last_every_rate_that_falls_is_the_final_share(name):
    schedule = build_schedule(ScheduleConfig(name=name, warmup=3, final=0.2), lr=LR, updates=UPDATES)
    assert [schedule(step) for step in (UPDATES + 1, 10 * UPDATES)] == pytest.approx([0.2 * LR] * 2)


@pytest.mark.parametrize("warmup", [1, 3, 50])
def test_a_warm_up_as_long_as_the_run_is_said(tiny_model_folder, write_jsonl, tmp_path, warmup):
    class Notes:
        def __init__(self) -> None:
            self.texts: list[str] = []

        def on_note(self, text: str) -> None:
            self.texts.append(text)

    notes, data = Notes(), write_jsonl({"text": "hello world"})
    values = {"model": str(tiny_model_folder()), "data": {"path": str(data)}, "output": str(tmp_path / "run")}
    settings = {"train": {"updates": 3, "dtype": "float32"}, "schedule": {"warmup": warmup}, "backend": "torch"}
    train(build_config({**values, **settings}), callbacks=[notes])
    said = [text for text in notes.texts if "warmup" in text]
    words = f"schedule.warmup is {warmup}, the run has 3 updates: the learning rate rises to its end"
    assert said == ([words] if warmup >= 3 else [])
