"""Killed, interrupted or damaged: the same command goes on and ends with the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlxlora.cli import main
from shared import faults
from shared.callbacks import Metrics
from shared.config_file import build_config
from shared.jobs.train import train
from shared.running import checkpoint
from tests import tolerances

UPDATES = 14
EIGHT_BITS = "optimizer.state=8bit"
COMPARED = ("step", "loss", "lr", "grad_norm", "tokens", "supervised_tokens", "padding_share", "eval_loss")


@pytest.fixture(scope="module")
def settings(tiny_model_folder, tmp_path_factory) -> Callable[..., list[str]]:
    """Return a factory of command-line arguments for one small run with dropout, mid-epoch checkpoints and all."""
    data, random = tmp_path_factory.mktemp("rows"), np.random.default_rng(1)
    for name, count in (("train", 30), ("valid", 6)):
        texts = ["hello world " * int(n) for n in random.integers(1, 9, count)]
        (data / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def make(output: Path, *more: str) -> list[str]:
        values = [
            f"train.updates={UPDATES}", "train.batch_size=8", "train.dtype=float32", "train.micro_tokens=64",
            "adapter.dropout=0.2", "optimizer.lr=3e-3", "checkpoint.every=3", "evaluation.every=4", "log.every=1",
            *more,
        ]  # fmt: skip
        flags = [part for value in values for part in ("--set", value)]
        return ["train", "--model", str(tiny_model_folder()), "--data", str(data), "--output", str(output), *flags]

    return make


def command(arguments: list[str], **options) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "mlxlora", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment, cwd=Path(__file__).resolve().parents[2], **options,
    )  # fmt: skip


def finish(arguments: list[str]) -> tuple[int, str]:
    process = command(arguments)
    _, err = process.communicate(timeout=240)
    return process.returncode, err


def wait_for_step(folder: Path, step: int, process: subprocess.Popen) -> None:
    """Wait until metrics hold a training row of at least this step."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if any(row["step"] >= step and "loss" in row for row in Metrics(folder / "metrics.jsonl").read()):
            return
        time.sleep(0.01)
    raise AssertionError(
        f"never reached update {step}: {process.communicate()[1] if process.poll() is not None else ''}"
    )


