"""An adapter of a user's own: LoRA and (IA)3 written in ten lines, against PEFT, on both backends."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest

from mlxlora import convert
from shared.adapters.folder import read_adapter
from shared.adapters.own import OWN
from shared.adapters.writing import Facts, to_peft, write_config
from shared.errors import CapabilityError, ConfigError
from shared.jobs.fuse import fuse
from shared.jobs.parity import parity
from shared.jobs.train import train
from shared.tensors import save_file
from tests import tolerances
from tests.parity.test_whole import logits_of, peft_logits

CODE = """
import numpy as np
from shared.adapters.own import OwnAdapter


def start(layer):
    A = layer.uniform("A", (layer.rank, layer.width), bound=layer.width**-0.5)
    return {"A": A, "B": np.zeros((layer.out, layer.rank), dtype=np.float32)}


LowRank = OwnAdapter(start, lambda x, y, own, layer: y + layer.scale * ((x @ own["A"].T) @ own["B"].T))
IA3 = OwnAdapter(lambda layer: {"gain": np.ones(layer.out)}, lambda x, y, own, layer: y * own["gain"])
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "own_adapters_for_a_test.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))


def settings(kind, *more):
    return [f"adapter.type=own_adapters_for_a_test:{kind}", "train.updates=4", "optimizer.lr=2e-2", *more]


def test_lora_as_a_users_own_has_pefts_logits(make_config, tiny_model_folder, tmp_path, monkeypatch):
    folder = tiny_model_folder()
    adapter = train(make_config(folder, *settings("LowRank", "backend=torch"))).adapter
    found = read_adapter(adapter)
    leaf = {"A": "lora_A", "B": "lora_B"}
    tensors = {f"{name[:-1].replace(OWN, '.')}{leaf[name[-1]]}": value for name, value in found.tensors.items()}
    layout = to_peft(replace(found.spec, kind="lora"), tensors, Facts(), base=str(folder))
    (tmp_path / "peft").mkdir()
    save_file(tmp_path / "peft" / layout.file, layout.tensors.items(), metadata={"format": "pt"})
    write_config(tmp_path / "peft", layout.config)
    wanted = peft_logits(folder, tmp_path / "peft")
    assert np.abs(wanted - peft_logits(folder)).max() > 0.1
    with pytest.raises(CapabilityError, match="which only its folder names"):
        logits_of(folder, adapter, "torch")
    monkeypatch.setenv("MLXLORA_OWN_ADAPTERS", found.spec.kind)
    for backend in ("torch", "mlx"):
        found = logits_of(folder, adapter, backend)
        assert np.abs(found - wanted).max() <= tolerances.LOGITS * max(np.abs(wanted).max() / 10, 1)


@pytest.mark.parametrize("kind", ["LowRank", "IA3"])
def test_both_backends_train_it_alike(make_config, tiny_model_folder, kind):
    more = ["adapter.modules_to_save=[norm]", "adapter.dropout=0.1", "quantization=affine-4bit-g32"]
    result = parity(make_config(tiny_model_folder(), *settings(kind, *more)))
    assert result.ok, [gap for gap in result.gaps if not gap.ok]


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_a_resumed_run_ends_with_the_same_bytes_and_a_run_goes_on_from_it(
    make_config, tiny_model_folder, tmp_path, backend
):
    folder, more = tiny_model_folder(), ["checkpoint.every=2", f"backend={backend}", "train.recompute=true"]
    whole = train(make_config(folder, *settings("IA3", *more)))
    shutil.copytree(whole.output, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "adapter")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-000004")
    again = train(make_config(folder, *settings("IA3", *more), f"output={tmp_path / 'again'}"))
    one, two = (read_adapter(run.adapter).tensors for run in (whole, again))
    assert all(np.array_equal(one[name].data, two[name].data) for name in one)
    assert one.keys() == two.keys()
    goes_on = [f"adapter.start={whole.adapter}", f"output={tmp_path / 'more'}", f"backend={backend}"]
    assert train(make_config(folder, *settings("IA3", *goes_on))).updates == 4


def test_what_the_libraries_cannot_load_is_said(make_config, tiny_model_folder, tmp_path):
    folder = tiny_model_folder()
    adapter = train(make_config(folder, *settings("IA3", "backend=torch"))).adapter
    assert sorted(file.name for file in adapter.iterdir()) == [
        "README.md", "adapter_config.json", "own_adapter.safetensors",
    ]  # fmt: skip
    assert "PEFT and mlx-lm cannot load it" in (adapter / "README.md").read_text()
    with pytest.raises(CapabilityError, match="neither library"):
        convert(adapter, to="mlx", output=tmp_path / "out", base=folder)
    with pytest.raises(CapabilityError, match="nobody knows what it does"):
        fuse(str(folder), adapter=str(adapter), output=str(tmp_path / "out"))
    for options, word in (("adapter.type=own_adapters_for_a_test:CODE", "no "), ("adapter.targets=[lm_head]", "own")):
        with pytest.raises(ConfigError, match=word):
            train(make_config(folder, *settings("IA3"), options, f"output={tmp_path / 'other'}"))
