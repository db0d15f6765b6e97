"""What the benchmark scripts of this folder share: who and where they are, and the one way to write a result."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shared.machine import this_machine
from shared.registry import find_backend


@dataclass(frozen=True)
class Power:
    """y = factor * x ** exponent, with the exponent's standard error (None where two points leave none)."""

    exponent: float
    standard_error: float | None
    factor: float


def fit_power(x: Sequence[float], y: Sequence[float]) -> Power:
    """Return the power law nearest to the points: least squares of log y on log x.

    Its standard error is that of a slope with n - 2 degrees of freedom. Raises ValueError for fewer than two different
    x, and for values that have no logarithm.

    >>> fit_power([1, 2, 4], [3, 12, 48])
    Power(exponent=2.0, standard_error=0.0, factor=3.0)
    """
    if len(set(x)) < 2 or min(*x, *y) <= 0:
        raise ValueError(f"no power law through {list(x)} and {list(y)}")
    u, v = [math.log(one) for one in x], [math.log(one) for one in y]
    mean_u, mean_v = sum(u) / len(u), sum(v) / len(v)
    square = sum((one - mean_u) ** 2 for one in u)
    slope = sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True)) / square
    residual = sum((b - mean_v - slope * (a - mean_u)) ** 2 for a, b in zip(u, v, strict=True))
    error = math.sqrt(residual / (len(u) - 2) / square) if len(u) > 2 else None
    rounded = None if error is None else round(error, 9)
    return Power(round(slope, 9), rounded, round(math.exp(mean_v - slope * mean_u), 9))


def heading(backends: list[str]) -> dict[str, Any]:
    """Return date, machine, versions and command, as every result has them."""
    machine = this_machine()
    hardware = f"{machine.processor}, {machine.cores} cores, {machine.memory_bytes / 2**30:.0f} GiB"
    versions: dict[str, str] = {}
    for name in backends:
        versions |= find_backend(name).probe().versions
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{hardware}, {machine.system}",
        "devices": {name: find_backend(name).probe().reason for name in backends},
        "versions": versions,
        "command": f"python benchmarks/{Path(sys.argv[0]).name} {shlex.join(shorten(word) for word in sys.argv[1:])}",
    }


def shorten(word: str) -> str:
    """Return an argument without the folders of an absolute path: they are nobody else's.

    >>> shorten("/a/b/model"), shorten("--quick")
    ('model', '--quick')
    """
    return Path(word).name if Path(word).is_absolute() else word


def write(output: Path | None, result: dict[str, Any]) -> None:
    """Write the result where one is asked for."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"written: {output.name}")
