"""The best checkpoint is kept and is the result, whatever kills the run, and whatever it was begun with."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlxlora.cli import main
from shared import faults
from shared.callbacks import Metrics
from shared.config import RunConfig
from shared.config_file import build_config
from shared.jobs.prepare import prepare
from shared.jobs.train import TrainResult, train
from shared.running import checkpoint
from shared.tensors import load_file
from tests.recovery.golden.make import BASE

ROOT = Path(__file__).resolve().parents[2]
BEST, LAST = 8, 14  # of 60 updates: the loss of other rows falls until 8, then patience of 3 evaluations runs out
# Trains in forks, each killed at the next point; the last one is not. The points lie in saves of best checkpoints
# and of others, in evaluations, and between the end of training and its result.
KILLED = """
import importlib, os, sys
from pathlib import Path
from tests.recovery.test_deciding import recipe
from shared.jobs.train import train

data, output, backend, *points = sys.argv[1:]
for name in ("transformers", "torch_backend.backend" if backend == "torch" else "mlxlora.backend"):
    importlib.import_module(name)
for point in points:
    pid = os.fork()
    if pid == 0:
        os.environ["MLXLORA_FAULT"] = point
        train(recipe(Path(data), Path(output), backend=backend))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
POINTS = ("checkpoint.before_marker:2", "checkpoint.before_prune:3", "checkpoint.trashed:2", "evaluation.batch:2",
          "result.before_rename:1", "")  # fmt: skip


class Heard:
    """A callback that keeps the notes of a run."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def on_note(self, text: str) -> None:
        self.notes.append(text)


def recipe(data: Path, output: Path, *overrides: str, backend: str) -> RunConfig:
    """Return the config of a run whose validation loss falls until update 8 and then rises."""
    values: dict[str, Any] = {
        "model": str(BASE), "data": {"path": str(data), "cache": False}, "output": str(output), "backend": backend,
        "adapter": {"rank": 2, "targets": ["q_proj", "up_proj"], "dropout": 0.1},
        "train": {"batch_size": 3, "updates": 60, "dtype": "float32"}, "schedule": {"name": "constant"},
        "optimizer": {"lr": 0.02}, "evaluation": {"every": 2, "patience": 3},
        "checkpoint": {"every": 3, "keep": 1}, "log": {"every": 1},
    }  # fmt: skip
    return build_config(values, overrides=list(overrides))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Return a folder of rows to learn, and of others that fit them for a while."""
    folder = tmp_path_factory.mktemp("rows")
    for name, numbers, place, more in (("train", range(6), "here", 0), ("valid", range(6, 9), "there", 1)):
        rows = [{"prompt": f"{n} is", "completion": f" number {n + more} {place}"} for n in numbers]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> dict[str, Path]:
    """Return the folders of the uninterrupted runs."""
    folders = {backend: tmp_path_factory.mktemp(f"whole-{backend}") / "run" for backend in ("mlx", "torch")}
    for backend, folder in folders.items():
        train(recipe(data, folder, backend=backend))
    return folders


def result_of(folder: Path) -> tuple[Any, ...]:
    """Return all that must be the same: weights, rows but for times, what the manifest says, which checkpoints stay."""
    times = ("tokens_per_s", "time_s", "peak_memory_bytes")
    rows = [{k: v for k, v in row.items() if k not in times} for row in Metrics(folder / "metrics.jsonl").read()]
    manifest = json.loads((folder / "manifest.json").read_text())
    weights = (folder / "adapter/adapter_model.safetensors").read_bytes()
    return weights, rows, manifest["result"], sorted(path.name for path in (folder / "checkpoints").iterdir())


def weights_at(folder: Path, step: int) -> list[bytes]:
    saved = load_file(folder / f"checkpoints/step-{step:06d}/adapter.safetensors")
    return [tensor.data.tobytes() for _, tensor in sorted(saved.items())]


