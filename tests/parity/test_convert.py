"""Adapters of PEFT and mlx-lm, made by those libraries: the same logits on the other side, the same bytes back here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mlxlora import convert, fuse
from shared.errors import AdapterError, ConfigError
from shared.families import with_old_keys
from shared.jobs.parity import parity
from shared.jobs.train import train
from shared.tensors import load_file, save_file
from tests import tolerances
from tests.architectures import save
from tests.parity.test_families import CASES

IDS = [[5, 90, 17, 200, 33, 64, 8, 120, 91]]
BASES: dict[str, Path] = {}
PHI = {"head_dim": 16, "original_max_position_embeddings": 256, "pad_token_id": 0}
FAMILIES = {**CASES, "phi3 fused": ("phi3", PHI)}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Return a maker of tiny models whose config both libraries understand, one of each family."""

    def make(case="qwen3"):
        if case not in BASES:
            BASES[case] = save(tmp_path_factory.mktemp("base") / "model", *FAMILIES[case])
            file = BASES[case] / "config.json"
            file.write_text(json.dumps(with_old_keys(json.loads(file.read_text()))))
        return BASES[case]

    return make


def make_peft(folder: Path, target: Path, *, dtype="float32", copies=False, **options) -> Path:
    """Have PEFT save an adapter with random values."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    options = {"r": 4, "lora_alpha": 8, "target_modules": LINEARS, "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(plain, LoraConfig(**options), autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=generator))
            elif parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            if parameter.requires_grad:
                parameter.data = parameter.to(getattr(torch, dtype))
    model.save_pretrained(str(target), save_embedding_layers=copies)
    return target


def make_mlx(folder: Path, target: Path, *, kind="lora", num_layers=-1, **parameters) -> Path:
    """Have mlx-lm save an adapter with random values."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model, save_config

    model, _ = load_model(folder)
    parameters = {"rank": 4, "scale": 2.5, "dropout": 0.0, **parameters}
    model.freeze()
    linear_to_lora_layers(model, num_layers, parameters, use_dora=kind == "dora")
    mx.random.seed(0)
    leaves = ("lora_a", "lora_b", "m")
    values = {name: value for name, value in tree_flatten(model.parameters()) if name.rpartition(".")[2] in leaves}
    drawn = {
        name: value * (1 + 0.2 * mx.random.uniform(shape=value.shape))
        if name.endswith(".m")
        else 0.1 * mx.random.normal(value.shape)
        for name, value in values.items()
    }
    target.mkdir(parents=True)
    mx.save_safetensors(str(target / "adapters.safetensors"), drawn)
    config = {"fine_tune_type": kind, "num_layers": num_layers, "lora_parameters": parameters, "model": str(folder)}
    save_config({**config, "iters": 10, "data": "rows", "seed": 0}, target / "adapter_config.json")
    return target


def peft_logits(folder, adapter):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return PeftModel.from_pretrained(plain, str(adapter)).eval()(torch.tensor(IDS)).logits[0].numpy()


def mlx_logits(folder, adapter):
    import mlx.core as mx
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    if adapter is not None:
        load_adapters(model, str(adapter))
    model.eval()
    return np.array(model(mx.array(IDS)))[0]


def check_alike(folder, peft, mlx):
    one, two = peft_logits(folder, peft), mlx_logits(folder, mlx)
    bound = tolerances.LOGITS * max(np.abs(one).max() / 10, 1)
    assert np.abs(mlx_logits(folder, None) - two).max() > 100 * bound  # the adapter does something
    np.testing.assert_allclose(one, two, atol=bound, rtol=0)


