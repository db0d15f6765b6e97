"""Gradient norms by module: in which rows they stand, and what is said of layers that vanish or explode."""

from __future__ import annotations

import json

import pytest

from shared.callbacks import Metrics
from shared.config_file import build_config
from shared.gradients import KEY
from shared.jobs.train import train
from shared.watching.gradients import GradientCheck, find_trouble

LAYERS = 8


def rows(*, layer: int = 0, factor: float = 1.0, since: int = 0, num: int = 8):
    """Return rows of norms about 1; one layer's is multiplied by a factor from row `since` on."""
    return [
        {
            "step": 10 * (n + 1),
            KEY: {
                f"layers.{k}.{module}": (1 + 0.1 * k) * (factor if k == layer and n >= since else 1.0)
                for k in range(LAYERS)
                for module in ("q_proj", "up_proj")
            },
        }
        for n in range(num)
    ]


def test_a_healthy_run_is_not_warned_of():
    assert find_trouble(rows()) == []


@pytest.mark.parametrize(("factor", "word"), [(1e-4, "vanish"), (0.0, "vanish"), (300.0, "explode")])
def test_a_layer_far_from_the_others_is_named_with_the_threshold(factor, word):
    [text] = find_trouble(rows(layer=5, factor=factor))
    assert word in text
    assert text.endswith("in layers.5")
    assert ("0.001" if word == "vanish" else "100") in text


def test_all_layers_that_grow_are_told_from_those_far_from_the_others():
    found = rows()
    for row in found[4:]:
        row[KEY] = {name: 200 * norm for name, norm in row[KEY].items()}
    [text] = find_trouble(found)
    assert "what it was before" in text
    assert "layers.0, layers.1, layers.2, layers.3 and 4 more" in text


@pytest.mark.parametrize("factor", [2e-3, 50.0])
def test_a_layer_within_the_thresholds_is_not_named(factor):
    assert find_trouble(rows(layer=2, factor=factor)) == []


def test_one_row_out_of_many_is_chance_and_two_rows_are_too_few():
    assert find_trouble(rows(layer=2, factor=1e4, since=7)) == []
    assert find_trouble(rows(layer=2, factor=1e4, num=2)) == []
    assert find_trouble([{"step": 1, "loss": 2.0}]) == []


def test_the_check_judges_all_rows_of_the_run_at_its_end_those_before_a_resume_too(tmp_path):
    notes: list[str] = []
    check, metrics = GradientCheck(tmp_path, notes.append), Metrics(tmp_path / "metrics.jsonl")
    for row in [{"step": 5, "loss": 1.0}, *rows(layer=1, factor=1e3)]:
        metrics.write(row)
    metrics.flush()
    check.on_end({})
    assert notes == find_trouble(rows(layer=1, factor=1e3)) != []


@pytest.mark.parametrize(
    ("gradients", "steps"), [("true", [2, 4, 6, 7]), ("3", [4, 6, 7]), ("1", [2, 4, 6, 7]), ("false", [])]
)
def test_rows_hold_the_norms_that_the_config_asks_for(tiny_model_folder, write_jsonl, tmp_path, gradients, steps):
    overrides = [f"log.gradients={gradients}", "log.every=2", "train.updates=7", "train.batch_size=2"]
    values = {"model": str(tiny_model_folder()), "output": str(tmp_path / "run"), "train": {"dtype": "float32"}}
    data = write_jsonl(*({"text": "hello world " * n} for n in range(1, 7)))
    train(build_config({**values, "data": {"path": str(data)}, "backend": "torch"}, overrides=overrides))
    found = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in found if KEY in row] == steps
    for row in found:
        if KEY in row:
            assert sum(norm**2 for norm in row[KEY].values()) ** 0.5 == pytest.approx(row["grad_norm"], rel=1e-5)
    assert ("<h2>Gradients</h2>" in (tmp_path / "run/report.html").read_text()) == bool(steps)
