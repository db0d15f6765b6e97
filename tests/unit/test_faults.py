"""Fault points do what MLXLORA_FAULT says, at the pass it says, and nothing without it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from shared import faults

VARIABLE = "MLXLORA_FAULT"


@pytest.fixture(autouse=True)
def afresh(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    faults.passed.clear()


def test_nothing_happens_without_the_variable_and_a_pass_costs_under_ten_microseconds():
    began = time.process_time()
    assert not any(faults.hit("update.begin") for _ in range(10_000))
    assert time.process_time() - began < 0.1
    assert not faults.passed


def test_the_nth_pass_and_with_plus_every_later_one(monkeypatch):
    monkeypatch.setenv(VARIABLE, "a:2:nan,b:2+:nan")
    assert [faults.hit("a") for _ in range(4)] == [False, True, False, False]
    assert [faults.hit("b") for _ in range(4)] == [False, True, True, True]
    assert not faults.hit("c")


def test_errors_and_signals_are_real(monkeypatch):
    monkeypatch.setenv(VARIABLE, "full:1:ENOSPC,memory:1:memory,wake:1:SIGWINCH,typo:1:ENOSPACE")
    with pytest.raises(OSError, match="No space left") as caught:
        faults.hit("full")
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(MemoryError):
        faults.hit("memory")
    with pytest.raises(ValueError, match="unknown action ENOSPACE"):
        faults.hit("typo")
    seen: list[int] = []
    before = signal.signal(signal.SIGWINCH, lambda number, _: seen.append(number))
    try:
        faults.hit("wake")
    finally:
        signal.signal(signal.SIGWINCH, before)
    assert seen == [signal.SIGWINCH]


@pytest.mark.parametrize(("action", "number"), [("", signal.SIGKILL), (":abort", signal.SIGABRT)])
def test_a_process_ends_at_the_point(action, number):
    code = "from shared import faults; faults.hit('point')"
    environment = {**os.environ, VARIABLE: f"point:1{action}"}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == -number