def files_of(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def there_and_back(source, tmp_path, *, to, **options):
    """Convert an adapter, and convert the result back; return the result."""
    form = {"peft": "mlx", "mlx": "peft"}[to]
    assert not convert(source, to=to, output=tmp_path / "there", **options).restored
    result = convert(tmp_path / "there", to=form, output=tmp_path / "back")
    assert result.restored
    assert files_of(tmp_path / "back") == files_of(source)
    return tmp_path / "there"


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("case", FAMILIES)
def test_peft_s_adapters_of_every_family(base, tmp_path, case, dora):
    targets = FUSED if case.startswith("phi3") else LINEARS
    source = make_peft(base(case), tmp_path / "peft", use_dora=dora, target_modules=targets)
    check_alike(base(case), source, there_and_back(source, tmp_path, to="mlx"))


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("case", FAMILIES)
def test_mlx_lm_s_adapters_of_every_family(base, tmp_path, case, kind):
    source = make_mlx(base(case), tmp_path / "mlx", kind=kind)
    check_alike(base(case), there_and_back(source, tmp_path, to="peft"), source)


PEFT_SETTINGS = {
    "rslora": {"use_rslora": True, "r": 6},
    "rslora dora": {"use_rslora": True, "use_dora": True},
    "own ranks": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 9}, "r": 3},
    "own alphas": {"alpha_pattern": {"k_proj": 3, r"model.layers.0.mlp.*": 16}},
    "own ranks and rslora": {"rank_pattern": {"q_proj": 5}, "use_rslora": True},
    "own ranks and dora": {"rank_pattern": {"q_proj": 2}, "use_dora": True, "lora_dropout": 0.1},
    "one layer": {"layers_to_transform": [0], "target_modules": ["q_proj", "up_proj"]},
    "last layer": {"layers_to_transform": [1]},
    "expression": {"target_modules": r".*layers\.1\.(self_attn\.(q|o)_proj|mlp\.down_proj)"},
    "ends": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "embedding alone": {"target_modules": ["embed_tokens"], "copies": True},
    "head with dora": {"target_modules": ["lm_head", "v_proj"], "use_dora": True},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16 with own alphas": {"dtype": "bfloat16", "alpha_pattern": {"k_proj": 3, "q_proj": 4}},
    "float16": {"dtype": "float16", "rank_pattern": {"q_proj": 2}},
}


@pytest.mark.parametrize("name", PEFT_SETTINGS)
def test_peft_s_settings(base, tmp_path, name):
    source = make_peft(base(), tmp_path / "peft", **PEFT_SETTINGS[name])
    there = there_and_back(source, tmp_path, to="mlx", base=base())
    found = {tensor.dtype for tensor in load_file(there / "adapters.safetensors").values()}
    if name in ("bfloat16", "float16"):
        assert found == {{"bfloat16": "BF16", "float16": "F32"}[name]} or name == "float16"
    check_alike(base(), source, there)


MLX_SETTINGS = {
    "last layer": {"num_layers": 1},
    "keys": {"keys": ["self_attn.q_proj", "mlp.up_proj"], "dropout": 0.1},
    "ends": {"keys": ["self_attn.q_proj", "model.embed_tokens", "lm_head"]},
    "head with dora": {"keys": ["lm_head"], "kind": "dora"},
}


@pytest.mark.parametrize("name", MLX_SETTINGS)
def test_mlx_lm_s_settings(base, tmp_path, name):
    source = make_mlx(base(), tmp_path / "mlx", **MLX_SETTINGS[name])
    check_alike(base(), there_and_back(source, tmp_path, to="peft"), source)


def test_square_matrices_are_turned(base, tmp_path):
    """A square projection of full rank loads either way round; only its numbers tell."""
    source = make_peft(base(), tmp_path / "peft", r=64, target_modules=["o_proj"])
    check_alike(base(), source, there_and_back(source, tmp_path, to="mlx"))


def test_our_own_folder_is_taken_apart_and_comes_back(make_config, tiny_model_folder, tmp_path):
    base = tiny_model_folder()
    adapter = train(make_config(base, "train.updates=2", "evaluation.every=null", "adapter.type=rslora")).adapter
    for to, file in (("mlx", "adapter_model.safetensors"), ("peft", "adapters.safetensors")):
        form = {"peft": "mlx", "mlx": "peft"}[to]
        convert(adapter, to=to, output=tmp_path / to)
        assert not (tmp_path / to / file).exists()
        assert convert(tmp_path / to, to=form, output=tmp_path / f"{to}-back").restored
        for name in (file, "adapter_config.json"):
            assert (tmp_path / f"{to}-back" / name).read_bytes() == (adapter / name).read_bytes()
    check_alike(base, tmp_path / "peft", tmp_path / "mlx")


