"""Packed, sorted and padded micro-batches give the same update, on every architecture that can pack."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mlxlora import attention as on_mlx
from shared.adapters.spec import initial_adapter, resolve
from shared.config import AdapterConfig
from shared.data.batch import make_batch, micro_batches
from shared.data.layout import Layout, choose_layout
from shared.errors import CapabilityError
from shared.registry import BACKENDS, find_backend
from shared.schemes import parse_scheme
from shared.tensors import to_float32
from shared.types import AdapterSpec, Batch, Example, Method, ModelInfo, Tensor
from tests import tolerances
from tests.architectures import EXPERTS, LLAMA3_ROPE, load, save, wanted_log_probs
from torch_backend import attention as on_torch

LENGTHS = [5, 19, 8, 31, 12, 12, 3, 27, 2]
MODELS = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama head_dim": ("llama", {"head_dim": 32}),
    "llama llama3 rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama one head per group": ("llama", {"num_key_value_heads": 4}),
    "llama one group": ("llama", {"num_key_value_heads": 1}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "mistral tied": ("mistral", {"sliding_window": 64, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen2 tied, one head per group": ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
}
OTHERS = {
    "cohere": ("cohere", {}),
    "cohere2, window": ("cohere2", {"sliding_window": 10, "head_dim": 16}),
    "gemma": ("gemma", {"head_dim": 32}),
    "gemma2, window, soft-cap": (
        "gemma2",
        {"head_dim": 16, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 0.5, "sliding_window": 10},
    ),
    "gemma3, window": ("gemma3_text", {"head_dim": 16, "query_pre_attn_scalar": 8, "sliding_window": 10}),
    "granite": ("granite", {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "attention_multiplier": 0.5}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmo2": ("olmo2", {}),
    "phi3, window": ("phi3", {"sliding_window": 10}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen2_moe": ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 64}),
    "qwen3_moe": ("qwen3_moe", EXPERTS),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "starcoder2": ("starcoder2", {"sliding_window": None}),
}
ON_MLX = ("gemma", "granite", "mixtral", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "starcoder2")
WINDOW = ("mistral", {"sliding_window": 10})
OPTIONS = {
    "dropout": {"dropout": 0.1},
    "q and v": {"targets": ["q_proj", "v_proj"]},
    "k and up": {"targets": ["k_proj", "up_proj"]},
    "last layer": {"layers": 1},
    "first layer, dropout": {"layers": [0], "dropout": 0.1},
    "quantized": {"quantization": "affine-4bit-g64"},
    "quantized, dropout": {"quantization": "affine-4bit-g64", "dropout": 0.1},
    "recompute": {"recompute": True},
    "recompute, quantized, dropout": {"recompute": True, "quantization": "affine-4bit-g64", "dropout": 0.1},
    "full": {"type": "none"},
    "full, recompute": {"type": "none", "recompute": True},
}
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Callable[[str], Path]:
    """Return a factory of model folders, each written once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = save(tmp_path_factory.mktemp("model"), *{**MODELS, **OTHERS, "window": WINDOW}[name])
        return made[name]

    return get


def layouts(examples: list[Example]) -> dict[str, list[Batch]]:
    """Return the same update in one padded batch, sorted, and packed in one row and in several."""
    longest = max(len(example.tokens) for example in examples)
    return {
        "plain": [make_batch(examples, range(len(examples)))],
        "sorted": micro_batches(examples, Layout(2 * longest)),
        "packed": micro_batches(examples, Layout(4096, packed=True)),
        "packed in pieces": micro_batches(examples, Layout(2 * longest, packed=True)),
    }


def warm_values(spec: AdapterSpec, info: ModelInfo) -> dict[str, Tensor]:
    """Return an adapter whose B is not zero, so that every path carries a gradient."""
    found = initial_adapter(spec, info.linears, seed=0)
    for name, tensor in found.items():
        if name.endswith("lora_B"):
            tensor.data[:] = 0.02 * np.random.default_rng(len(name)).standard_normal(tensor.shape)
    return found


def step(backend: str, folder: Path, micro: list[Batch], update, *, warm: bool, **options) -> tuple[float, Arrays]:
    """Return one update's loss, and its gradient (a warm start) or what is trained behind it."""
    adapter = {key: value for key, value in options.items() if key not in ("recompute", "quantization")}
    scheme = parse_scheme(options["quantization"]) if "quantization" in options else None
    model = load(backend, folder, recompute=options.get("recompute", False), quantization=scheme)
    spec = resolve(AdapterConfig(**adapter), model.info)
    model.attach(spec)
    if spec.kind == "lora":
        tensors = warm_values(spec, model.info) if warm else initial_adapter(spec, model.info.linears, seed=0)
        model.load_tensors("adapter", tensors)
    trainer = find_backend(backend).trainer(model, objective="sft", optimizer=Method("adamw"))
    loss = trainer.step(micro, update).result().loss
    tensors = dict(trainer.state() if warm else model.tensors("adapter"))
    wanted = {name: to_float32(t).astype(np.float64) for name, t in tensors.items() if not warm or name[:2] == "m."}
    return loss, {name: array / (1 - update.beta1) for name, array in wanted.items()} if warm else wanted


