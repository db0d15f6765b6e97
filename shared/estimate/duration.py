"""The time of an update from its operations, and the matmul rate that a machine has been measured at."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shared.ceilings import read_ceilings
from shared.config import RunConfig
from shared.estimate.plan import Lengths
from shared.estimate.shapes import Shape
from shared.types import Recompute

UTILISATION = 0.5  # share of the measured matmul rate that an update reaches: issue 3's target on a GPU


@dataclass(frozen=True)
class Time:
    """Seconds per update, and where the rate is from; None where no rate is known."""

    operations: float  # floating-point, of a mean update
    seconds: float | None
    rate: float | None  # operations per second of a large matmul
    source: str


def operations(config: RunConfig, shape: Shape, lengths: Lengths, *, recompute: Recompute) -> float:
    """Return the floating-point operations of a mean update.

    A weight costs 2 per token forward and 2 for the gradient of what it reads; 2 more where it is trained, and 2 more
    with recompute. Attention costs 4 T^2 per row and width forward, twice that backward. The head sees only supervised
    tokens.
    """
    fair = slice(lengths.num_fair)
    tokens, supervised = (np.asarray(some[fair], dtype=float) for some in (lengths.tokens, lengths.supervised))
    rows = config.train.batch_size
    full = config.adapter.type == "none"
    per_weight = 4 + 2 * full + 2 * bool(recompute)
    active = shape.chosen * sum(out * wide for _, out, wide in shape.info.experts.values())
    linear = per_weight * (shape.info.num_parameters + active) * tokens.mean()
    attention = (3 + bool(recompute)) * 4 * shape.info.num_layers * shape.attention * (tokens**2).mean()
    head = (4 + 2 * full) * shape.info.vocab_size * shape.width * supervised.mean()
    return float(rows * (linear + attention + head))


def update_time(amount: float, *, backend: str, place: str, dtype: str, tflops: float | None) -> Time:
    """Return the time of so many operations: at a rate given, or at the one `mlxlora bench` has measured here."""
    rate, source = (tflops * 1e12, "--tflops") if tflops else measured_rate(backend, place=place, dtype=dtype)
    return Time(amount, amount / (rate * UTILISATION) if rate else None, rate, source)


def measured_rate(backend: str, *, place: str, dtype: str) -> tuple[float | None, str]:
    """Return the matmul rate of this machine, None where nothing has measured it."""
    found = read_ceilings(backend, place.rpartition("-")[2])
    if found is None:
        return None, "unknown; run mlxlora bench, or give a rate with --tflops"
    return found.matmul_flop_per_s.get(dtype), f"mlxlora bench of {found.date}"
