"""What a device reaches at best, measured: square matmuls and a big copy; and the file that remembers it.

`mlxlora bench` writes the file; whoever predicts times reads it with `read_ceilings`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from shared.durable import write_json
from shared.machine import processor_name
from shared.protocols import Backend

DTYPES = ("float32", "bfloat16")
SIZES = (256, 512, 1024, 2048, 4096, 8192)  # of square matrices
LONG_ENOUGH_S = 0.03  # one matmul of this time is big enough: larger ones would be no faster, only longer
TIMED_S = 0.1
REPEATS = 3
COPY_BYTES = 2**30  # far beyond any cache
COPY_SHARE = 16  # of memory: two arrays of 1/16 each


@dataclass(frozen=True)
class Ceilings:
    """What one backend reaches at best on one device, and when, where and with what this was measured."""

    backend: str
    device: str  # "cpu" or "gpu"
    processor: str
    matmul_flop_per_s: Mapping[str, float]  # by dtype: 2 S^3 operations for two (S, S) matrices
    copy_bytes_per_s: float  # bytes read plus bytes written
    date: str
    versions: Mapping[str, str]
    threads: str | None  # OMP_NUM_THREADS, where it is set


def measure_ceilings(backend: Backend) -> Ceilings:
    """Return the ceilings of a backend on the device it would train on; takes a few seconds."""
    found = backend.probe()
    return Ceilings(
        backend=backend.name,
        device=found.device,
        processor=processor_name(),
        matmul_flop_per_s={dtype: matmul_rate(backend, dtype) for dtype in DTYPES},
        copy_bytes_per_s=copy_rate(backend),
        date=datetime.now(UTC).date().isoformat(),
        versions=dict(found.versions),
        threads=os.environ.get("OMP_NUM_THREADS"),
    )


def matmul_rate(backend: Backend, dtype: str) -> float:
    """Return operations per second of the best of growing square matmuls."""
    best = 0.0
    for size in SIZES:
        took = time_of(backend.workload("matmul", size=size, dtype=dtype, device=None))
        best = max(best, 2 * size**3 / took)
        if took > LONG_ENOUGH_S:
            break
    return best


def copy_rate(backend: Backend) -> float:
    """Return bytes per second of a copy, those read and those written both counted."""
    num_bytes = min(COPY_BYTES, psutil.virtual_memory().available // COPY_SHARE)
    return 2 * num_bytes / time_of(backend.workload("copy", size=num_bytes, dtype="float32", device=None))


def time_of(run: Callable[[int], None]) -> float:
    """Return the seconds of doing it once, the least of some repeats of a burst that is long enough to time."""
    run(1)  # the first call compiles, fills caches and maps memory
    times, took = 1, timed(run, 1)
    while took < TIMED_S:
        times = min(max(2 * times, int(times * TIMED_S / max(took, 1e-6))), 64 * times)
        took = timed(run, times)
    return min(took, *(timed(run, times) for _ in range(REPEATS - 1))) / times


def timed(run: Callable[[int], None], times: int) -> float:
    """Return the seconds that `run(times)` takes."""
    began = time.perf_counter()
    run(times)
    return time.perf_counter() - began


def ceilings_path() -> Path:
    """Return the file in the user's cache folder that holds the ceilings of this machine's backends."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mlxlora" / "ceilings.json"
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if os.path.isabs(root) else Path.home() / ".cache") / "mlxlora" / "ceilings.json"


def read_ceilings(backend: str, device: str) -> Ceilings | None:
    """Return what was measured last on this machine, None where nothing was.

    backend: "mlx" or "torch"; device: "cpu" or "gpu", as a backend's probe has it.
    """
    found = read_all().get(key_of(backend, device, processor_name()))
    try:
        known = Ceilings(**found) if isinstance(found, dict) else None
        usable = known is not None and all(rate > 0 for rate in rates_of(known))
    except (TypeError, ValueError, AttributeError):  # written by another version, or by hand
        return None
    return known if usable else None


def write_ceilings(ceilings: Ceilings) -> Path:
    """Keep the ceilings beside those of other backends and devices, and return the file; raises OSError."""
    path = ceilings_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    every = {**read_all(), key_of(ceilings.backend, ceilings.device, ceilings.processor): asdict(ceilings)}
    write_json(path, every)
    return path


def read_all() -> dict[str, Any]:
    """Return everything in the file, nothing where there is none or it is damaged: it can be measured again."""
    try:
        found = json.loads(ceilings_path().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def key_of(backend: str, device: str, processor: str) -> str:
    """Return the name of an entry; with the processor, as a home folder may be shared by several machines."""
    return f"{backend} on {device}, {processor}"


def rates_of(ceilings: Ceilings) -> list[float]:
    """Return every rate as a number; raises TypeError or ValueError where one is not."""
    return [float(rate) for rate in (*ceilings.matmul_flop_per_s.values(), ceilings.copy_bytes_per_s)]
