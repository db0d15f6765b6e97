"""Runs side by side: what is listed is what the folders say, and a difference is one only beyond chance."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mlxlora.cli.main import run
from shared.callbacks import Metrics
from shared.config_file import build_config
from shared.data.layout import choose_layout
from shared.data.tokenize import tokenize_rows
from shared.errors import CheckpointError, ConfigError
from shared.evaluating.loss import evaluate_each, evaluate_examples
from shared.jobs.runs import compare, describe, list_runs, paired_bootstrap, read_run, sparkline
from shared.jobs.train import train
from shared.running.lock import locked
from shared.sessions import find_rows, open_session


def make_run(folder: Path, *, created: str, lr: float, losses: list[float], updates: int) -> Path:
    """Write the files of a run that the lists are read from."""
    folder.mkdir()
    manifest = {
        "created": created,
        "model": "m",
        "backend": "torch",
        "updates": updates,
        "command": ["mlxlora", "train"],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "config.yaml").write_text(f"model: m\ndata: {{path: d, max_length: 2048}}\noptimizer: {{lr: {lr}}}\n")
    for step, loss in enumerate(losses, start=1):
        Metrics(folder / "metrics.jsonl").write({"step": step, "loss": loss, "tokens_per_s": 10.0 * step})
    Metrics(folder / "metrics.jsonl").write({"step": len(losses), "eval_loss": losses[-1] + 0.5})
    return folder


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Return a run that ended and one that stopped."""
    late = make_run(tmp_path / "late", created="2026-02", lr=1e-3, losses=[3.0, 2.0], updates=4)
    early = make_run(tmp_path / "early", created="2026-01", lr=1e-4, losses=[4.0, 3.0, 2.0, 1.0], updates=4)
    (early / "report.html").touch()
    return early, late


