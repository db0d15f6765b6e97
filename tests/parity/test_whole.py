"""Tied ends and whole modules beside LoRA: PEFT's logits and gradients from our folder, and PEFT's folders here."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from mlxlora import convert, quantize
from shared.adapters.folder import read_adapter
from shared.adapters.names import MLX_FILE, PEFT_FILE, twin
from shared.data.batch import make_batch
from shared.errors import ConfigError
from shared.folder import open_folder
from shared.jobs.fuse import fuse
from shared.jobs.parity import first_gradient, parity
from shared.jobs.train import train
from shared.registry import find_backend
from shared.sessions import open_session
from shared.types import Method
from tests import tolerances

LAYERS = {"gemma3_text": 6}  # mlx-lm's takes the sixth for granted
IDS = [[5, 90, 17, 200, 33, 64, 8, 120, 91]]
LORA, APART = "adapter.targets=[q_proj]", "adapter.ensure_weight_tying=false"
CASES = {  # family, tied, settings, whether mlx-lm can load it
    "tied-lora": ("llama", True, ["adapter.targets=[embed_tokens, q_proj]"], True),
    "tied-lora-gemma": ("gemma3_text", True, ["adapter.targets=[lm_head, q_proj]", "adapter.type=rslora"], True),
    "apart-lora": ("llama", True, ["adapter.targets=[embed_tokens, lm_head]", APART], False),
    "apart-dora": ("llama", True, ["adapter.targets=[lm_head]", "adapter.type=dora", APART], False),
    "tied-whole": ("llama", True, [LORA, "adapter.modules_to_save=[embed_tokens, norm]"], False),
    "apart-whole": ("llama", True, [LORA, "adapter.modules_to_save=[lm_head]", APART], False),
    "whole": (
        "qwen2",
        False,
        [LORA, "adapter.modules_to_save=[embed_tokens, lm_head, layers.0.input_layernorm, k_proj]"],
        False,
    ),
    "whole-gemma": ("gemma3_text", True, [LORA, "adapter.modules_to_save=[embed_tokens, norm]"], False),
}


def some(case):
    """Return a case for the default suite where it is one that others do not cover."""
    return (
        case
        if case in ("tied-lora", "apart-lora", "tied-whole", "whole")
        else pytest.param(case, marks=pytest.mark.slow)
    )


def logits_of(folder, adapter, backend):
    """Return our logits of a base with an adapter."""
    model = open_session(str(folder), adapter=str(adapter), backend=backend).model
    if backend == "mlx":
        import mlx.core as mx

        return np.array(model.head.logits(model.decoder(mx.array(IDS))[0]))
    import torch

    with torch.no_grad():
        return model.head.logits(model.decoder(input_ids=torch.tensor(IDS)).last_hidden_state[0]).numpy()


def peft_logits(folder, adapter=None, dtype="float32"):
    """Return transformers' logits, with the adapter that PEFT loads."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    kind = getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind)
    model = model if adapter is None else PeftModel.from_pretrained(model, str(adapter)).eval().to(kind)
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits[0].numpy()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [some(case) for case in CASES])
def test_the_written_folder_has_pefts_logits_on_both_backends(make_config, tiny_model_folder, case):
    family, tied, settings, in_mlx = CASES[case]
    folder = tiny_model_folder(family, tied=tied, layers=LAYERS.get(family, 2))
    usual = ["train.updates=4", "optimizer.lr=2e-2", "evaluation.every=null"]
    adapter = train(make_config(folder, *usual, "backend=torch", *settings)).adapter
    peft, before = peft_logits(folder, adapter), peft_logits(folder)
    assert np.abs(peft - before).max() > 0.1
    bound = tolerances.LOGITS * max(np.abs(peft).max() / 10, 1)
    if case == "whole-gemma":  # six layers: PEFT's own float32 is 1 to 2e-5 off
        bound += np.abs(peft - peft_logits(folder, adapter, "float64")).max()
    for backend in ("torch", "mlx"):
        assert np.abs(logits_of(folder, adapter, backend) - peft).max() <= bound
    assert (adapter / PEFT_FILE).is_file()
    assert (adapter / MLX_FILE).is_file() == in_mlx
    card = (adapter / "README.md").read_text()
    assert ("from mlx_lm import load" in card) == in_mlx
    assert ("mlx-lm cannot load it" in card) != in_mlx
    if in_mlx:
        import mlx.core as mx
        import mlx_lm

        theirs, _ = mlx_lm.load(str(folder), adapter_path=str(adapter))
        assert np.abs(np.array(theirs(mx.array(IDS))[0]) - peft).max() <= bound