def test_what_was_trained_on_after_a_conversion_is_converted_anew(base, tmp_path):
    source = make_peft(base(), tmp_path / "peft")
    convert(source, to="mlx", output=tmp_path / "mlx")
    file = tmp_path / "mlx/adapters.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).data[0, 0] += 1
    save_file(file, tensors.items(), metadata={"format": "mlx"})
    assert not convert(tmp_path / "mlx", to="peft", output=tmp_path / "back").restored
    check_alike(base(), tmp_path / "back", tmp_path / "mlx")
    config = json.loads((tmp_path / "mlx/adapter_config.json").read_text())
    config["lora_parameters"]["scale"] = 0.25
    (tmp_path / "mlx/adapter_config.json").write_text(json.dumps(config))
    assert not convert(tmp_path / "mlx", to="peft", output=tmp_path / "again").restored
    check_alike(base(), tmp_path / "again", tmp_path / "mlx")


@pytest.mark.parametrize("backend", ["mlx", "torch"])
@pytest.mark.parametrize("dora", [False, True])
def test_numbers_per_module_are_read_for_inference(base, tmp_path, backend, dora):
    from shared.sessions import open_session

    options = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}, "use_dora": dora, "use_rslora": True}
    source = make_peft(base(), tmp_path / "peft", **options)
    wanted = peft_logits(base(), source)
    model = open_session(str(base()), adapter=str(source), backend=backend, dtype="float32").model
    if backend == "torch":
        import torch

        found = model.head.logits(model.decoder(input_ids=torch.tensor(IDS)).last_hidden_state[0]).detach().numpy()
    else:
        import mlx.core as mx

        found = np.array(model.head.logits(model.decoder(mx.array(IDS))[0]))
    np.testing.assert_allclose(found, wanted, atol=tolerances.LOGITS * max(np.abs(wanted).max() / 10, 1), rtol=0)


NUMBERS = {"rank": 4, "alpha": 8, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}, "type": "rslora"}


def test_training_goes_on_from_an_adapter_of_peft_or_mlx_lm(base, make_config, tmp_path):
    options = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}, "use_rslora": True}
    source = make_peft(base("llama head_dim"), tmp_path / "peft", dtype="bfloat16", **options)
    config = make_config(base("llama head_dim"), adapter={**NUMBERS, "start": str(source)})
    result = parity(config, updates=4)
    assert result.ok, [vars(gap) for gap in result.gaps if not gap.ok]
    fresh = parity(make_config(base("llama head_dim"), "train.updates=1", adapter=NUMBERS))
    assert len(fresh.curves[0]) == 1
    assert abs(fresh.curves[0][0] - result.curves[0][0]) > 0.01  # it starts elsewhere
    adapter = train(config.model_copy(update={"backend": "torch"})).adapter
    check_alike(base("llama head_dim"), adapter, adapter)
    other = make_mlx(base("llama head_dim"), tmp_path / "mlx", kind="dora")
    again = make_config(base("llama head_dim"), adapter={"start": str(other)}, output=str(tmp_path / "other"))
    with pytest.raises(ConfigError, match=r"adapter.type: dora, rank: 4, alpha: 10, targets: \[down_proj, "):
        train(again)
    nowhere = make_config(base("llama head_dim"), adapter={"start": "nowhere"}, output=str(tmp_path / "other"))
    with pytest.raises(AdapterError, match="no adapter folder at nowhere"):
        train(nowhere)
    assert not (tmp_path / "other/adapter").exists()


@pytest.mark.parametrize("name", ["ends", "dora"])
def test_fused_adapters_of_embeddings_and_dora_give_the_same_logits(base, tmp_path, name):
    options = {"ends": PEFT_SETTINGS["ends"], "dora": {"use_dora": True, "rank_pattern": {"q_proj": 2}}}[name]
    source = make_peft(base(), tmp_path / "peft", **options)
    fuse(base(), adapter=source, output=tmp_path / "fused")
    wanted, found = peft_logits(base(), source), mlx_logits(tmp_path / "fused", None)
    np.testing.assert_allclose(found, wanted, atol=tolerances.LOGITS * max(np.abs(wanted).max() / 10, 1), rtol=0)
