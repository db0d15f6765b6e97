"""The same recipe gives the same numbers on MLX and on PyTorch."""

from __future__ import annotations

import hashlib

import pytest

from shared.adapters.start import start_values
from shared.data.batch import update_batches
from shared.data.layout import training_layout
from shared.jobs.parity import BOUNDS, parity
from shared.jobs.train import load_trainable, prepare
from shared.loop import build_update
from shared.optimizers import method_of
from shared.registry import find_backend
from tests import tolerances


def norms_by_module(config, backend):
    """Return the gradient norms of the first update, module by module."""
    prepared = prepare(config)
    engine = find_backend(backend)
    model, spec = load_trainable(prepared, engine)
    if spec.kind != "none":
        model.load_tensors("adapter", start_values(config, spec, model, prepared.base))
    trainer = engine.trainer(model, objective="sft", optimizer=method_of(config))
    layout = training_layout(config, model.info, prepared.train, micro_tokens=256)
    batches = update_batches(prepared.train, prepared.plan, 1, layout)
    return trainer.step(batches, build_update(config, 1, lr=1e-3, by_module=True)).result().norms


@pytest.mark.parametrize("kind", ["lora", "dora", "none"])
def test_gradient_norms_by_module_are_equal(make_config, tiny_model_folder, kind):
    config = make_config(tiny_model_folder(), f"adapter.type={kind}", "adapter.dropout=0.1")
    ours, theirs = (norms_by_module(config, name) for name in ("mlx", "torch"))
    assert ours.keys() == theirs.keys()
    assert len(ours) >= 14
    gaps = {name: abs(ours[name] - theirs[name]) / theirs[name] for name in theirs}
    assert max(gaps.values()) <= tolerances.GRADIENT_NORMS, max(gaps.items(), key=lambda item: item[1])


def check(result):
    assert result.ok, [vars(gap) for gap in result.gaps if not gap.ok]


def test_bounds_of_the_command_are_those_of_the_contract():
    assert BOUNDS["first loss"] == tolerances.FIRST_LOSS
    assert BOUNDS["gradients"] == tolerances.GRADIENTS
    assert BOUNDS["loss curve"] == tolerances.CURVE


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_lora_on_every_family(make_config, tiny_model_folder, family, tied):
    result = parity(make_config(tiny_model_folder(family, tied=tied), "adapter.dropout=0.1"), updates=50)
    check(result)
    first, second = result.curves
    assert first[-1] < first[0] - 0.5
    assert second[-1] < second[0] - 0.5


@pytest.mark.parametrize(
    "overrides",
    [
        ("adapter.type=none", "optimizer.lr=1e-3"),
        ("adapter.type=none", "train.recompute=true", "optimizer.weight_decay=0.1"),
        ("adapter.layers=1", "adapter.targets=[q_proj, v_proj]"),
        ("adapter.layers=[0]", "adapter.alpha=3", "adapter.rank=5"),
        ("adapter.type=rslora", "adapter.rank=4"),
        ("adapter.type=dora",),
        ("adapter.targets=[embed_tokens, lm_head, q_proj]",),
        ("adapter.targets=[lm_head]", "adapter.type=dora"),
        ("adapter.type=dora", "adapter.dropout=0.1", "quantization=affine-4bit-g64", "train.recompute=true"),
        ("quantization=affine-4bit-g64",),
        ("quantization=affine-8bit-g32", "adapter.dropout=0.2"),
        ("quantization=affine-3bit-g64", "train.recompute=true"),
        ("schedule.name=constant", "optimizer.max_grad_norm=null", "optimizer.betas=[0.8, 0.95]"),
        ("data.train_on=all", "train.batch_size=20"),
        pytest.param(("optimizer.name=muon", "optimizer.lora_plus_ratio=4"), marks=pytest.mark.slow),
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_every_setting(make_config, tiny_model_folder, overrides):
    check(parity(make_config(tiny_model_folder(), *overrides), updates=20))


@pytest.mark.parametrize(("bits", "group"), [(4, 64), (6, 32)])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_folder_made_by_mlx_lm_convert(make_config, tiny_model_folder, tmp_path, bits, group, tied):
    from mlx_lm import convert

    folder = tmp_path / "quantized"
    source = tiny_model_folder("llama", tied=tied)
    convert(str(source), str(folder), quantize=True, q_bits=bits, q_group_size=group)
    before = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    check(parity(make_config(folder), updates=30))
    if not tied:
        check(parity(make_config(folder, "adapter.targets=[embed_tokens, lm_head, up_proj]"), updates=10))
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == before


@pytest.mark.parametrize("name", ["TinyStories-656K", "TinyStories-656K-as-mistral", "TinyStories-656K-as-qwen2"])
def test_pretrained_models(make_config, stored_model, name):
    check(parity(make_config(stored_model(name)), updates=10))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stories260K", "TinyStories-656K", "TinyStories-656K-as-mistral"])
@pytest.mark.parametrize("quantization", ["none", "affine-4bit-g32"])
def test_pretrained_models_over_50_updates(make_config, stored_model, name, quantization):
    check(parity(make_config(stored_model(name), f"quantization={quantization}", "adapter.dropout=0.1"), updates=50))


FORMATS = ["mxfp4", "nvfp4", "mxfp8", "ternary-g32", "bitnet", "quanto-qint2", "quanto-qint4", "quanto-qint8",
       "quanto-qfloat8", "affine-4bit-g64+hqq"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("quantization", FORMATS)
@pytest.mark.parametrize("name", ["TinyStories-656K", "stories260K"])
def test_pretrained_models_in_every_format(make_config, stored_model, name, quantization):
    check(parity(make_config(stored_model(name), f"quantization={quantization}"), updates=50))