@pytest.mark.parametrize(
    "case", [some(case) for case in CASES if "gemma" not in case]
)  # whose base alone differs by 2.9e-5
def test_both_backends_train_it_alike(make_config, tiny_model_folder, case):
    family, tied, settings, _ = CASES[case]
    folder = tiny_model_folder(family, tied=tied, layers=LAYERS.get(family, 2))
    result = parity(make_config(folder, "train.updates=3", *settings))
    assert result.ok, [gap for gap in result.gaps if not gap.ok]


def made_by_peft(folder, options, target):
    """Return the logits of a random adapter of PEFT's, which is saved."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), options)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=random))
        wanted = model.eval()(torch.tensor(IDS)).logits[0].numpy()
    model.save_pretrained(target)
    return wanted


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tying", [True, False])
def test_an_adapter_that_peft_made_loads_here(tiny_model_folder, tmp_path, tying):
    from peft import LoraConfig

    folder = tiny_model_folder(tied=True)
    modules = ["embed_tokens", "model.norm"]
    options = LoraConfig(
        target_modules=["q_proj"], modules_to_save=modules, ensure_weight_tying=tying, task_type="CAUSAL_LM"
    )
    wanted = made_by_peft(folder, options, tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["ensure_weight_tying"] == tying
    spec = read_adapter(tmp_path / "a").spec
    assert (spec.saved, spec.tied) == (("model.embed_tokens", "model.norm"), tying)
    for backend in ("torch", "mlx"):
        found = logits_of(folder, tmp_path / "a", backend)
        assert np.abs(found - wanted).max() <= tolerances.LOGITS * max(np.abs(wanted).max() / 10, 1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["tied-lora", "whole"])
def test_fused_it_gives_the_same_logits_to_transformers(make_config, tiny_model_folder, tmp_path, case):
    family, tied, settings, _ = CASES[case]
    folder = tiny_model_folder(family, tied=tied)
    usual = ["train.updates=4", "optimizer.lr=2e-2", "evaluation.every=null", "backend=mlx"]
    adapter = train(make_config(folder, *usual, *settings)).adapter
    output = fuse(str(folder), adapter=str(adapter), output=str(tmp_path / "fused")).output
    wanted, found = logits_of(folder, adapter, "torch"), peft_logits(output)
    assert np.abs(found - wanted).max() <= tolerances.LOGITS * max(np.abs(wanted).max() / 10, 1)


@pytest.mark.parametrize("backend", ["mlx", "torch"])
@pytest.mark.parametrize("case", ["tied-lora", "whole"])
def test_a_resumed_run_ends_with_the_same_bytes(make_config, tiny_model_folder, tmp_path, backend, case):
    family, tied, settings, _ = CASES[case]
    usual = ["train.updates=4", "checkpoint.every=2", "train.recompute=true", "optimizer.lora_plus_ratio=4"]
    folder = tiny_model_folder(family, tied=tied)
    whole = train(make_config(folder, *usual, f"backend={backend}", *settings))
    shutil.copytree(whole.output, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "adapter")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-000004")
    again = train(make_config(folder, *usual, f"backend={backend}", f"output={tmp_path / 'again'}", *settings))
    assert not again.already_complete
    assert (again.adapter / PEFT_FILE).read_bytes() == (whole.adapter / PEFT_FILE).read_bytes()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", [CASES["tied-lora"][2], CASES["tied-whole"][2]], ids=["tied-lora", "tied-whole"])
def test_a_tied_table_that_is_quantized_trains_alike(make_config, tiny_model_folder, tmp_path, settings):
    base = tmp_path / "base"
    quantize(str(tiny_model_folder(tied=True)), scheme="affine-4bit-g32", output=str(base))
    assert "model.embed_tokens" in open_folder(base).places
    result = parity(make_config(base, "train.updates=3", *settings))
    assert result.ok, [gap for gap in result.gaps if not gap.ok]


@pytest.mark.filterwarnings("ignore")
def test_pefts_tied_adapter_goes_to_mlx_lm_and_back(make_config, tiny_model_folder, tmp_path):
    import mlx.core as mx
    import mlx_lm
    from peft import LoraConfig

    folder = tiny_model_folder(tied=True)
    targets = ["embed_tokens", "q_proj"]
    options = LoraConfig(r=4, target_modules=targets, ensure_weight_tying=True, task_type="CAUSAL_LM")
    wanted = made_by_peft(folder, options, tmp_path / "peft")
    convert(tmp_path / "peft", to="mlx", output=tmp_path / "mlx", base=folder)
    theirs, _ = mlx_lm.load(str(folder), adapter_path=str(tmp_path / "mlx"))
    assert np.abs(np.array(theirs(mx.array(IDS))[0]) - wanted).max() <= tolerances.LOGITS * max(wanted.max() / 10, 1)
    assert convert(tmp_path / "mlx", to="peft", output=tmp_path / "back", base=folder).restored
    assert (tmp_path / "back" / PEFT_FILE).read_bytes() == (tmp_path / "peft" / PEFT_FILE).read_bytes()


@pytest.mark.filterwarnings("ignore")
def test_training_goes_on_from_pefts_whole_modules(make_config, tiny_model_folder, tmp_path):
    from peft import LoraConfig

    folder = tiny_model_folder(tied=True)
    made_by_peft(
        folder,
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
        tmp_path / "a",
    )
    start = [f"adapter.start={tmp_path / 'a'}", "adapter.rank=4", "adapter.alpha=8", "adapter.targets=[q_proj]"]
    with pytest.raises(ConfigError, match=r"modules_to_save: \[model.embed_tokens\], ensure_weight_tying: false"):
        train(make_config(folder, *start))
    more = ["adapter.modules_to_save=[embed_tokens]", APART, "train.updates=1", "optimizer.lr=1e-30"]
    found = train(make_config(folder, *start, *more)).adapter
    before, after = (read_adapter(one).tensors for one in (tmp_path / "a", found))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name].data, after[name].data) for name in before)


def own_gradients(folder, adapter, backend, example, update):
    """Return our gradients of a row's mean loss with respect to everything trained."""
    engine, found = find_backend(backend), read_adapter(adapter)
    model = engine.load_model(folder, dtype="float32", quantization=None, recompute=False, device=None)
    model.attach(found.spec)
    model.load_tensors("adapter", found.tensors)
    trainer = engine.trainer(model, objective="sft", optimizer=Method("sgd"))
    return first_gradient(trainer, [make_batch([example], [0])], update)


