"""PEFT trains the same curve from the same start, and both libraries load our adapter folder as it is."""

from __future__ import annotations

import numpy as np
import pytest

from shared.adapters.folder import read_adapter
from shared.adapters.names import PEFT_PREFIX
from shared.adapters.spec import initial_adapter
from shared.callbacks import Metrics
from shared.data.batch import Plan
from shared.jobs.prepare import prepare
from shared.jobs.train import train
from shared.loop import build_update
from shared.schedules import build_schedule
from shared.sessions import open_session
from shared.tensors import to_float32
from tests import tolerances

UPDATES = 25


def peft_curve(config):
    """Return the losses of PEFT + torch.optim.AdamW on the same rows from the same initial adapter."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    prepared = prepare(config)
    plain = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(plain, LoraConfig(r=8, lora_alpha=16, target_modules=targets))
    linears = {n: tuple(m.weight.shape) for n, m in plain.named_modules() if n.endswith("base_layer")}
    spec = read_spec(sorted(name.removesuffix(".base_layer") for name in linears))
    start = initial_adapter(
        spec, {n.removesuffix(".base_layer"): s for n, s in linears.items()}, seed=config.train.seed
    )
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in start.items():
            module, leaf = name.rsplit(".", 1)
            own[f"{PEFT_PREFIX}{module}.{leaf}.default.weight"].copy_(torch.from_numpy(tensor.data))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1.0, betas=config.optimizer.betas, eps=1e-8, weight_decay=0.0)
    schedule = build_schedule(config.schedule, lr=config.optimizer.lr, updates=config.train.updates)
    plan, losses = Plan(len(prepared.train), config.train.batch_size, config.train.seed), []
    model.eval()  # no dropout
    for step in range(1, UPDATES + 1):
        total, weight = torch.zeros(()), 0
        for row in plan.rows(step):
            example = prepared.train[row]
            logits = model(torch.from_numpy(example.tokens)[None].long()).logits[0]
            at = np.flatnonzero(example.supervised)
            targets_N = torch.from_numpy(example.tokens[at]).long()
            total = total + torch.nn.functional.cross_entropy(logits[at - 1], targets_N, reduction="sum")
            weight += len(at)
        optimizer.zero_grad()
        (total / weight).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.param_groups[0]["lr"] = build_update(config, step, lr=schedule(step)).lr
        optimizer.step()
        losses.append(float(total.detach() / weight))
    return losses


def read_spec(modules):
    from shared.types import AdapterSpec

    return AdapterSpec("lora", rank=8, alpha=16.0, dropout=0.0, modules=tuple(modules))


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_curve_is_that_of_peft(make_config, tiny_model_folder, backend):
    config = make_config(
        tiny_model_folder(), f"train.updates={UPDATES}", "log.every=1", "evaluation.every=null", f"backend={backend}"
    )
    result = train(config)
    ours = [row["loss"] for row in Metrics(result.output / "metrics.jsonl").read() if "loss" in row]
    np.testing.assert_allclose(ours, peft_curve(config), rtol=tolerances.CURVE)
    assert ours[-1] < ours[0] - 0.5


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("adapter.layers=1",),
        ("adapter.layers=[0]", "adapter.targets=[q_proj, up_proj]"),
        ("adapter.targets=[model.layers.1.self_attn.q_proj, o_proj]", "adapter.alpha=5", "adapter.rank=3"),
        ("adapter.type=rslora", "adapter.rank=4"),
        ("adapter.type=dora", "adapter.layers=[0]", "adapter.targets=[q_proj, up_proj]"),
        ("adapter.type=dora",),
        ("adapter.targets=[embed_tokens, lm_head, q_proj]", "adapter.type=rslora"),
        ("adapter.targets=[lm_head]", "adapter.type=dora"),
    ],
    ids=["all", "last-layer", "first-layer", "mixed", "rslora", "dora-first-layer", "dora", "ends", "dora-head"],
)
def test_adapter_folder_loads_in_peft_and_mlx_lm_with_the_same_logits(make_config, tiny_model_folder, family, settings):
    import mlx.core as mx
    import mlx_lm
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = tiny_model_folder(family)
    config = make_config(
        folder, "train.updates=6", "optimizer.lr=2e-2", "evaluation.every=null", "backend=torch", *settings
    )
    adapter = str(train(config).adapter)
    ids = [[5, 90, 17, 200, 33, 64, 8, 120, 91]]
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        before = base(torch.tensor(ids)).logits[0].numpy()
        peft = PeftModel.from_pretrained(base, adapter).eval()(torch.tensor(ids)).logits[0].numpy()
        own = open_session(str(folder), adapter=adapter, backend="torch").model
        ours_torch = own.head.logits(own.decoder(input_ids=torch.tensor(ids)).last_hidden_state[0]).numpy()
    other = open_session(str(folder), adapter=adapter, backend="mlx").model
    ours_mlx = np.array(other.head.logits(other.decoder(mx.array(ids))[0]))
    bound = tolerances.LOGITS * max(np.abs(peft).max() / 10, 1)
    assert np.abs(peft - before).max() > 100 * bound  # the adapter does something
    np.testing.assert_allclose(ours_torch, peft, atol=bound, rtol=0)
    np.testing.assert_allclose(ours_mlx, peft, atol=bound, rtol=0)
    if family != "qwen2":  # mlx-lm 0.32 takes the wrong rope base from transformers 5's qwen2 configs
        model, _ = mlx_lm.load(str(folder), adapter_path=adapter)
        np.testing.assert_allclose(np.array(model(mx.array(ids)))[0], peft, atol=bound, rtol=0)


def test_adapters_of_peft_and_mlx_lm_load_here(make_config, tiny_model_folder, tmp_path):
    """PEFT's own save, and a folder with mlx-lm's file alone, read as the same tensors."""
    import json

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = tiny_model_folder()
    adapter = train(make_config(folder, "train.updates=3", "evaluation.every=null", "backend=mlx")).adapter
    ours = read_adapter(adapter)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(adapter)).save_pretrained(
        tmp_path / "p"
    )
    (tmp_path / "m").mkdir()
    (tmp_path / "m/adapters.safetensors").write_bytes((adapter / "adapters.safetensors").read_bytes())
    config = json.loads((adapter / "adapter_config.json").read_text())
    config = {key: config[key] for key in ("fine_tune_type", "num_layers", "lora_parameters")}
    (tmp_path / "m/adapter_config.json").write_text(json.dumps(config))
    for name in ("p", "m"):
        found = read_adapter(tmp_path / name)
        assert found.spec == ours.spec
        assert found.tensors.keys() == ours.tensors.keys()
        for key, tensor in found.tensors.items():
            assert np.array_equal(to_float32(tensor), to_float32(ours.tensors[key])), key
