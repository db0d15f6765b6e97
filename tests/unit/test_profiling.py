"""log.profile: the framework's own trace of some updates, or a refusal before anything is loaded."""

from __future__ import annotations

import json

import pytest

from shared.config_file import build_config
from shared.errors import CapabilityError
from shared.jobs.train import train


@pytest.fixture
def make_config(tiny_model_folder, write_jsonl, tmp_path):
    data = write_jsonl(*({"text": "hello world " * n} for n in range(1, 7)))
    values = {"model": str(tiny_model_folder()), "data": {"path": str(data)}, "output": str(tmp_path / "run")}
    settings = ["train.batch_size=2", "train.dtype=float32", "log.profile=2"]
    return lambda backend, updates: build_config(
        {**values, "backend": backend}, overrides=[*settings, f"train.updates={updates}"]
    )


@pytest.mark.parametrize("updates", [3, pytest.param(6, marks=pytest.mark.slow)])  # 3: it ends in the trace
def test_torch_traces_the_updates_that_were_asked_for(make_config, tmp_path, updates):
    train(make_config("torch", updates))
    events = json.loads((tmp_path / "run/profile/trace.json").read_text())["traceEvents"]
    assert any(event.get("name") == "aten::mm" for event in events)


def test_mlx_without_metal_says_what_to_do_instead(make_config, tmp_path, monkeypatch):
    monkeypatch.delenv("MTL_CAPTURE_ENABLED", raising=False)
    with pytest.raises(CapabilityError, match=r"(?s)MLX traces nothing but Metal.*--backend torch"):
        train(make_config("mlx", 3))
    assert not (tmp_path / "run/profile").exists()
