"""Matmuls and copies that `mlxlora bench` times, and memory figures, are what they are called."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from shared.ceilings import DTYPES, measure_ceilings

ROOT = Path(__file__).resolve().parents[2]


def seconds(run, times: int) -> float:
    """Return the least processor time of three tries; a busy machine does not lengthen it."""
    found = []
    for _ in range(3):
        wall, process = time.perf_counter(), time.process_time()
        run(times)
        found.append(min(time.perf_counter() - wall, time.process_time() - process))
    return min(found)


@pytest.mark.parametrize(("kind", "size"), [("matmul", 384), ("copy", 2**25)])
def test_a_workload_is_done_as_often_as_asked_before_it_returns(backend, place, kind, size):
    run = backend.workload(kind, size=size, dtype="float32", device=place[1])
    run(2)
    assert seconds(run, 24) > 4 * seconds(run, 3), "eight times the work"


def test_ceilings_are_rates_of_this_device(backend, place):
    if place[1] != backend.probe().device:
        pytest.skip(f"{backend.name} takes the {backend.probe().device} of this machine")
    found = measure_ceilings(backend)
    assert (found.backend, found.device) == (backend.name, place[1])
    assert set(found.matmul_flop_per_s) == set(DTYPES)
    assert all(np.isfinite(rate) and rate > 1e8 for rate in found.matmul_flop_per_s.values())
    assert 1e8 < found.copy_bytes_per_s < 1e14
    assert found.versions


def test_the_peak_of_a_program_is_not_that_of_the_program_that_started_it():
    code = (
        "import json, torch; from torch_backend.memory import read_memory;"
        "found = read_memory(torch.device('cpu')); print(json.dumps([found.active, found.peak]))"
    )
    ballast = np.ones(200_000_000)  # 1.6 GB, more than importing torch takes
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    active, peak = json.loads(done.stdout)
    assert 0 < active <= peak < ballast.nbytes