def test_ls_shows_every_run_its_state_and_its_losses_oldest_first(two, tmp_path, capsys):
    (tmp_path / "no run").mkdir()
    assert run(["runs", "ls", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["runs"]
    assert [(one["name"], one["state"], one["step"], one["updates"]) for one in found] == [
        ("early", "done", 4, 4),
        ("late", "stopped", 2, 4),
    ]
    assert [(one["loss"], one["eval_loss"]) for one in found] == [(1.0, 1.5), (2.0, 2.5)]
    with locked(two[1], print):
        assert read_run(two[1]).state == "running"
    assert run(["runs", "ls", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [str(folder) for folder in two]
    assert [line.split()[:3] for line in lines[1:]] == [[names[0], "done", "4/4"], [names[1], "stopped", "2/4"]]


@pytest.mark.parametrize("text", ['{"updates": ', "[1]", '{"updates": "4", "command": 3, "result": 7}'])
def test_a_damaged_manifest_is_told_and_the_metrics_are_shown(two, tmp_path, capsys, text):
    (two[0] / "manifest.json").write_text(text)
    assert run(["runs", "ls", str(tmp_path)]) == 0
    assert ["damaged", "4/?"] in [line.split()[1:3] for line in capsys.readouterr().out.splitlines()]
    assert run(["runs", "show", str(two[0])]) == 0
    out, error = capsys.readouterr()
    assert out.startswith("early: damaged, update 4 of ?\ntraining loss")
    assert "manifest.json is damaged" in error
    assert run(["runs", "compare", *map(str, two)]) == 0


def test_show_has_the_numbers_the_curve_and_the_settings_that_are_no_default(two):
    found = describe(two[0])
    assert found.final["best validation loss"] == 1.5
    assert found.final["tokens per second"] == 25.0
    assert found.final["training time, s"] is None
    assert found.curves["loss"] == "█▆▃▁"
    assert found.settings == {"model": "m", "data.path": "d"}


def test_compare_shows_what_differs_and_nothing_else(two, tmp_path, capsys):
    page = tmp_path / "page.html"
    found = compare(*two, html=page)
    assert found.settings == {"optimizer.lr": (1e-4, 1e-3)}
    assert found.final["training loss"] == (1.0, 2.0)
    assert found.paired is None
    assert page.read_text().count("<svg") == 3
    assert run(["runs", "compare", *map(str, two)]) == 0
    assert "optimizer.lr" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["show", "erly"], ["compare", "early", "erly"]])
def test_a_folder_that_is_no_run_is_named_with_the_nearest_one(two, tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    assert run(["runs", *arguments]) == 3
    assert 'did you mean "early"?' in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="no folder at"):
        list_runs(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="not the folder of a run"):
        read_run(tmp_path)


def test_two_curves_as_text_have_one_scale(two):
    """Losses 4, 3, 2, 1 of four updates, and 3, 2 of two: the same height is the same loss in both."""
    assert compare(*two).curves["loss"] == ("█▆▃▁", "▆▃")


@pytest.mark.parametrize("place", ["runs", "elsewhere/runs", "."])
def test_show_takes_what_ls_prints(two, tmp_path, monkeypatch, capsys, place):
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    for folder in two if place != "." else ():
        shutil.move(folder, tmp_path / place / folder.name)
    monkeypatch.chdir(tmp_path)
    assert run(["runs", "ls", place]) == 0
    for line in capsys.readouterr().out.splitlines()[1:]:
        assert run(["runs", "show", line.split()[0]]) == 0


@pytest.mark.parametrize("words", [["show", "early"], ["compare", "early", "late"]])
def test_a_run_goes_by_the_name_that_ls_prints(two, tmp_path, monkeypatch, capsys, words):
    (tmp_path / "runs").mkdir()
    for folder in two:
        shutil.move(folder, tmp_path / "runs" / folder.name)
    monkeypatch.chdir(tmp_path)
    assert run(["runs", *words]) == 0
    assert "early" in capsys.readouterr().out


def test_a_run_wins_over_a_folder_of_its_name_that_is_none(two, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    shutil.move(two[0], tmp_path / "runs/early")
    monkeypatch.chdir(tmp_path)
    for name in ("early", "empty"):
        (tmp_path / name).mkdir()
    assert run(["runs", "show", "early"]) == 0
    assert capsys.readouterr().out.startswith("early: done")
    (two[0] / "manifest.json").write_bytes((two[1] / "manifest.json").read_bytes())
    assert run(["runs", "show", "early"]) == 0
    assert capsys.readouterr().out.startswith("early: stopped"), "the one that is here is meant"
    assert run(["runs", "show", "empty"]) == 3
    assert 'did you mean "empty"' not in capsys.readouterr().err


def test_how_far_a_run_is_tell_its_checkpoints_and_its_result(two, capsys):
    """Rows of metrics are logged now and then only, and may run ahead of what a resume goes on from."""
    (two[1] / "checkpoints/step-000003").mkdir(parents=True)
    assert read_run(two[1]).step == 3
    (two[1] / "checkpoints/step-000003").rename(two[1] / "checkpoints/step-000001")
    assert read_run(two[1]).step == 1, "what is behind the checkpoint is done again"
    with locked(two[1], print):
        assert read_run(two[1]).step == 2
    manifest = json.loads((two[0] / "manifest.json").read_text())
    (two[0] / "manifest.json").write_text(json.dumps({**manifest, "result": {"last_update": 4}}))
    (two[0] / "metrics.jsonl").write_text("")
    assert run(["runs", "show", str(two[0])]) == 0
    assert capsys.readouterr().out.startswith("early: done, update 4 of 4")


@pytest.mark.parametrize(("number", "words"), [(0, "4 of 4"), (1, "<small>stopped</small>")])
def test_show_writes_a_page_also_of_a_run_that_has_not_ended(two, tmp_path, number, words):
    page = tmp_path / "page.html"
    assert run(["runs", "show", str(two[number]), "--html", str(page)]) == 0
    text = page.read_text()
    assert words in text
    assert text.count("<svg") == 2
    assert "stopped early" not in text
    assert (two[1] / "report.html").exists() is False, "that would make it a run that has ended"


def test_a_sparkline_is_as_wide_as_its_points_up_to_a_limit():
    rows = [{"step": n, "loss": float(n)} for n in range(500)]
    assert len(sparkline(rows, "loss")) == 48
    assert sparkline(rows[:1], "loss") == ""
    assert sparkline([{"step": n, "loss": 1.0} for n in range(3)], "loss") == "▁▁▁"


def test_the_interval_of_a_bootstrap_is_that_of_the_normal_law():
    random = np.random.default_rng(0)
    a, weights = random.normal(5.0, 1.0, 400), np.ones(400)
    b = a + random.normal(0.2, 0.5, 400)
    found, difference = paired_bootstrap(a, b, weights), b - a
    half = 1.96 * difference.std() / 20
    assert found.difference == pytest.approx(difference.mean(), abs=1e-12)
    assert (found.low, found.high) == pytest.approx(
        (difference.mean() - half, difference.mean() + half), abs=0.1 * half
    )
    assert found.verdict == "a is better"
    assert paired_bootstrap(b, a, weights).verdict == "b is better"


def test_runs_that_differ_by_chance_alone_are_rarely_told_apart():
    """At a level of 95 % about 1 of 20 pairs without a difference is called one."""
    random = np.random.default_rng(1)
    called = 0
    for _ in range(40):
        a = random.gamma(2.0, 1.0, 80)
        called += (
            paired_bootstrap(a, a + random.normal(0, 0.3, 80), np.ones(80)).verdict != "no difference beyond chance"
        )
    assert called <= 6  # the chance of more is below 1 % at a rate of 6 %


def test_losses_by_row_and_a_whole_comparison_of_two_trained_runs(tiny_model_folder, write_jsonl, tmp_path):
    data, columns = write_jsonl(*({"words": "hello world " * n} for n in (1, 5, 2, 7, 3, 4))), {"text": "words"}
    model = str(tiny_model_folder())
    values = {"model": model, "data": {"path": str(data), "columns": columns}, "backend": "torch"}
    settings = ["train.batch_size=3", "train.dtype=float32", "optimizer.lr=0.01"]
    for name, updates in (("a", 1), ("b", 6)):
        config = build_config(
            {**values, "output": str(tmp_path / name)}, overrides=[*settings, f"train.updates={updates}"]
        )
        train(config)
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    found = compare(tmp_path / "a", tmp_path / "b", data=str(data), backend="torch").paired
    assert found is not None
    assert found.difference < 0
    assert found.verdict == "b is better"
    same = compare(tmp_path / "a", tmp_path / "c", data=str(data), backend="torch").paired
    assert same is not None
    assert (same.difference, same.low, same.high) == (0, 0, 0)
    session = open_session(model, adapter=tmp_path / "b" / "adapter", backend="torch")
    examples = tokenize_rows(
        find_rows(str(data), columns=columns)[0], session.tokenizer, train_on="completion", max_length=2048
    )
    layout = choose_layout(session.model.info, packing="auto", micro_tokens=None)
    losses, weights = evaluate_each(session.model, examples, layout)
    alone = [evaluate_examples(session.model, [example], layout) for example in examples]
    assert losses / weights == pytest.approx([one.loss for one in alone], rel=1e-6)
    assert list(weights) == [one.supervised_tokens for one in alone]
    assert found.loss_b == pytest.approx(losses.sum() / weights.sum(), rel=1e-12)
