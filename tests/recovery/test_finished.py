"""A finished run whose files got lost or damaged: the same command puts them right from the checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mlxlora
from shared.adapters.folder import read_adapter
from shared.adapters.hashes import hashes_of
from shared.config import RunConfig
from shared.config_file import build_config
from shared.errors import AdapterError, CheckpointError, ConfigError
from shared.jobs.train import train


@pytest.fixture(scope="module")
def make_config(tiny_model_folder, tmp_path_factory) -> Callable[..., RunConfig]:
    """Return a factory of configs of one small run."""
    data = tmp_path_factory.mktemp("rows")
    (data / "train.jsonl").write_text("".join(json.dumps({"text": "hello world " * n}) + "\n" for n in range(1, 9)))

    def make(output: Path, *overrides: str) -> RunConfig:
        values = {
            "model": str(tiny_model_folder()), "data": {"path": str(data), "cache": False}, "backend": "torch",
            "train": {"updates": 3, "batch_size": 4, "dtype": "float32"}, "adapter": {"rank": 2, "targets": ["q_proj"]},
            "evaluation": {"every": None}, "log": {"every": 1}, "output": str(output),
        }  # fmt: skip
        return build_config(values, overrides=list(overrides))

    return make


@pytest.fixture(scope="module")
def whole(make_config, tmp_path_factory) -> Path:
    """Return the folder of the finished run."""
    return train(make_config(tmp_path_factory.mktemp("whole"))).output


@pytest.fixture
def run(whole, tmp_path) -> Path:
    """Return a copy of the finished run."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def files_of(folder: Path) -> dict[str, bytes]:
    names = ("adapter_config.json", "adapter_model.safetensors", "adapters.safetensors")  # the card names the run
    return {name: (folder / name).read_bytes() for name in names}


class Heard:
    """A callback that keeps the notes on files, and on backends."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def on_note(self, text: str) -> None:
        if "missing or damaged" in text or "bit for bit" in text:
            self.notes.append(text)


def again(config: RunConfig) -> tuple[Any, str]:
    heard: Any = Heard()
    return train(config, callbacks=[heard]), "; ".join(heard.notes)


@pytest.mark.parametrize("damaged", [b"", b"{{", b"[]", b"[" * 100_000, b"\xff", b'{"updates": "3"}', None])
def test_a_manifest_that_is_damaged_or_lost_is_written_anew(make_config, whole, run, damaged):
    if damaged is None:
        (run / "manifest.json").unlink()
    else:
        (run / "manifest.json").write_bytes(damaged)
    result, notes = again(make_config(run))
    assert result.already_complete
    assert "manifest.json was missing or damaged: it is written anew" in notes
    one, two = (json.loads((folder / "manifest.json").read_bytes()) for folder in (whole, run))
    assert one.keys() == two.keys()
    assert all(one[key] == two[key] for key in ("result", "base_sha256", "data_sha256", "updates", "rows"))
    assert files_of(run / "adapter") == files_of(whole / "adapter")
    assert not again(make_config(run))[1]


def test_another_run_is_not_taken_over_without_its_manifest(make_config, run):
    (run / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"started differently.*optimizer\.lr"):
        train(make_config(run, "optimizer.lr=0.5"))
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ConfigError, match='is not the folder of a run, and a run would replace "adapter"'):
        train(make_config(run))


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapters.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("how", ["cut", "changed", "gone"])
def test_a_damaged_adapter_is_written_anew(make_config, whole, run, file, how):
    place = run / "adapter" / file
    data = place.read_bytes()
    place.unlink()
    if how != "gone":
        place.write_bytes(data[: len(data) // 2] if how == "cut" else data[:-2] + bytes([data[-2] ^ 1, data[-1]]))
    if how == "changed" and file != "adapter_config.json":
        with pytest.raises(AdapterError, match=rf"{file} is damaged or was changed(.|\n)*copy or train the adapter"):
            read_adapter(run / "adapter")
    result, notes = again(make_config(run))
    assert result.already_complete
    assert f"{run / 'adapter'} was missing or damaged" in notes or (how, file[-4:]) == ("changed", "json")
    assert files_of(run / "adapter") == files_of(whole / "adapter")


def test_a_damaged_model_is_written_anew(make_config, tmp_path):
    config = make_config(tmp_path / "run", "adapter={type: none}")
    file = train(config).adapter / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-100])
    assert "was missing or damaged" in again(config)[1]
    assert file.read_bytes() == data


def test_an_adapter_that_peft_saved_again_is_left_as_it_is(make_config, run):
    config = json.loads((run / "adapter/adapter_config.json").read_text())
    del config["mlxlora"]
    (run / "adapter/adapter_config.json").write_text(json.dumps(config))
    before = files_of(run / "adapter")
    assert not again(make_config(run))[1]
    assert files_of(run / "adapter") == before


def test_another_backend_is_not_announced_where_nothing_is_trained(make_config, run):
    config = make_config(run)
    other = config.model_copy(update={"backend": "mlx"})
    assert not again(other)[1]
    (run / "manifest.json").unlink()
    again(other)
    assert json.loads((run / "manifest.json").read_text())["backend"] == "torch", "which has trained it"


def test_hashes_are_those_of_the_files_wherever_an_adapter_goes(run, tmp_path):
    def notes(folder: Path) -> dict[str, Any]:
        return json.loads((folder / "adapter_config.json").read_text())["mlxlora"]

    own = run / "adapter"
    assert notes(own)["sha256"] == hashes_of(own)
    assert list(hashes_of(own)) == ["adapter_model.safetensors", "adapters.safetensors"]
    for name, parts in {"sum": [own, f"{own}=0.5"], "copy": [own, f"{own}=0"]}.items():
        mlxlora.merge(parts, output=tmp_path / name)
        assert notes(tmp_path / name)["sha256"] == hashes_of(tmp_path / name)
        assert read_adapter(tmp_path / name).tensors
    mlxlora.convert(own, to="mlx", output=tmp_path / "mlx")
    assert "sha256" not in notes(tmp_path / "mlx"), "mlx-lm may train it on, in place"
    mlxlora.convert(tmp_path / "mlx", to="peft", output=tmp_path / "peft")
    assert (tmp_path / "peft/adapter_config.json").read_bytes() == (own / "adapter_config.json").read_bytes()
    assert read_adapter(tmp_path / "peft").tensors
