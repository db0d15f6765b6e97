"""Rows of the fault matrix that strike a run itself: signals, numbers, memory, aborts, changed settings, clocks.

Each test is named after its row. Faults are real: signals to this or to a child process, memory limits, and numbers
that become NaN inside an update (MLXLORA_FAULT). The oracle is the uninterrupted run.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from shared import faults
from shared.callbacks import Metrics
from shared.config import RunConfig
from shared.config_file import build_config, to_yaml
from shared.data.batch import Plan
from shared.errors import CheckpointError, ConfigError, DivergedError, Interrupted, OutOfMemory
from shared.jobs.prepare import prepare
from shared.jobs.supervise import smaller, traces
from shared.jobs.train import build_run, make_identity, train
from shared.loop import fit
from shared.registry import find_backend
from shared.running import checkpoint, record
from shared.running.run_folder import Identity, differences, flat_settings, hash_files
from shared.signals import stop_signals
from shared.tensors import load_file, save_file
from shared.watching.display import make_display
from tests import tolerances

BACKENDS = ["mlx", "torch"]
COMPARED = ("step", "loss", "lr", "grad_norm", "tokens", "supervised_tokens", "eval_loss")


class Heard:
    """A callback that keeps the notes of a run."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def on_note(self, text: str) -> None:
        self.notes.append(text)

    def about(self, words: str) -> list[str]:
        return [note for note in self.notes if words in note]


