"""Rows 35 to 37 of the fault matrix: the network is slow, broken, or says no. Real clients, real sockets."""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager

import pytest

from shared.callbacks import Metrics
from shared.sinks import sinks
from tests.loopback import serving, unused_port, with_status

STEPS = 30
PER_STEP_S = 0.05  # what training may wait for trackers


@contextmanager
def broken(how: str):
    """Yield the address of a tracker that is down, slow or says no."""
    if how == "refuses":
        yield f"http://127.0.0.1:{unused_port()}"
        return
    stop = threading.Event()
    answers = {"hangs": lambda request: stop.wait(60), "401": with_status(401), "500": with_status(500)}
    with serving(answers[how]) as address:
        yield address
        stop.set()


SLOW = [
    pytest.param("mlflow", how, marks=pytest.mark.slow) for how in ("hangs", "401", "500")
] + [pytest.param("wandb", how, marks=pytest.mark.slow) for how in ("hangs", "401", "500", "refuses")]  # fmt: skip


@pytest.mark.parametrize(("name", "how"), [("mlflow", "refuses"), *SLOW])
def test_row_37_a_tracker_that_is_down_or_slow_never_holds_up_training(tmp_path, monkeypatch, name, how):
    (tmp_path / "config.yaml").write_text("model: m\n")
    notes: list[str] = []
    times: list[float] = []
    with broken(how) as address, sinks(tmp_path, [name], notes.append) as found:
        for variable in ("MLFLOW_TRACKING_URI", "WANDB_BASE_URL"):
            monkeypatch.setenv(variable, address)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        found.on_start({})
        deadline = time.monotonic() + 90
        step = 0
        while step < STEPS or (not notes and time.monotonic() < deadline):
            step += 1
            Metrics(tmp_path / "metrics.jsonl").write({"step": step, "loss": 1.0})
            began = time.perf_counter()
            found.on_update(step)
            times.append(time.perf_counter() - began)
            time.sleep(0.02)
        began = time.monotonic()
        found.end(finished=True, wait_s=1)
        assert time.monotonic() - began < 30
    assert sorted(times)[-2] < PER_STEP_S  # one for the machine's own pauses
    assert [row["step"] for row in Metrics(tmp_path / "metrics.jsonl").read()] == list(range(1, step + 1))
    assert len([note for note in notes if "training goes on" in note]) == 1, notes
    assert "not everything is sent" in notes[-1]
    assert not json.loads((tmp_path / "sinks" / f"{name}.json").read_text()).get("done")
