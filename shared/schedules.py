"""Learning-rate schedules: closures `step -> value`, pure, steps from 1."""

from __future__ import annotations

import math
from collections.abc import Callable

from shared.config import ScheduleConfig

Schedule = Callable[[int], float]


def constant(*, peak: float) -> Schedule:
    """Return a schedule that always gives `peak`.

    >>> constant(peak=0.1)(7)
    0.1
    """
    return lambda step: peak


def cosine(*, peak: float, updates: int, final: float) -> Schedule:
    """Return a half cosine from `peak` at step 1 to `peak * final` one step after the last of `updates`.

    Source: Loshchilov and Hutter 2017 (SGDR), eq. 5, without restarts.

    >>> [round(cosine(peak=1.0, updates=4, final=0.0)(step), 3) for step in (1, 2, 3, 4, 5)]
    [1.0, 0.854, 0.5, 0.146, 0.0]
    """

    def at(step: int) -> float:
        share = min(max(step - 1, 0) / max(updates, 1), 1.0)
        return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * share)))

    return at


def with_warmup(after: Schedule, *, warmup: int) -> Schedule:
    """Return a linear rise over `warmup` steps to the first value of `after`, then `after` from its step 1.

    >>> [with_warmup(constant(peak=1.0), warmup=2)(step) for step in (1, 2, 3, 4)]
    [0.3333333333333333, 0.6666666666666666, 1.0, 1.0]
    """

    def at(step: int) -> float:
        return after(1) * step / (warmup + 1) if step <= warmup else after(step - warmup)

    return at


def warmup_steps(warmup: float, *, updates: int) -> int:
    """Return the number of warm-up updates: a share of `updates` below 1, else a count.

    >>> warmup_steps(0.03, updates=500), warmup_steps(10, updates=500)
    (15, 10)
    """
    return min(round(warmup * updates) if warmup < 1 else round(warmup), updates)


def build_schedule(config: ScheduleConfig, *, lr: float, updates: int) -> Schedule:
    """Return the schedule of a config for a run of `updates` updates with peak `lr`."""
    warmup = warmup_steps(config.warmup, updates=updates)
    if config.name == "constant":
        return with_warmup(constant(peak=lr), warmup=warmup)
    return with_warmup(cosine(peak=lr, updates=updates - warmup, final=config.final), warmup=warmup)