def gap(one: Arrays, two: Arrays) -> float:
    """Return the largest difference of all elements relative to the largest element."""
    assert one.keys() == two.keys()
    return max(np.abs(one[name] - two[name]).max() for name in two) / max(np.abs(array).max() for array in two.values())


def norm_gap(one: Arrays, two: Arrays) -> float:
    """Return |one - two| / |two|: AdamW divides by |g|, so single elements with g near eps are rounding alone."""
    return np.sqrt(sum(((one[n] - two[n]) ** 2).sum() for n in two) / sum((two[n] ** 2).sum() for n in two))


def check(backend: str, folder: Path, examples: list[Example], make_update, **options) -> None:
    free, usual = make_update(max_grad_norm=None), make_update()
    batches = layouts(examples)
    loss, gradients = step(backend, folder, batches["plain"], free, warm=True, **options)
    for name in ("sorted", "packed", "packed in pieces"):
        assert any(batch.is_packed for batch in batches[name]) == name.startswith("packed")
        found, theirs = step(backend, folder, batches[name], free, warm=True, **options)
        assert abs(found - loss) <= tolerances.LAYOUT * abs(loss), name
        assert norm_gap(theirs, gradients) <= tolerances.LAYOUT, name
        assert gap(theirs, gradients) <= tolerances.LAYOUT_ELEMENT, name
    if options.get("type") != "none":
        _, after = step(backend, folder, batches["plain"], usual, warm=False, **options)
        _, packed = step(backend, folder, batches["packed"], usual, warm=False, **options)
        assert norm_gap(packed, after) <= tolerances.LAYOUT_ADAPTER


@pytest.mark.parametrize("backend", sorted(BACKENDS))
@pytest.mark.parametrize("name", MODELS)
def test_every_layout_gives_the_same_update(folder, make_examples, make_update, backend, name):
    check(backend, folder(name), make_examples(LENGTHS), make_update)


@pytest.mark.parametrize("backend", sorted(BACKENDS))
@pytest.mark.parametrize(
    ("name", "option"),
    [*(("qwen2", option) for option in OPTIONS), ("llama tied", "full"), ("llama tied", "quantized")],
)
def test_every_layout_gives_the_same_update_whatever_is_trained(
    folder, make_examples, make_update, backend, name, option
):
    check(backend, folder(name), make_examples(LENGTHS), make_update, **OPTIONS[option])


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_rows_longer_than_a_block_of_attention_give_the_same_update(folder, make_examples, make_update, backend):
    check(backend, folder("llama"), make_examples([129, 4, 200, 128, 200]), make_update)


@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"type": "none"}], ids=str)
@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_examples_longer_than_a_window_give_the_same_update(folder, make_examples, make_update, backend, options):
    check(backend, folder("window"), make_examples(LENGTHS), make_update, **options)


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_families_that_pack_are_those_proven_here(backend):
    found = {"mlx": on_mlx.PACKABLE, "torch": on_torch.PACKABLE}[backend]
    proven = {OTHERS[name][0] for name in (ON_MLX if backend == "mlx" else OTHERS)}
    assert found == {family for family, _ in MODELS.values()} | proven


@pytest.mark.parametrize(("backend", "name"), [*(("mlx", n) for n in ON_MLX), *(("torch", n) for n in OTHERS)])
def test_every_layout_of_another_family_gives_the_same_update(folder, make_examples, make_update, backend, name):
    assert load(backend, folder(name)).info.can_pack
    check(backend, folder(name), make_examples(LENGTHS), make_update)


@pytest.mark.parametrize("name", OTHERS)
def test_our_attention_on_torch_is_transformers_eager_one(folder, make_examples, name):
    examples = make_examples(LENGTHS)
    found = load("torch", folder(name)).log_probs(make_batch(examples, range(len(examples)), packed=True))
    wanted = wanted_log_probs(folder(name), examples, attn_implementation="eager")
    np.testing.assert_allclose(found, wanted, atol=2 * tolerances.LOGITS)


def test_a_window_that_mlx_lm_applies_in_some_layers_is_not_packed(tmp_path, make_examples):
    kinds = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 10}
    model = load("mlx", save(tmp_path / "model", "llama", kinds))
    assert not model.info.can_pack
    assert not choose_layout(model.info, packing="auto", micro_tokens=None).packed
    with pytest.raises(CapabilityError, match="packed is not proven exact for llama"):
        choose_layout(model.info, packing="packed", micro_tokens=None)


@pytest.mark.parametrize("backend", sorted(BACKENDS))
@pytest.mark.parametrize("name", MODELS)
def test_evaluation_of_packed_rows_is_that_of_padded_ones(folder, make_examples, backend, name):
    model, examples = load(backend, folder(name)), make_examples(LENGTHS)
    plain = model.log_probs(make_batch(examples, range(len(examples))))
    packed = model.log_probs(make_batch(examples, range(len(examples)), packed=True))
    np.testing.assert_allclose(packed, plain, atol=tolerances.LAYOUT * np.abs(plain).max())