def result_of(folder: Path) -> tuple[bytes, list[dict]]:
    rows = [{key: row[key] for key in COMPARED if key in row} for row in Metrics(folder / "metrics.jsonl").read()]
    return (folder / "adapter/adapter_model.safetensors").read_bytes(), rows


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory) -> Callable[..., Path]:
    """Return the folder of an uninterrupted run on a backend, with further settings, made once."""
    made: dict[tuple[str, ...], Path] = {}

    def get(backend: str, *more: str) -> Path:
        if (backend, *more) not in made:
            folder = tmp_path_factory.mktemp(f"whole-{backend}")
            code, err = finish(settings(folder, f"backend={backend}", *more))
            assert code == 0, err
            made[backend, *more] = folder
        return made[backend, *more]

    return get


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_kill_9_twice_then_resume_gives_identical_weights_and_metrics(settings, whole, tmp_path, backend):
    arguments = settings(tmp_path / "run", f"backend={backend}")
    for step in (5, 10):
        process = command(arguments)
        wait_for_step(tmp_path / "run", step, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    code, err = finish(arguments)
    assert code == 0, err
    assert "going on after update" in err
    assert result_of(tmp_path / "run") == result_of(whole(backend))


@pytest.mark.parametrize("backend", ["mlx", "torch"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_saves_prints_the_command_and_loses_nothing(settings, whole, tmp_path, backend, number, code):
    arguments = settings(tmp_path / "run", f"backend={backend}")
    process = command(arguments)
    wait_for_step(tmp_path / "run", 4, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    lines = err.strip().splitlines()[-2:]
    assert lines[0].startswith("stopped by SIG")
    assert f"mlxlora train {tmp_path / 'run' / 'config.yaml'}" in lines[1]
    saved, _ = checkpoint.newest(tmp_path / "run/checkpoints")
    assert saved is not None
    assert saved.step == max(row["step"] for row in Metrics(tmp_path / "run/metrics.jsonl").read())
    code, err = finish(["train", str(tmp_path / "run/config.yaml")])
    assert code == 0, err
    assert result_of(tmp_path / "run") == result_of(whole(backend))


@pytest.mark.parametrize(("first", "second"), [("mlx", "torch"), ("torch", "mlx")])
def test_run_goes_on_on_the_other_backend(settings, whole, tmp_path, first, second):
    folder = tmp_path / "run"
    shutil.copytree(whole(first), folder)
    for name in ("adapter", "checkpoints/step-000014"):
        shutil.rmtree(folder / name)
    code, err = finish(settings(folder, f"backend={second}"))
    assert code == 0, err
    assert "going on after update 12" in err
    ours = {row["step"]: row["loss"] for row in Metrics(folder / "metrics.jsonl").read() if "loss" in row}
    wanted = {row["step"]: row["loss"] for row in Metrics(whole(first) / "metrics.jsonl").read() if "loss" in row}
    assert ours.keys() == wanted.keys() == set(range(1, UPDATES + 1))
    for step, loss in ours.items():
        assert loss == pytest.approx(wanted[step], rel=tolerances.CURVE)


def test_row_41_a_run_goes_from_mlx_to_torch_and_back_within_the_curve(settings, whole, tmp_path, monkeypatch):
    """Stopped by SIGTERM behind updates 5 and 10, with dropout and AdamW's moments on board."""
    folder, stop = tmp_path / "run", "update.numbers:5:SIGTERM"
    for backend, fault, code in (("mlx", stop, 143), ("torch", stop, 143), ("mlx", "", 0)):
        monkeypatch.setenv("MLXLORA_FAULT", fault)
        faults.passed.clear()
        assert main.run(settings(folder, f"backend={backend}")) == code
        assert checkpoint.load(checkpoint.step_dirs(folder / "checkpoints")[0]).state["maker"]["backend"] == backend
    for key in ("loss", "eval_loss", "grad_norm"):
        ours, wanted = (
            {row["step"]: row[key] for row in Metrics(run / "metrics.jsonl").read() if key in row}
            for run in (folder, whole("mlx"))
        )
        assert ours == pytest.approx(wanted, rel=tolerances.CURVE)


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_a_run_goes_on_with_another_packing(settings, whole, tmp_path, backend):
    folder = tmp_path / "run"
    shutil.copytree(whole(backend), folder)
    for name in ("adapter", "checkpoints/step-000014"):
        shutil.rmtree(folder / name)
    code, err = finish([*settings(folder, "data.packing=none"), "--backend", backend])
    assert code == 0, err
    assert "going on after update 12" in err
    ours, wanted = (
        {row["step"]: row for row in result_of(path)[1] if "loss" in row} for path in (folder, whole(backend))
    )
    assert ours.keys() == wanted.keys()
    assert all(row["loss"] == pytest.approx(wanted[step]["loss"], rel=tolerances.CURVE) for step, row in ours.items())


def test_only_damaged_checkpoints_stop_the_run_and_say_so(settings, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole("torch"), folder)
    for saved in checkpoint.step_dirs(folder / "checkpoints"):
        (saved / "COMMITTED").unlink()
    code, err = finish(settings(folder, "backend=torch"))
    assert code == 3
    assert "no checkpoint in" in err
    assert "--resume never" in err


def test_changed_settings_are_refused_with_the_difference(settings, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole("torch"), folder)
    code, err = finish(settings(folder, "backend=torch", "optimizer.lr=1e-3"))
    assert code == 3
    assert "optimizer.lr: 0.003 -> 0.001" in err
    code, err = finish(settings(folder, "backend=torch", "train.micro_tokens=1000", "log.every=5"))
    assert code == 0, err


def test_complete_run_is_left_as_it_is(settings, whole, tmp_path):
    before = result_of(whole("torch"))
    code, err = finish(settings(whole("torch"), "backend=torch"))
    assert code == 0, err
    assert result_of(whole("torch")) == before


def test_strays_of_a_killed_save_are_swept(settings, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole("torch"), folder)
    (folder / "checkpoints/.tmp-99-1").mkdir()
    (folder / "checkpoints/.trash-step-000001-1").mkdir()
    assert finish(settings(folder, "backend=torch"))[0] == 0
    assert not list((folder / "checkpoints").glob(".t*"))


def test_full_fine_tuning_resumes_bit_for_bit(settings, tmp_path):
    results = []
    for number, stop in enumerate((None, 6)):
        folder = tmp_path / str(number)
        arguments = settings(folder, "backend=mlx", "adapter.type=none", "optimizer.lr=1e-3", "train.dtype=bfloat16")
        if stop:
            process = command(arguments)
            wait_for_step(folder, stop, process)
            process.send_signal(signal.SIGKILL)
            process.communicate()
        assert finish(arguments)[0] == 0
        results.append((folder / "model/model.safetensors").read_bytes())
    assert results[0] == results[1]


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_moments_in_8bit_resume_bit_for_bit_after_kill_9(settings, whole, tmp_path, backend):
    arguments = settings(tmp_path / "run", f"backend={backend}", EIGHT_BITS)
    process = command(arguments)
    wait_for_step(tmp_path / "run", 8, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    code, err = finish(arguments)
    assert code == 0, err
    assert "going on after update" in err
    assert result_of(tmp_path / "run") == result_of(whole(backend, EIGHT_BITS))
    saved = checkpoint.load(checkpoint.step_dirs(tmp_path / "run/checkpoints")[0]).optimizer
    assert {tensor.dtype for name, tensor in saved.items() if name.startswith(("m.", "v."))} == {"U8"}
    assert {tensor.dtype for name, tensor in saved.items() if "absmax" in name} == {"F32"}


@pytest.mark.parametrize(("first", "second"), [("mlx", "torch"), ("torch", "mlx")])
def test_moments_in_8bit_go_on_on_the_other_backend(settings, whole, tmp_path, first, second):
    folder = tmp_path / "run"
    shutil.copytree(whole(first, EIGHT_BITS), folder)
    for name in ("adapter", "checkpoints/step-000014"):
        shutil.rmtree(folder / name)
    code, err = finish(settings(folder, f"backend={second}", EIGHT_BITS))
    assert code == 0, err
    assert "going on after update 12" in err
    ours, wanted = (
        [row["loss"] for row in result_of(run)[1] if "loss" in row] for run in (folder, whole(first, EIGHT_BITS))
    )
    assert ours == pytest.approx(wanted, rel=tolerances.CURVE)


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_dora_goes_on_bit_for_bit(tiny_model_folder, tmp_path, backend):
    rows = "".join(json.dumps({"text": f"hello {n} world"}) + "\n" for n in range(12))
    (tmp_path / "train.jsonl").write_text(rows)
    config = build_config(
        {
            "model": str(tiny_model_folder()), "data": {"path": str(tmp_path)}, "output": str(tmp_path / "run"),
            "adapter": {"type": "dora", "dropout": 0.1, "rank": 4}, "optimizer": {"lr": 0.01}, "backend": backend,
            "train": {"batch_size": 4, "updates": 6, "dtype": "float32"}, "checkpoint": {"every": 3},
            "quantization": "affine-4bit-g64",
        }
    )  # fmt: skip
    train(config)
    wanted = {file.name: file.read_bytes() for file in (tmp_path / "run/adapter").glob("*.safetensors")}
    for name in ("adapter", "checkpoints/step-000006"):
        shutil.rmtree(tmp_path / "run" / name)
    assert not train(config).already_complete
    assert {file.name: file.read_bytes() for file in (tmp_path / "run/adapter").glob("*.safetensors")} == wanted


def test_moments_of_the_other_format_are_refused(settings, whole, tmp_path):
    shutil.copytree(whole("torch"), tmp_path / "run")
    code, err = finish(settings(tmp_path / "run", "backend=torch", EIGHT_BITS))
    assert code == 3
    assert "optimizer.state: 'float32' -> '8bit'" in err


def test_patience_stops_early_and_the_same_after_a_resume(tiny_model_folder, tmp_path):
    rows = "".join(json.dumps({"text": f"hello {n}"}) + "\n" for n in range(12))
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_text(rows if name == "train" else '{"text": "zzzz qqqq"}\n')
    config = build_config(
        {
            "model": str(tiny_model_folder()), "data": {"path": str(tmp_path)}, "optimizer": {"lr": 0.05},
            "train": {"batch_size": 4, "updates": 200, "dtype": "float32"}, "backend": "torch",
            "evaluation": {"every": 2, "patience": 3}, "output": str(tmp_path / "run"),
        }
    )  # fmt: skip
    result = train(config)
    assert result.updates < 200
    assert train(config).already_complete
    return_to_before_the_end(tmp_path / "run")
    again = train(config)
    assert not again.already_complete
    assert again.updates == result.updates


def return_to_before_the_end(folder: Path) -> None:
    """Put the run where a kill behind its last evaluation leaves it: patience run out, the last updates not logged."""
    found, _ = checkpoint.newest(folder / "checkpoints")
    assert found is not None
    loop = {**found.state["loop"], "finished": False, "positions": 5, "tokens": 5}
    before = replace(found, state={**found.state, "loop": loop})
    checkpoint.save(folder / "checkpoints", before, keep=2)
