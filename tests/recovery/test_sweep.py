"""A sweep trains every run of its grid once, whatever stops it or one of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import mlxlora
from mlxlora.cli import main
from shared import faults
from shared.callbacks import Metrics
from shared.errors import ConfigError
from shared.jobs.sweep import MOST, expand, read_grid
from tests.recovery.golden.make import BASE

GRID = "optimizer.lr: [0.005, 0.02, 1e30]\n"  # of the last the numbers are never finite


@pytest.fixture
def words(tmp_path) -> list[str]:
    """Return the command line of a sweep of three small runs."""
    for name, more in (("train", 0), ("valid", 1)):
        rows = [{"prompt": f"{n} is", "completion": f" number {n + more} here"} for n in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "grid.yaml").write_text(GRID)
    values = [
        "train.dtype=float32", "train.updates=5", "train.batch_size=2", "adapter.rank=1", "adapter.layers=1",
        "evaluation.every=5", "log.every=1", "schedule.name=constant", "data.cache=false",
    ]  # fmt: skip
    flags = [part for value in values for part in ("--set", value)]
    places = ["--model", str(BASE), "--data", str(tmp_path), "--output", str(tmp_path / "sweep")]
    return ["train", *places, "--backend", "torch", *flags, "--sweep", str(tmp_path / "grid.yaml")]


def rows_of(folder: Path) -> list[tuple[Any, ...]]:
    keys = ("step", "loss", "eval_loss")
    return [tuple(row.get(key) for key in keys) for row in Metrics(folder / "metrics.jsonl").read()]


def test_a_sweep_that_was_stopped_goes_on_and_a_run_that_fails_stops_no_other(words, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLXLORA_FAULT", "update.numbers:7:SIGTERM")
    faults.passed.clear()
    assert main.run(words) == 143
    said = capsys.readouterr().err
    assert "lr-0.02: stopped by SIGTERM after update 2 of 5" in said
    assert "to go on: " in said.splitlines()[-1]
    assert sorted(path.name for path in (tmp_path / "sweep").glob("lr-*")) == ["lr-0.005", "lr-0.02"]
    first = (tmp_path / "sweep/lr-0.005/adapter/adapter_model.safetensors").stat().st_mtime_ns

    monkeypatch.delenv("MLXLORA_FAULT")
    assert main.run([*words, "--json"]) == 5
    out, err = capsys.readouterr()
    found = json.loads(out.splitlines()[-1])
    assert (found["ok"], found["exit_code"], found["metric"]) == (False, 5, "eval_loss")
    assert [run["state"] for run in found["runs"]] == ["done", "done", "failed"]
    values = [run["value"] for run in found["runs"]]
    assert values[0] < values[1]
    assert values[2] is None
    assert found["runs"][2]["code"] == "E500"
    assert "lr-1e+30 failed, error E500" in err
    assert (tmp_path / "sweep/lr-0.005/adapter/adapter_model.safetensors").stat().st_mtime_ns == first
    kept = json.loads((tmp_path / "sweep/sweep.json").read_text())
    assert [run["value"] for run in kept["runs"]] == values

    alone = [*words[:-2], "--output", str(tmp_path / "alone"), "--set", "optimizer.lr=0.02"]
    assert main.run(alone) == 0
    assert rows_of(tmp_path / "sweep/lr-0.02") == rows_of(tmp_path / "alone"), "as the run alone, without a break"

    assert main.run(words) == 5
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in table[-6:-3]] == [str(run["settings"]["optimizer.lr"]) for run in found["runs"]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer.lrr: [1]", 'grid.yaml:1: unknown key "optimizer.lrr"'),
        ("optimizer.lr: 1", "grid.yaml:1: optimizer.lr is no list of values"),
        ("train.seed: [1]\noptimizer: {lr: [1, 2]}", "grid.yaml:2: optimizer is no list of values"),
        ("optimizer.lr: [1, 1]", "grid.yaml:1: optimizer.lr has a value twice"),
        ("output: [a, b]", "grid.yaml:1: output must be the same for all runs"),
        ("", "grid.yaml has no settings"),
        (f"train.seed: {list(range(MOST))}\nadapter.rank: [1, 2]", f"grid.yaml makes {2 * MOST} runs"),
    ],
)
def test_a_grid_that_cannot_be_is_refused_by_its_line(tmp_path, text, message):
    (tmp_path / "grid.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_grid(tmp_path / "grid.yaml")
    assert caught.value.what.startswith(message)


def test_a_bad_value_of_a_grid_is_told_with_the_grids_file(words, tmp_path, capsys):
    (tmp_path / "grid.yaml").write_text("optimizer.lr: [0.1, abc]")
    assert main.run(words) == 2
    assert capsys.readouterr().err.startswith("error E202: grid.yaml: optimizer.lr, found 'abc' (run lr-abc)\n")
    assert main.run([*words[:-1], str(tmp_path / "absent.yaml")]) == 2
    assert "absent.yaml does not exist\nfix: give the path of a YAML file, with lines such as optimizer.lr" in (
        said := capsys.readouterr().err
    )
    assert "sweep file" in said


def test_a_run_that_cannot_be_begun_is_refused_before_any_runs(tmp_path):
    given: dict[str, Any] = {"model": str(BASE), "data": str(tmp_path), "output": str(tmp_path / "sweep")}
    with pytest.raises(ConfigError, match="rank-0"):
        mlxlora.sweep(None, {"adapter.rank": [1, 0]}, **given)
    assert not (tmp_path / "sweep").exists()


def test_every_combination_has_a_name_of_its_own():
    grid = {
        "adapter.targets": [["q_proj"], ["q_proj "], "q_proj", "a/b", "a b", 8, "8", None, "null"],
        "train.seed": [0, 1],
    }
    names = [run.name for run in expand(grid)]
    assert len(set(names)) == len(names) == 18
    assert all("/" not in name and "=" not in name and " " not in name for name in names)