def weights_of(folder: Path) -> list[bytes]:
    found = load_file(folder / "adapter/adapter_model.safetensors")
    return [tensor.data.tobytes() for _, tensor in sorted(found.items())]


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_the_best_checkpoint_is_kept_and_is_the_result(whole, backend):
    _, rows, result, kept = result_of(whole[backend])
    losses = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    assert min(losses, key=losses.__getitem__) == BEST
    assert max(losses) == LAST
    assert result == {
        "update": BEST, "last_update": LAST, "stopped_early": True, "metric": "eval_loss",
        "best": losses[BEST], "best_update": BEST,
    }  # fmt: skip
    assert kept == [f"step-{BEST:06d}", f"step-{LAST:06d}"]
    assert weights_of(whole[backend]) == weights_at(whole[backend], BEST) != weights_at(whole[backend], LAST)
    assert f"update {BEST}, the best eval_loss" in (whole[backend] / "adapter/README.md").read_text()


@pytest.mark.parametrize(
    ("backend", "points"),
    [
        ("mlx", ("checkpoint.before_prune:3", "result.before_rename:1", "")),
        pytest.param("mlx", POINTS, marks=pytest.mark.slow),
        pytest.param("torch", POINTS, marks=pytest.mark.slow),
    ],
    ids=["mlx", "mlx-all", "torch-all"],
)
def test_a_run_killed_in_saves_evaluations_and_at_its_end_has_the_same_result(data, whole, tmp_path, backend, points):
    words = [str(data), str(tmp_path / "run"), backend, *points]
    done = subprocess.run([sys.executable, "-c", KILLED, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["-9"] * (len(points) - 1) + ["0"], done.stderr
    assert result_of(tmp_path / "run") == result_of(whole[backend])


def test_a_finished_run_says_the_same_again(data, whole):
    before = result_of(whole["torch"])
    result = train(recipe(data, whole["torch"], backend="torch"))
    assert (result.already_complete, result.result_update, result.updates) == (True, BEST, LAST)
    assert result.eval_loss == before[2]["best"]
    assert result_of(whole["torch"]) == before


def test_a_longer_run_killed_before_its_result_does_not_keep_the_old_one(data, tmp_path, monkeypatch):
    def go(updates: int, **options: Any) -> TrainResult:
        return train(
            recipe(data, tmp_path, "evaluation.every=null", f"train.updates={updates}", backend="torch"), **options
        )

    go(2)
    monkeypatch.setenv("MLXLORA_FAULT", "result.before_rename:1:memory")
    faults.passed.clear()
    with pytest.raises(MemoryError):
        go(4, allow_change=["train.updates"])
    monkeypatch.delenv("MLXLORA_FAULT")
    assert go(4).result_update == 4
    assert weights_of(tmp_path) == weights_at(tmp_path, 4)


def test_a_best_checkpoint_that_is_damaged_is_said_and_the_last_weights_are_the_result(data, whole, tmp_path):
    shutil.copytree(whole["torch"], tmp_path / "run")
    shutil.rmtree(tmp_path / "run/adapter")
    (tmp_path / f"run/checkpoints/step-{BEST:06d}/COMMITTED").unlink()
    heard: Any = Heard()
    result = train(recipe(data, tmp_path / "run", backend="torch"), callbacks=[heard])
    assert result.result_update == LAST
    assert [text for text in heard.notes if "the result is that of the last update" in text]
    assert weights_of(tmp_path / "run") == weights_at(tmp_path / "run", LAST)


def test_without_restore_best_the_last_weights_are_the_result_and_nothing_more_is_kept(data, tmp_path):
    train(recipe(data, tmp_path, "evaluation.restore_best=false", backend="torch"))
    assert result_of(tmp_path)[2]["update"] == LAST
    assert result_of(tmp_path)[3] == [f"step-{LAST:06d}"]
    assert weights_of(tmp_path) == weights_at(tmp_path, LAST)


def test_an_ended_run_follows_evaluation_settings_that_are_new(data, whole, tmp_path):
    shutil.copytree(whole["torch"], tmp_path / "run")
    result = train(recipe(data, tmp_path / "run", "evaluation.restore_best=false", backend="torch"))
    assert (result.already_complete, result.result_update) == (True, LAST)
    assert weights_of(tmp_path / "run") == weights_at(tmp_path / "run", LAST)
    result = train(recipe(data, tmp_path / "run", "evaluation.patience=4", backend="torch"))
    assert (result.already_complete, result.updates, result.result_update) == (False, LAST + 2, BEST)


def test_min_delta_and_mode_decide_when_it_is_enough(data, tmp_path):
    """From update 6 to 8 the loss falls by 0.6 only; and more of it is better where the mode says so."""
    heard: Any = Heard()
    given = ["evaluation.min_delta=0.7", "evaluation.patience=1"]
    train(recipe(data, tmp_path / "delta", *given, backend="torch"), callbacks=[heard])
    result = result_of(tmp_path / "delta")[2]
    losses = {row["step"]: row["eval_loss"] for row in result_of(tmp_path / "delta")[1] if "eval_loss" in row}
    why = f"1 evaluation without an eval_loss better than {losses[BEST - 2]:.4f} of update {BEST - 2} by 0.7"
    assert f"stopped early after update {BEST}: {why}" in heard.notes
    assert (result["last_update"], result["update"]) == (BEST, BEST), "the best by however little is the best"
    train(recipe(data, tmp_path / "mode", "evaluation.mode=max", "evaluation.patience=2", backend="torch"))
    result = result_of(tmp_path / "mode")[2]
    assert (result["last_update"], result["update"]) == (4, 0)


def test_training_losses_of_other_rows_go_up_and_down_without_a_word(data, tmp_path):
    """Rows alone, one per update: the last is harder than the first."""
    given = ["train.updates=6", "train.batch_size=1", "optimizer.lr=1e-9", "evaluation.every=null"]
    config = recipe(data, tmp_path / "run", *given, "evaluation.patience=null", backend="torch")
    for seed in range(3):
        found = train(
            config.model_copy(update={"train": config.train.model_copy(update={"seed": seed})}), resume="never"
        )
        assert not found.diverged


@pytest.mark.parametrize("name", ["", "checkpoints", f"checkpoints/step-{LAST:06d}"])
def test_a_resume_from_another_folder_takes_its_best_checkpoint_along(data, whole, tmp_path, name):
    config = recipe(data, tmp_path / "run", "evaluation.patience=4", backend="torch")
    heard = Heard()
    result = train(config, resume=str(whole["torch"] / name), callbacks=[heard])
    assert (result.updates, result.result_update) == (LAST + 2, BEST), heard.notes
    assert weights_of(tmp_path / "run") == weights_of(whole["torch"])
    assert train(config).already_complete


def test_a_resume_by_another_metric_counts_anew(data, whole, tmp_path):
    shutil.copytree(whole["torch"], tmp_path / "run")
    found, _ = checkpoint.newest(tmp_path / "run/checkpoints")
    assert found is not None
    going = replace(found, state={**found.state, "loop": {**found.state["loop"], "finished": False}})
    checkpoint.save(tmp_path / "run/checkpoints", going, keep=2)
    more = [
        f"evaluation.sets={{train: {data}/train.jsonl}}",
        "evaluation.metric=eval_train_loss",
        "evaluation.mode=max",
    ]
    result = train(recipe(data, tmp_path / "run", *more, backend="torch"))
    assert result.updates > LAST


@pytest.mark.parametrize("backend", ["torch", pytest.param("mlx", marks=pytest.mark.slow)])
def test_evaluations_on_sets_and_answers_change_no_weight(data, tmp_path, backend):
    more = [f"evaluation.sets={{train: {data}/train.jsonl}}", "evaluation.generate=2", "evaluation.max_tokens=3"]
    plain = ["evaluation.patience=null", "train.updates=2"]
    train(recipe(data, tmp_path / backend, *plain, backend=backend))
    result = train(recipe(data, tmp_path / f"{backend}-more", *plain, *more, backend=backend))
    one, two = result_of(tmp_path / backend), result_of(tmp_path / f"{backend}-more")
    assert one[0] == two[0]
    manifest = json.loads((tmp_path / f"{backend}-more/manifest.json").read_text())
    assert manifest["rows"] == {"train": 6, "valid": 3, "kind": "prompt", "sets": {"train": 6}}
    assert sorted(manifest["data_sha256"]) == ["evaluation.sets.train/train.jsonl", "train.jsonl", "valid.jsonl"]
    metrics = ("loss", "exact_match", "token_f1", "rouge_l")
    wanted = [f"eval_{name}{metric}" for name in ("", "train_") for metric in metrics]
    assert sorted(result.evaluation) == sorted(wanted)
    assert [row["eval_loss"] for row in one[1] if "eval_loss" in row] == [
        row["eval_loss"] for row in two[1] if "eval_loss" in row
    ]


def test_rows_that_are_dropped_as_too_long_are_not_asked(tmp_path):
    rows = [{"prompt": "a " * number, "completion": "b"} for number in (2, 500, 3)]
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ["data.drop=[too_long]", "data.max_length=64", "evaluation.generate=2"]
    prepared = prepare(recipe(tmp_path, tmp_path / "run", *more, backend="torch"))
    assert prepared.exam is not None
    assert [question.source for question in prepared.exam.questions[""]] == ["valid.jsonl:1", "valid.jsonl:3"]


def test_a_set_may_have_columns_of_its_own(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"q": "one", "a": "two"}\n')
    (tmp_path / "same.jsonl").write_text('{"q": "three", "a": "four"}\n')
    (tmp_path / "plain.jsonl").write_text('{"prompt": "three", "completion": "four"}\n')
    sets = f"evaluation.sets={{same: {tmp_path}/same.jsonl, plain: {tmp_path}/plain.jsonl}}"
    more = ["data.columns={prompt: q, completion: a}", "data.path=" + str(tmp_path / "train.jsonl"), sets]
    prepared = prepare(recipe(tmp_path, tmp_path / "run", *more, backend="torch"))
    assert prepared.sets["plain"][0].tokens.tolist() == prepared.sets["same"][0].tokens.tolist()


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_evaluate_gives_the_numbers_of_the_run_and_scores_of_every_set(data, whole, tmp_path, capsys, backend):
    files = [str(data / f"{name}.jsonl") for name in ("valid", "train")]
    words = ["evaluate", str(BASE), "--adapter", str(whole[backend] / "adapter"), "--backend", backend, "--json"]
    more = ["--generate", "2", "--max-tokens", "8", "--answers", str(tmp_path / "answers.jsonl")]
    assert main.run([*words, *(word for file in files for word in ("--data", file)), *more]) == 0
    sets = json.loads(capsys.readouterr().out.splitlines()[-1])["sets"]
    assert [found["data"] for found in sets] == files
    assert sets[0]["loss"] == pytest.approx(result_of(whole[backend])[2]["best"], rel=1e-6)
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [answer["source"] for answer in answers] == [
        "valid.jsonl:1",
        "valid.jsonl:2",
        "train.jsonl:1",
        "train.jsonl:2",
    ]
    for found in sets:
        own = [answer["scores"] for answer in answers if answer["data"] == found["data"]]
        assert found["scores"] == {"answers": 2, **{key: sum(one[key] for one in own) / 2 for key in own[0]}}


def test_options_of_answers_need_generate(capsys):
    assert main.run(["evaluate", str(BASE), "--data", "x", "--answers", "y"]) == 2
    assert "--answers without --generate" in capsys.readouterr().err
    assert main.run(["evaluate", str(BASE), "--data", "x", "--generate", "some"]) == 2
    assert "expected: a number of prompts, or all" in capsys.readouterr().err


@pytest.mark.parametrize(("lr", "restore_best"), [(10, "false"), (10, "true"), (1e-3, "false")])
def test_a_run_that_ends_far_above_its_start_says_so_wherever_it_is_told(data, tmp_path, capsys, lr, restore_best):
    given = [f"optimizer.lr={lr}", f"evaluation.restore_best={restore_best}", "adapter.type=none", "train.updates=4"]
    heard = Heard()
    config = recipe(data, tmp_path / "run", *given, "evaluation.patience=null", backend="torch")
    told = bool(train(config, callbacks=[heard]).diverged)
    assert told == (lr > 1)
    assert any(text.startswith("training diverged: the validation loss ended at") for text in heard.notes) == told
    assert ("Training diverged" in (tmp_path / "run" / "report.html").read_text()) == told
    assert ("training diverged" in (tmp_path / "run" / "model" / "README.md").read_text()) == told
    assert main.run(["runs", "ls", str(tmp_path)]) == 0
    assert ("diverged" in capsys.readouterr().out) == (told and restore_best == "false")
