"""Trackers: each library reads back what was sent, once, and no credential is in any of it."""

from __future__ import annotations

import importlib
import json
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from shared.callbacks import Metrics
from shared.config_file import build_config
from shared.errors import AdapterError, CapabilityError, ConfigError
from shared.jobs.train import train
from shared.masking import mask
from shared.watching.display import PlainDisplay
from shared.watching.sinks import Sinks, check_sinks, read_state, sinks

NORM = "grad_norms/layers.0.q_proj"
SECRETS = {
    "HF_TOKEN": "hf_" + "Q" * 34,
    "WANDB_API_KEY": "5ecre7" * 7,
    "MLFLOW_TRACKING_PASSWORD": "pass-of-the-tracker",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a run folder with its config and manifest, as a run has it before its first update."""
    (tmp_path / "config.yaml").write_text("model: m\noptimizer: {lr: 0.001}\n")
    (tmp_path / "manifest.json").write_text(json.dumps({"backend": "torch", "rows": {"train": 3}}))
    return tmp_path


def row(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 2.0 / step, "lr": 1e-3, "grad_norms": {"layers.0.q_proj": 0.5 / step}}


def follow(folder: Path, name: str, steps: range, *, finished: bool) -> list[str]:
    """Write the rows of some updates with a tracker beside; return what it said."""
    notes: list[str] = []
    with sinks(folder, [name], notes.append) as found:
        found.on_start({})
        for step in steps:
            Metrics(folder / "metrics.jsonl").write(row(step))
            found.on_update(step)
        found.end(finished=finished, wait_s=120)
    return notes


def test_tensorboard_reads_each_row_once_also_after_a_resume(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert follow(folder, "tensorboard", range(1, 7), finished=False) == []
    Metrics(folder / "metrics.jsonl").truncate(4)  # the run goes on from a checkpoint
    assert follow(folder, "tensorboard", range(5, 10), finished=True) == []
    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    assert [event.step for event in found.Scalars("loss")] == list(range(1, 10))
    assert [event.value for event in found.Scalars("loss")] == pytest.approx([2.0 / n for n in range(1, 10)], rel=1e-6)
    assert [event.value for event in found.Scalars(NORM)] == pytest.approx([0.5 / n for n in range(1, 10)], rel=1e-6)
    assert read_state(folder, "tensorboard")["done"]
    again = Sinks(folder, ["tensorboard"], print)
    again.on_start({})
    assert again.followers == [], "a run that was sent whole is not sent again"


def test_trackio_reads_its_rows_and_the_config(folder, tmp_path_factory, monkeypatch):
    store = tmp_path_factory.mktemp("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(store))
    assert follow(folder, "trackio", range(1, 4), finished=True) == []
    code = (
        "import json, trackio; [run] = trackio.Api().runs('mlxlora'); "
        "from trackio.sqlite_storage import SQLiteStorage as s; "
        "print(json.dumps([run.config, s.get_logs('mlxlora', run.name)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    config, rows = json.loads(done.stdout)
    assert (config["optimizer.lr"], config["rows.train"]) == (0.001, 3)
    assert [(found["step"], found["loss"]) for found in rows] == [(1, 2.0), (2, 1.0), (3, 2 / 3)]
    assert [found[NORM] for found in rows] == [0.5 / n for n in range(1, 4)]


@pytest.mark.slow
def test_mlflow_reads_its_rows_and_the_config(folder, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (folder / "store").as_uri())
    assert follow(folder, "mlflow", range(1, 3), finished=False) == []
    assert follow(folder, "mlflow", range(3, 6), finished=True) == []
    code = (
        "import json; from mlflow.tracking import MlflowClient as C; c = C(); "
        "[run] = c.search_runs([c.get_experiment_by_name('mlxlora').experiment_id]); "
        "history = c.get_metric_history(run.info.run_id, 'loss'); "
        f"norm = run.data.metrics['{NORM}']; "
        "print(json.dumps([run.info.status, run.data.params, [[m.step, m.value] for m in history], norm]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    status, params, history, norm = json.loads(done.stdout)
    assert norm == 0.1
    assert (status, params["optimizer.lr"]) == ("FINISHED", "0.001")
    assert history == [[n, 2.0 / n] for n in range(1, 6)]


@pytest.mark.slow
def test_wandb_offline_holds_the_rows_and_the_config(folder, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert follow(folder, "wandb", range(1, 6), finished=True) == []
    [file] = folder.glob("wandb/offline-run-*/*.wandb")
    internal = importlib.import_module("wandb.proto.wandb_internal_pb2")
    found = [internal.Record.FromString(data) for data in level_records(file.read_bytes())]
    history = [{item.key or item.nested_key[0]: json.loads(item.value_json) for item in one.history.item}
               for one in found if one.HasField("history")]  # fmt: skip
    assert [(one["_step"], one["loss"], one[NORM]) for one in history] == [(n, 2 / n, 0.5 / n) for n in range(1, 6)]
    [run] = [one.run for one in found if one.HasField("run")]
    assert {item.key: json.loads(item.value_json) for item in run.config.update}["optimizer.lr"] == 0.001


def level_records(data: bytes) -> list[bytes]:
    """Return the records of a log in LevelDB's format (doc/log_format.md) behind W&B's 7 bytes."""
    records, part, at = [], b"", 7
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            records, part = [*records, part], b""
    return records


def test_a_missing_tracker_is_named_with_its_install_line_before_anything_is_loaded(monkeypatch):
    here = Path(__file__).parents[2]
    monkeypatch.setattr(sys, "path", [str(here), *(path for path in sys.path if "site-packages" not in path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(CapabilityError, match="pip install wandb") as caught:
        check_sinks(["jsonl", "wandb"])
    assert caught.value.exit_code == 4
    check_sinks(["jsonl"])


def test_offline_refuses_a_tracker_in_the_network(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:pass@tracker.example")
    with pytest.raises(ConfigError, match="offline"):
        check_sinks(["mlflow"])


@pytest.mark.parametrize("name", ["jsonl", "tensorboard", "trackio", "wandb", "mlflow"])
def test_the_config_takes_every_tracker(name):
    config = build_config({"model": "m", "data": {"path": "d"}}, overrides=[f"log.to=[jsonl, {name}]"])
    assert config.log.to[-1] == name


def test_no_credential_is_in_the_run_folder_or_in_what_is_printed(
    tiny_model_folder, write_jsonl, tmp_path, monkeypatch, capfd
):
    data = write_jsonl(*({"text": "hello world " * n} for n in range(1, 7)))
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    address = "https://someone:pass-of-the-address@hub.example/x?token=abcdefgh"
    settings = ["train.updates=2", "train.batch_size=2", "train.dtype=float32", "log.every=1"]
    values = {"model": str(tiny_model_folder()), "data": {"path": str(data)}, "output": str(tmp_path / "run")}
    config = build_config({**values, "backend": "torch"}, overrides=[*settings, "log.to=[jsonl, tensorboard]"])
    with pytest.raises(AdapterError) as caught:
        train(build_config({**values, "adapter": {"start": address}}))
    display = PlainDisplay(sys.stderr)
    train(config, callbacks=[display], command=["mlxlora", "train", f"--set=x={address}", *SECRETS.values()])
    assert (tmp_path / "run/sinks/tensorboard.json").is_file()
    texts = [str(caught.value), *capfd.readouterr()]
    texts += [str(path.read_bytes()) for path in (tmp_path / "run").rglob("*") if path.is_file()]
    for secret in (*SECRETS.values(), "pass-of-the-address", "abcdefgh"):
        assert not [text for text in texts if secret in text]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:secret@host/path", "https://***@host/path"),
        ("see https://host/path?x=1&api_key=abc&y=2", "see https://host/path?x=1&api_key=***&y=2"),
        ("token hf_" + "a" * 34 + " refused", "token *** refused"),
        ("mail me@host.example, a@b", "mail me@host.example, a@b"),
        ("train.batch_size=4 tokens=3", "train.batch_size=4 tokens=3"),
    ],
)
def test_mask_takes_out_credentials_and_nothing_else(text, shown):
    assert mask(text) == shown


def test_mask_takes_out_values_of_the_environment_but_no_paths(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "my-long-key-value")
    monkeypatch.setenv("KEEP_TOKEN", "/data/models")
    assert mask("a my-long-key-value in /data/models") == "a *** in /data/models"


def test_a_run_pays_less_than_a_millisecond_an_update_for_its_trackers(folder):
    """Looking whether a tracker has spoken is a read of an empty pipe at most twice a second."""
    with sinks(folder, ["tensorboard"], print) as found:
        found.on_start({})
        began = time.perf_counter()
        for step in range(1000):
            found.on_update(step)
        assert (time.perf_counter() - began) / 1000 < 1e-3
