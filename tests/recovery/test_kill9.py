"""SIGKILL at random moments and at every point of a save: the script of the benchmark, at the suite's length."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KILLS = 25


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_rows_01_to_06_every_killed_run_ends_bit_identical(backend, tmp_path):
    output = tmp_path / "kills.json"
    words = ["--backend", backend, "--kills", str(KILLS), "--seed", "1", "--output", str(output)]
    done = subprocess.run(
        [sys.executable, "benchmarks/kill9.py", *words], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert output.exists(), done.stderr
    found = json.loads(output.read_text())
    assert not found["failures"]
    assert found["identical"] == found["runs"] > 0
    assert found["kills"] == KILLS
    assert found["inside_a_save"] >= KILLS / 5
    assert len(found["points"]) == 8, "every point of a save, and anywhere"
    assert done.returncode == 0