def peft_gradients(folder, adapter, example):
    """Return PEFT's under our names; what it keeps apart of tied matrices is added."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(adapter), is_trainable=True).eval()
    at = np.flatnonzero(example.supervised)
    logits = model(torch.from_numpy(example.tokens)[None].long()).logits[0]
    torch.nn.functional.cross_entropy(logits[at - 1], torch.from_numpy(example.tokens[at]).long()).backward()
    grads = {name: one.grad.numpy() for name, one in model.named_parameters() if one.grad is not None}
    found = {}
    for name, grad in grads.items():
        own = name.removeprefix("base_model.model.").replace(".default", "")
        found[own if ".modules_to_save" in own else own.removesuffix(".weight")] = grad
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["tied-lora", "tied-whole", "whole"])
def test_gradients_are_pefts(make_config, tiny_model_folder, make_examples, make_update, case):
    family, tied, settings, _ = CASES[case]
    folder, example = tiny_model_folder(family, tied=tied), make_examples([40])[0]
    adapter = train(make_config(folder, "train.updates=2", "optimizer.lr=1e-2", "backend=torch", *settings)).adapter
    wanted = peft_gradients(folder, adapter, example)
    for leaf in ("lora_A", "lora_B") if case == "tied-lora" else ():
        wanted[twin(f"lm_head.{leaf}", "model.embed_tokens")] += wanted.pop(f"lm_head.{leaf}").T
    largest = max(np.abs(grad).max() for grad in wanted.values())
    for backend in ("mlx", "torch"):
        found = own_gradients(folder, adapter, backend, example, make_update(lr=0.0, max_grad_norm=None))
        assert found.keys() == wanted.keys()
        gap = max(np.abs(found[name] - wanted[name]).max() for name in wanted)
        assert gap <= tolerances.GRADIENTS * largest
