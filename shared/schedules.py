"""Learning-rate schedules: closures `step -> value`, pure, steps from 1."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from shared.config import ScheduleConfig

Schedule = Callable[[int], float]
WIDTH, HEIGHT = 72, 8  # characters of a drawing
EIGHTHS = " ▁▂▃▄▅▆▇█"
Curve = Callable[[float], float]  # share of the run, 0 to 1 -> factor, 1 to 0


def constant(*, peak: float) -> Schedule:
    """Return a schedule that always gives `peak`.

    >>> constant(peak=0.1)(7)
    0.1
    """
    return lambda step: peak


def falling(curve: Curve, *, peak: float, updates: int, final: float) -> Schedule:
    """Return a schedule from `peak` at step 1 to `peak * final` one step after the last of `updates`.

    >>> [round(falling(cosine, peak=1.0, updates=4, final=0.0)(step), 3) for step in (1, 2, 3, 4, 5)]
    [1.0, 0.854, 0.5, 0.146, 0.0]
    """

    def at(step: int) -> float:
        share = min(max(step - 1, 0) / max(updates, 1), 1.0)
        return peak * (final + (1 - final) * curve(share))

    return at


def linear(share: float) -> float:
    """Return a straight line."""
    return 1 - share


def cosine(share: float) -> float:
    """Return a half cosine. Source: Loshchilov and Hutter 2017 (SGDR), eq. 5, without restarts."""
    return 0.5 * (1 + math.cos(math.pi * share))


def restarting(share: float, *, cycles: int) -> float:
    """Return `cycles` half cosines, one after the other. Source: as `cosine`, cycles of one length.

    >>> [round(restarting(n / 4, cycles=2), 3) for n in range(5)]
    [1.0, 0.5, 1.0, 0.5, 0.0]
    """
    return cosine(share * cycles % 1) if share < 1 else 0.0


def held(share: float, *, decay: float) -> float:
    """Return 1 until the last share `decay`, then a straight line. Source: Hu et al. 2024 (MiniCPM), section 4.

    >>> [round(held(n / 4, decay=0.5), 3) for n in range(5)]
    [1.0, 1.0, 1.0, 0.5, 0.0]
    """
    return min((1 - share) / decay, 1.0)


def exponential(*, peak: float, updates: int, final: float) -> Schedule:
    """Return the powers of one factor, from `peak` at step 1 to `peak * final` one step after the last.

    >>> [round(exponential(peak=1.0, updates=2, final=0.01)(step), 3) for step in (1, 2, 3)]
    [1.0, 0.1, 0.01]
    """
    return lambda step: peak * final ** min(max(step - 1, 0) / max(updates, 1), 1.0)


def inverse_sqrt(*, peak: float, timescale: int, final: float) -> Schedule:
    """Return sqrt(timescale / (timescale + step - 1)) * peak, at least `peak * final`.

    With the warm-up's length as `timescale` it is 1 / sqrt(all steps). Source: Vaswani et al. 2017, eq. 3.

    >>> [round(inverse_sqrt(peak=1.0, timescale=3, final=0.0)(step), 3) for step in (1, 10)]
    [1.0, 0.5]
    """
    return lambda step: peak * max(final, math.sqrt(timescale / (timescale + max(step - 1, 0))))


def with_warmup(after: Schedule, *, warmup: int) -> Schedule:
    """Return a linear rise over `warmup` steps to the first value of `after`, then `after` from its step 1.

    >>> [with_warmup(constant(peak=1.0), warmup=2)(step) for step in (1, 2, 3, 4)]
    [0.3333333333333333, 0.6666666666666666, 1.0, 1.0]
    """

    def at(step: int) -> float:
        return after(1) * step / (warmup + 1) if step <= warmup else after(step - warmup)

    return at


def count_steps(length: float, *, updates: int) -> int:
    """Return a number of updates: a share of `updates` below 1, else a count.

    >>> count_steps(0.03, updates=500), count_steps(10, updates=500)
    (15, 10)
    """
    return min(round(length * updates) if length < 1 else round(length), updates)


def build_schedule(config: ScheduleConfig, *, lr: float, updates: int) -> Schedule:
    """Return the schedule of a config for a run of `updates` updates with peak `lr`."""
    warmup = count_steps(config.warmup, updates=updates)
    return with_warmup(behind_warmup(config, lr=lr, updates=updates, warmup=warmup), warmup=warmup)


def behind_warmup(config: ScheduleConfig, *, lr: float, updates: int, warmup: int) -> Schedule:
    """Return what a config's schedule does from the end of the warm-up, its step 1 being the first behind it."""
    rest, final = updates - warmup, config.final
    if config.name == "constant":
        return constant(peak=lr)
    if config.name == "exponential":
        return exponential(peak=lr, updates=rest, final=final)
    if config.name == "inverse_sqrt":
        return inverse_sqrt(peak=lr, timescale=max(warmup, 1), final=final)
    decay = min(max(count_steps(config.decay, updates=updates), 1) / max(rest, 1), 1.0)
    curves: dict[str, Curve] = {
        "linear": linear,
        "cosine": cosine,
        "cosine_with_restarts": partial(restarting, cycles=config.cycles),
        "polynomial": lambda share: linear(share) ** config.power,
        "warmup_stable_decay": partial(held, decay=decay),
    }
    return falling(curves[config.name], peak=lr, updates=rest, final=final)


def draw(schedule: Schedule, *, updates: int) -> list[str]:
    """Return the curve of a run as lines of text, in eighths of a character, with rates on the left.

    >>> print("\\n".join(draw(falling(linear, peak=1.0, updates=8, final=0.0), updates=8)[-2:]))
            0 ████████
              1      8  update
    """
    columns = min(updates, WIDTH)
    steps = [1 + round(column * (updates - 1) / max(columns - 1, 1)) for column in range(columns)]
    rates = [schedule(step) for step in steps]
    top = max(rates)
    lines = []
    for line in reversed(range(HEIGHT)):
        filled = (min(max(round(rate / top * HEIGHT * 8) - 8 * line, 0), 8) for rate in rates)
        label = f"{top:.3g}" if line == HEIGHT - 1 else "0" if line == 0 else ""
        lines.append(f"{label:>9} " + "".join(EIGHTHS[eighths] for eighths in filled))
    return [*lines, f"{'':10}1{updates:>{max(columns - 1, 0)}}  update"]
