"""The CUDA suite goes through every part on a tiny shape on a CPU, without the packages that a GPU server may lack."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ABSENT = ("pydantic", "typer", "rich", "mlx", "mlx_lm", "trl")
START = (
    "import runpy, sys; sys.modules.update(dict.fromkeys({absent}, None)); "  # an import of any of them fails
    "sys.argv[1:] = ['--output', {output!r}, '--device', 'cpu', '--tiny', *{more}]; "
    "runpy.run_path('benchmarks/gpu_suite.py', run_name='__main__')"
)


def run_suite(output, *more):
    code = START.format(absent=ABSENT, output=str(output), more=more)
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=480)
    assert found.returncode == 0, found.stderr[-3000:]
    return json.loads((output / "gpu_suite.json").read_text())


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_suite(tmp_path_factory.mktemp("suite"))


def test_every_part_runs_without_the_packages_that_a_server_may_lack(results):
    assert not {name: part["error"] for name, part in results.items() if "error" in part}
    assert {name for name, part in results.items() if "left_out" in part} <= {"correct: pytest -m cuda", "peft nf4"}


def test_every_gap_is_within_its_bound(results):
    checks = {what: one for part in results.values() for what, one in part.get("checks", {}).items()}
    assert len(checks) > 70
    assert not {what: one for what, one in checks.items() if not one["ok"]}


def test_ours_and_peft_see_the_same_weights_rows_and_adapter(results):
    """In bfloat16: a first loss near log(512), equal to three digits, and falling on both sides."""
    for tokens in (64, 256):
        for label in ("recompute", "no recompute"):
            ours, theirs = (results[f"{who} bf16 {tokens} tokens, {label}"]["losses"] for who in ("ours", "peft"))
            assert ours[0] == pytest.approx(math.log(512), rel=0.05)
            assert ours == pytest.approx(theirs, rel=3e-3)


def test_all_rates_and_parts_of_an_update_are_there(results):
    rows = {name: part for name, part in results.items() if "tokens_per_s" in part}
    assert len(rows) >= 16
    assert all(row["tokens_per_s"] > 0 and row["share_of_measured_peak"] > 0 for row in rows.values())
    wanted = {"forward", "head and loss", "backward", "optimizer", "update"}
    assert all(set(row["parts_ms"]) == wanted for name, row in rows.items() if name.startswith("ours"))


@pytest.mark.slow  # inductor compiles C++ on a CPU
@pytest.mark.timeout(600)
def test_compiled_updates_are_the_plain_ones_and_are_timed(tmp_path):
    results = run_suite(tmp_path, "--compiled")
    checks = results["correct: compiled"]["checks"]
    assert len(checks) == 6
    assert all(check["ok"] for check in checks.values())
    assert {name for name in results if name.endswith("compiled")} >= {"ours bf16 64 tokens, recompute, compiled"}