@pytest.fixture(scope="module")
def make_config(tiny_model_folder, tmp_path_factory) -> Callable[..., RunConfig]:
    """Return a factory of configs of one small run: 20 rows in 10 updates of 4, micro-batches, checkpoints."""
    data = tmp_path_factory.mktemp("rows")
    texts = ["hello world " * int(n) for n in np.random.default_rng(1).integers(1, 9, 20)]
    (data / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def make(output: Path, *overrides: str, backend: str = "torch") -> RunConfig:
        values = {
            "model": str(tiny_model_folder()), "data": {"path": str(data), "cache": False}, "backend": backend,
            "train": {"updates": 10, "batch_size": 4, "micro_tokens": 64, "dtype": "float32"},
            "adapter": {"rank": 2, "dropout": 0.1, "targets": ["q_proj"]}, "optimizer": {"lr": 3e-3},
            "checkpoint": {"every": 3}, "evaluation": {"every": None}, "log": {"every": 1}, "output": str(output),
        }  # fmt: skip
        return build_config(values, overrides=list(overrides))

    return make


@pytest.fixture
def fault(monkeypatch) -> Callable[[str], None]:
    """Return a setter of MLXLORA_FAULT that counts afresh."""

    def ask(wanted: str) -> None:
        faults.passed.clear()
        monkeypatch.setenv("MLXLORA_FAULT", wanted)

    monkeypatch.delenv("MLXLORA_FAULT", raising=False)
    return ask


@pytest.fixture(scope="module")
def whole(make_config, tmp_path_factory) -> dict[str, Path]:
    """Return the folders of the uninterrupted runs."""
    folders = {backend: tmp_path_factory.mktemp(f"whole-{backend}") for backend in BACKENDS}
    for backend, folder in folders.items():
        train(make_config(folder, backend=backend))
    return folders


def rows_of(folder: Path) -> list[dict]:
    return [{key: row[key] for key in COMPARED if key in row} for row in Metrics(folder / "metrics.jsonl").read()]


def weights_of(folder: Path) -> bytes:
    return (folder / "adapter/adapter_model.safetensors").read_bytes()


def steps_of(folder: Path) -> list[int]:
    return sorted(checkpoint.step_of(found) for found in checkpoint.step_dirs(folder / "checkpoints"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_26_one_update_without_finite_numbers_is_skipped_counted_and_named(make_config, tmp_path, fault, backend):
    heard: Any = Heard()
    fault("update.numbers:5:nan")
    result = train(make_config(tmp_path, backend=backend), callbacks=[heard])
    assert result.updates == 10
    assert result.skipped_updates == 1
    assert len(heard.about("update 5 skipped")) == 1
    assert "train.jsonl:" in heard.about("skipped")[0]
    rows = Metrics(tmp_path / "metrics.jsonl").read()
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert [row.get("skipped_updates", 0) for row in rows] == [0] * 4 + [1] * 6
    assert "loss" not in rows[4]
    assert all(row["loss"] > 0 for row in rows if row["step"] != 5)


def test_row_26_a_skipped_update_survives_kill_and_resume_bit_for_bit(make_config, tmp_path, fault):
    for name, wanted in (("a", "update.numbers:2:nan"), ("b", "update.numbers:2:nan,update.numbers:6:ENOSPC")):
        fault(wanted)
        if name == "b":
            with pytest.raises(OSError, match="No space"):
                train(make_config(tmp_path / name))
            fault("")
        train(make_config(tmp_path / name))
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b")
    assert rows_of(tmp_path / "a") == rows_of(tmp_path / "b")


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_27_three_in_a_row_roll_back_and_stop_with_exit_code_5(make_config, tmp_path, fault, whole, backend):
    fault("update.numbers:8+:nan")  # update 6 is saved, and proven good by update 7
    with pytest.raises(DivergedError, match=r"updates 8 to 10 had no finite loss.*each row alone is finite") as caught:
        train(make_config(tmp_path, "checkpoint.every=1", "checkpoint.keep=9", backend=backend))
    assert caught.value.exit_code == 5
    assert "--allow-change optimizer.lr" in str(caught.value)
    assert "from update 6, the last good checkpoint" in str(caught.value)
    assert steps_of(tmp_path)[-1] == 6  # 7 is saved too, but nothing says that its weights are good
    assert [row["step"] for row in rows_of(tmp_path)] == list(range(1, 7))
    fault("")
    train(make_config(tmp_path, "checkpoint.every=1", backend=backend))
    assert weights_of(tmp_path) == weights_of(whole[backend])


def test_row_27_rows_that_are_not_finite_alone_are_named(make_config, tmp_path):
    rows = [{"text": "hello zzz" if n % 2 else "hello world"} for n in range(8)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = make_run(make_config(tmp_path / "run", f"data.path={tmp_path}"))
    z = set(run.train[1].tokens.tolist()) - set(run.train[0].tokens.tolist())
    run.model.zoo.get_input_embeddings().weight.data[list(z)] = np.nan  # a base with one ruined token
    with pytest.raises(DivergedError, match="suspects: ") as caught:
        fit(run)
    named = set(re.findall(r"train.jsonl:(\d+)", str(caught.value)))
    assert named <= {"2", "4", "6", "8"}
    assert named


def test_row_27_ruined_weights_are_to_blame_and_leave_no_checkpoint(make_config, tmp_path):
    with pytest.raises(DivergedError, match="every row of theirs does that, so the weights are to blame"):
        train(make_config(tmp_path, "optimizer.lr=1e30", "adapter.targets=all-linear"))
    assert steps_of(tmp_path) == []
    assert not (tmp_path / "adapter").exists()


SPIKE = 45  # the update with the row that is unlike all others


@pytest.fixture(scope="module")
def spiked(make_config, tmp_path_factory) -> Callable[..., RunConfig]:
    """Return a factory of configs of a run that learns one sentence, and meets noise once."""
    data = tmp_path_factory.mktemp("spiked")
    texts = ["hello world, hello world"] * 120
    for row in Plan(120, 2, 0).rows(SPIKE):
        texts[row] = "zq#Xv@9!kW~pJ^fQ%zB&"
    (data / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    overrides = [
        f"data.path={data}", "train.updates=58", "train.batch_size=2", "adapter.type=none", "optimizer.lr=3e-3",
        "checkpoint.every=20",
    ]  # fmt: skip
    return lambda output, *more, **options: make_config(output, *overrides, *more, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_28_a_spike_of_the_loss_is_told_or_skipped(spiked, tmp_path, backend):
    weights = {}
    for policy in ("warn", "skip"):
        heard: Any = Heard()
        config = spiked(tmp_path / policy, f"train.spikes={policy}", "evaluation.convergence=true", backend=backend)
        result = train(config, callbacks=[heard])
        assert len(heard.about("updates 1 to 32: the training loss falls, by -")) == 1
        assert [note.split(" its loss")[0] for note in heard.about("spike")] == [
            f"update {SPIKE}" if policy == "warn" else f"update {SPIKE} skipped:"
        ]
        assert "train.jsonl:" in heard.about("spike")[0]
        assert result.skipped_updates == (policy == "skip")
        weights[policy] = (tmp_path / policy / "model/model.safetensors").read_bytes()
    assert weights["warn"] != weights["skip"]


def test_row_28_a_spike_goes_back_to_the_checkpoint_and_the_same_after_a_resume(spiked, tmp_path, fault):
    notes = []
    for name, stop in (("whole", ""), ("cut", "update.numbers:47:ENOSPC,update.numbers:51:ENOSPC")):
        config = spiked(tmp_path / name, "train.spikes=rollback")
        fault(stop)
        heard: Any = Heard()
        for _ in range(stop.count("E")):
            with pytest.raises(OSError, match="No space"):
                train(config, callbacks=[heard])
        train(config, callbacks=[heard])
        notes.append(heard.about("back to the weights of update 40, for the spike of update 45"))
    assert len(notes[0]) == 1
    assert len(notes[1]) >= 1
    both = [(tmp_path / name / "model/model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert both[0] == both[1]
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "cut")


@pytest.mark.parametrize("part", ["adapter", "moments"])
def test_row_29_values_that_are_not_finite_are_never_committed(make_config, tmp_path, part):
    run = make_run(make_config(tmp_path / "run"))
    run.state.step = 1
    record.checkpoint(run)
    run.state.step = 2
    if part == "adapter":
        next(iter(run.model.parameters.values())).data.fill_(np.nan)
    else:
        run.trainer.optimizer.moments[0]["v"].fill_(np.inf)
    with pytest.raises(DivergedError, match="no longer finite after update 2"):
        record.checkpoint(run)
    assert steps_of(tmp_path / "run") == [1]


def make_run(config: RunConfig) -> Any:
    """Return a run at its start, as `train` makes it."""
    prepared = prepare(config)
    config.output_dir.mkdir(exist_ok=True)
    return build_run(
        prepared, find_backend(config.backend), None, folder=config.output_dir, callbacks=[],
        identity=lambda: make_identity(prepared, hash_files(prepared.base.files)),
    )  # fmt: skip


def test_row_24_changed_settings_rows_or_base_are_refused_with_the_difference(make_config, whole, tmp_path):
    """And each goes on where --allow-change names it; a change of backend needs no permission."""
    shutil.copytree(whole["torch"], tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-000010")
    other = tmp_path / "other"
    other.mkdir()
    (other / "train.jsonl").write_text("".join('{"text": "hello hello"}\n' for _ in range(20)))
    base = shutil.copytree(make_config(tmp_path).model, tmp_path / "base")
    values = load_file(base / "model.safetensors")
    embedding = "model.embed_tokens.weight"
    values[embedding] = replace(values[embedding], data=values[embedding].data * np.float32(1.5))
    save_file(base / "model.safetensors", values.items())
    changes = {
        "optimizer.lr": ("optimizer.lr=1e-3", "optimizer.lr: 0.003 -> 0.001"),
        "data": (f"data.path={other}", "data: the training rows"),
        "base": (f"model={base}", "base: the base's files"),
    }
    every = [override for override, _ in changes.values()]
    with pytest.raises(CheckpointError) as caught:
        train(make_config(tmp_path / "run", *every))
    assert caught.value.exit_code == 3
    for key, (override, difference) in changes.items():
        assert difference in str(caught.value)
        with pytest.raises(CheckpointError, match=f"fix: --allow-change {key} goes on"):
            train(make_config(tmp_path / "run", override))
    heard: Any = Heard()
    train(make_config(tmp_path / "run", *every, backend="mlx"), allow_change=list(changes), callbacks=[heard])
    assert heard.about("changed since update 9: optimizer.lr: ")
    assert [row["step"] for row in rows_of(tmp_path / "run")] == list(range(1, 11))
    assert rows_of(tmp_path / "run")[:9] == rows_of(whole["torch"])[:9]
    assert rows_of(tmp_path / "run")[9]["lr"] != rows_of(whole["torch"])[9]["lr"]


def test_row_24_a_finished_run_goes_on_with_more_updates(make_config, whole, tmp_path):
    shutil.copytree(whole["torch"], tmp_path / "run")
    result = train(make_config(tmp_path / "run", "train.updates=12"), allow_change=["train.updates"])
    assert result.updates == 12
    assert not result.already_complete
    with pytest.raises(ConfigError, match=r'did you mean "optimizer\.lr"'):
        train(make_config(tmp_path / "run"), allow_change=["optimizer.lrr"])


def test_row_24_a_key_that_an_older_version_did_not_know_counts_as_its_default(make_config, whole, tmp_path):
    found, _ = checkpoint.newest(whole["torch"] / "checkpoints")
    assert found is not None
    identity = found.state["identity"]
    own = Identity(flat_settings(make_config(tmp_path)), identity["data"], identity["base"])
    del identity["settings"]["optimizer.weight_decay"]
    assert differences(found, own) == {}
    assert "optimizer.weight_decay" in differences(
        found, replace(own, settings={**own.settings, "optimizer.weight_decay": 0.1})
    )


STOPS = [("SIGINT", 130, "torch"), ("SIGTERM", 143, "mlx"), ("SIGTERM", 143, "torch"), ("SIGHUP", 129, "torch")]


@pytest.mark.parametrize(("name", "code", "backend"), STOPS)
def test_rows_9_11_12_a_signal_finishes_the_update_saves_and_loses_nothing(
    make_config, whole, tmp_path, fault, name, code, backend
):
    fault(f"micro.begin:11:{name}")
    with pytest.raises(Interrupted, match=r"the state is saved in[^\n]*\nfix: to go on: mlxlora train ") as caught:
        train(make_config(tmp_path, backend=backend))
    assert caught.value.exit_code == code
    fault("")
    assert steps_of(tmp_path)[-1] == len(rows_of(tmp_path)) < 10
    train(make_config(tmp_path, backend=backend))
    assert weights_of(tmp_path) == weights_of(whole[backend])
    assert rows_of(tmp_path) == rows_of(whole[backend])


@pytest.mark.slow
def test_row_11_a_signal_does_not_wait_for_an_evaluation(make_config, tmp_path, fault):
    shutil.copy(Path(make_config(tmp_path).data.path) / "train.jsonl", tmp_path / "train.jsonl")
    shutil.copy(tmp_path / "train.jsonl", tmp_path / "valid.jsonl")
    overrides = (f"data.path={tmp_path}", "evaluation.every=2")
    fault("evaluation.batch:2:SIGTERM")  # in the first one, before any update
    with pytest.raises(Interrupted, match="after update 0 of 10"):
        train(make_config(tmp_path / "run", *overrides))
    assert faults.passed["evaluation.batch"] <= 3
    fault("evaluation.batch:20:SIGTERM")  # in a later one
    with pytest.raises(Interrupted):
        train(make_config(tmp_path / "run", *overrides))
    assert faults.passed["evaluation.batch"] <= 30
    fault("")
    for name in ("run", "whole"):
        train(make_config(tmp_path / name, *overrides))
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "whole")
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "whole")


def test_row_12_a_run_under_nohup_goes_on(make_config, whole, tmp_path, fault):
    fault("micro.begin:11:SIGHUP")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        train(make_config(tmp_path))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert weights_of(tmp_path) == weights_of(whole["torch"])


def command(config: RunConfig, *flags: str, **options: Any) -> subprocess.Popen:
    """Start the command line on a config, with MLXLORA_FAULT from the environment."""
    file = config.output_dir.with_suffix(".yaml")
    file.write_text(to_yaml(config))
    return subprocess.Popen(
        [sys.executable, "-m", "mlxlora", "train", str(file), *flags], text=True, cwd=Path(__file__).parents[2],
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )  # fmt: skip


def test_row_10_a_second_signal_leaves_at_once_and_the_last_checkpoint_is_whole(make_config, whole, tmp_path, fault):
    config = make_config(tmp_path / "run")
    fault("micro.begin:11:SIGINT,checkpoint.before_marker:2:SIGINT")  # the second one in the middle of saving
    process = command(config)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGINT
    fault("")
    found, problems = checkpoint.newest(tmp_path / "run/checkpoints")
    assert found is not None
    assert found.step == 3
    assert not problems
    train(config)
    assert weights_of(tmp_path / "run") == weights_of(whole["torch"])
    assert rows_of(tmp_path / "run") == rows_of(whole["torch"])


def test_row_13_time_in_which_the_process_stood_still_is_not_counted():
    with stop_signals() as flag:
        os.kill(os.getpid(), signal.SIGCONT)  # of nothing that was stopped
        time.sleep(0.05)
        assert flag.take_still() == 0
    code = (
        "import time\nfrom shared.signals import stop_signals\n"
        "with stop_signals() as flag:\n"
        "    began = time.perf_counter()\n"
        "    print(flush=True)\n"
        "    while not flag.continued: time.sleep(0.01)\n"
        "    print(flag.take_still(), time.perf_counter() - began, flag.take_still())\n"
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGSTOP)
        time.sleep(1.7)
        process.send_signal(signal.SIGCONT)
        still, whole, again = map(float, process.stdout.readline().split())
    assert whole - 0.6 < still < whole
    assert again == 0


def test_row_14_a_reader_that_goes_away_does_not_stop_the_run():
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as stream:
        display = make_display(stream)
        os.close(reading)
        display.on_note("nobody hears this")
        with pytest.raises(BrokenPipeError):
            print("it is really closed", file=stream, flush=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), writing)  # for the flush of what is left


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_30_memory_that_runs_out_halves_the_micro_batches_and_changes_nothing(
    make_config, whole, tmp_path, fault, backend
):
    """Real limits on memory: test_out_of_memory.py."""
    heard: Any = Heard()
    fault("micro.begin:5:memory")
    train(make_config(tmp_path, backend=backend), callbacks=[heard])
    assert heard.about("micro-batches of at most 32 tokens")
    for ours, wanted in zip(rows_of(tmp_path), rows_of(whole[backend]), strict=True):
        assert ours["loss"] == pytest.approx(wanted["loss"], rel=tolerances.CURVE)
        assert ours["supervised_tokens"] == wanted["supervised_tokens"]


def test_row_30_memory_that_runs_out_when_a_result_is_read_goes_back_to_the_checkpoint(
    make_config, whole, tmp_path, fault
):
    heard: Any = Heard()
    fault("update.result:5:memory")
    train(make_config(tmp_path, backend="mlx"), callbacks=[heard])
    assert heard.about("from the last checkpoint on micro-batches of at most 50 tokens")
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 11))
    for ours, wanted in zip(rows, rows_of(whole["mlx"]), strict=True):
        assert ours["loss"] == pytest.approx(wanted["loss"], rel=tolerances.CURVE)


@pytest.mark.parametrize("point", ["micro.begin", "update.result"])
def test_row_30_at_the_floor_exit_code_6_with_what_would_fit(make_config, tmp_path, fault, point):
    fault(f"{point}:3+:memory")
    with pytest.raises(
        OutOfMemory, match=r"single row.*\nfix: .*(recompute: true|quantization: |max_length: )"
    ) as caught:
        train(make_config(tmp_path))
    assert caught.value.exit_code == 6


@pytest.mark.slow  # three processes
@pytest.mark.parametrize(("action", "name"), [("abort", "SIGABRT"), ("SIGKILL", "SIGKILL")])
def test_rows_31_32_a_supervised_run_survives_what_no_handler_catches(
    make_config, whole, tmp_path, fault, action, name
):
    config = make_config(tmp_path / "run", "checkpoint.every=2")
    fault(f"micro.begin:16:{action}")  # the second child does not get that far
    process = command(config, "--supervise")
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert f"note: training ended by {name}; started again --resume auto --set train.micro_tokens=32, 2 left" in err
    assert "going on after update" in err
    assert out.startswith("trained: 10 updates")
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 11))
    for ours, wanted in zip(rows, rows_of(whole["torch"]), strict=True):
        assert ours["loss"] == pytest.approx(wanted["loss"], rel=tolerances.CURVE)


@pytest.mark.slow
def test_row_31_a_run_that_always_aborts_is_given_up_after_three_restarts(make_config, tmp_path, fault):
    fault("micro.begin:1:abort")
    process = command(make_config(tmp_path / "run"), "--supervise", "--json")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGABRT
    assert err.count("note: training ended by SIGABRT; started again") == 3
    assert json.loads(out.splitlines()[-1])["exit_code"] == 134


@pytest.mark.slow
def test_rows_9_11_a_signal_to_the_supervisor_stops_its_child_and_loses_nothing(make_config, whole, tmp_path, fault):
    config = make_config(tmp_path / "run")
    fault("micro.begin:11:SIGSTOP")  # so that it does not end before the signal comes
    process = command(config, "--supervise")
    deadline = time.monotonic() + 120
    while len(rows_of(tmp_path / "run")) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    child = psutil.Process(process.pid).children()[0]
    while child.status() != psutil.STATUS_STOPPED and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    child.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143
    assert err.count("stopped by SIGTERM") == 1
    fault("")
    train(config)
    assert weights_of(tmp_path / "run") == weights_of(whole["torch"])


@pytest.mark.slow
def test_row_14_the_command_line_trains_on_behind_head(make_config, whole, tmp_path, fault):
    process = command(make_config(tmp_path / "run"), stderr=subprocess.STDOUT)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert weights_of(tmp_path / "run") == weights_of(whole["torch"])


@pytest.mark.slow
def test_row_12_a_closed_terminal_saves_and_loses_nothing(make_config, whole, tmp_path, fault):
    """A real terminal of its own session: the kernel sends SIGHUP when it is closed, and writing to it fails."""
    terminal, end = pty.openpty()
    fault("micro.begin:11:SIGSTOP")
    process = command(
        make_config(tmp_path / "run"), stdin=end, stdout=end, stderr=end, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(end)
    deadline, child = time.monotonic() + 120, psutil.Process(process.pid)
    while child.status() != psutil.STATUS_STOPPED and time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 4096)
    os.close(terminal)
    process.send_signal(signal.SIGCONT)
    assert process.wait(timeout=120) == 129
    fault("")
    train(make_config(tmp_path / "run"))
    assert weights_of(tmp_path / "run") == weights_of(whole["torch"])


def test_row_40_a_resume_with_other_micro_batches_takes_the_same_rows(make_config, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole["torch"], folder)
    for name in ("adapter", "checkpoints/step-000010"):
        shutil.rmtree(folder / name)
    train(make_config(folder, "train.micro_tokens=1024"))
    for ours, wanted in zip(rows_of(folder), rows_of(whole["torch"]), strict=True):
        assert ours["loss"] == pytest.approx(wanted["loss"], rel=tolerances.MICRO)
        assert ours["tokens"] == wanted["tokens"]


WATCHES = ("trackers.py", "hub.py", "index.py")  # what time it is: for trackers, and beside the times of files


def test_row_39_no_duration_comes_from_a_clock_that_can_jump():
    packages = [Path(__file__).parents[2] / name for name in ("shared", "mlxlora", "torch_backend")]
    files = [file for folder in packages for file in folder.rglob("*.py") if file.name not in WATCHES]
    sources = [file.read_text() for file in files]
    assert sum("perf_counter()" in source for source in sources) > 3
    assert not [source for source in sources if re.search(r"\btime\.time\(|gmtime|localtime", source)]


def test_a_restart_takes_nothing_of_a_run_that_was_there_before(tmp_path):
    (tmp_path / "checkpoints" / "step-000010").mkdir(parents=True)
    (tmp_path / "manifest.json").write_text('{"micro_tokens": 64}')
    found = traces(tmp_path)
    assert smaller(tmp_path, found) == []
    (tmp_path / "checkpoints" / "step-000020").mkdir()
    (tmp_path / "manifest.json").write_text('{"micro_tokens": 64} ')
    assert smaller(tmp_path, found) == ["--resume", "auto", "--set", "train.micro_tokens=32"]
