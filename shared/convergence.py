"""Does the training loss still fall? Its slope over windows of logged updates, with a confidence interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np

from shared.config import RunConfig

NARROW = 0.02  # of the mean loss: an interval within it is told as level, a wider one as noise
WINDOW = 32  # logged updates per test
FALSE_ALARMS = 0.03  # share of runs of mere noise in which the loss is ever said to fall or to rise, at most


@dataclass(frozen=True)
class Trend:
    """The slope of a window: the change of the loss per update, and its confidence interval."""

    slope: float
    low: float
    high: float

    @property
    def verdict(self) -> Literal["falls", "rises", "is level"]:
        """Return what the interval leaves possible."""
        return "falls" if self.high < 0 else "rises" if self.low > 0 else "is level"


def t_quantile(probability: float, freedom: int) -> float:
    """Return Student's t quantile. Source: Abramowitz and Stegun 1964, 26.7.5; off by 0.1 % at 30 degrees of freedom.

    >>> round(t_quantile(0.975, 30), 3)
    2.042
    """
    z = NormalDist().inv_cdf(probability)
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / freedom + second / freedom**2


def find_trend(steps: Sequence[float], losses: Sequence[float], *, alpha: float) -> Trend:
    """Return the least-squares slope with its interval at confidence 1 - alpha; noise is taken as independent."""
    x, y = np.array(steps, np.float64), np.array(losses, np.float64)
    x, y = x - x.mean(), y - y.mean()
    slope = float(x @ y / (x @ x))
    rest = y - slope * x
    half = t_quantile(1 - alpha / 2, len(x) - 2) * math.sqrt(float(rest @ rest) / (len(x) - 2) / float(x @ x))
    return Trend(slope, slope - half, slope + half)


class ConvergenceCheck:
    """A callback that says after every WINDOW logged updates whether the training loss falls, rises or is level.

    Test number n takes the share 1 / (n (n + 1)) of FALSE_ALARMS, so that all tests of a run together stay below it.
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        self.note, self.tests = note, 0
        self.points: list[tuple[int, float]] = []

    def on_step(self, row: Mapping[str, Any]) -> None:
        """Take a row of metrics; test where a window is full."""
        if "loss" in row:
            self.points.append((row["step"], row["loss"]))
        if len(self.points) < WINDOW:
            return
        self.tests += 1
        alpha = FALSE_ALARMS / (self.tests * (self.tests + 1))
        steps, losses = zip(*self.points, strict=True)
        found = find_trend(steps, losses, alpha=alpha)
        low, high = (change * (steps[-1] - steps[0]) for change in (found.low, found.high))
        narrow = max(-low, high) < NARROW * abs(float(np.mean(losses)))
        hint = (
            "" if found.verdict != "is level" else ": it may have converged" if narrow else ": too noisy to tell more"
        )
        self.note(
            f"updates {steps[0]} to {steps[-1]}: the training loss {found.verdict}, by {low:+.3f} to {high:+.3f} nats "
            f"({1 - alpha:.1%} sure; of runs that only waver at most {FALSE_ALARMS:.0%} are ever told otherwise){hint}"
        )
        self.points.clear()


def convergence_checks(config: RunConfig, note: Callable[[str], None]) -> list[Any]:
    """Return the callback that a config asks for, or none."""
    return [ConvergenceCheck(note)] if config.evaluation.convergence else []
