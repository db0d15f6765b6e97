"""The gated unit that is made again in the backward pass, on both backends, against the float64 reference."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from shared import reference, seeds
from shared.quant.affine import AffineQuantizer
from shared.tensors import to_float32
from shared.types import AdapterSpec, Scheme, Tensor
from tests import tolerances

D, U, R, B, T = 64, 96, 4, 2, 7
STEP, SLOTS = {"seed": 3, "step": 5}, [4, 1]
SHAPES = {"gate_proj": (U, D), "up_proj": (U, D), "down_proj": (D, U)}
ADAPTED = [("gate_proj", "up_proj", "down_proj"), ("down_proj",), ("gate_proj",)]


def draw(*, quantized):
    """Return x, the incoming gradient, and weight, packed weight, A and B of every projection."""
    random = np.random.default_rng(7)
    layers = {}
    for name, shape in SHAPES.items():
        weight, packed = random.standard_normal(shape).astype(np.float32) / 8, None
        if quantized:
            codec = AffineQuantizer(Scheme("affine", 4, 32))
            packed = codec.quantize(Tensor("F32", weight))
            weight = to_float32(codec.dequantize(packed))
        factors = [random.standard_normal(size).astype(np.float32) / 4 for size in ((R, shape[1]), (shape[0], R))]
        layers[name] = SimpleNamespace(weight=weight, packed=packed, A=factors[0], B=factors[1])
    x, dy = (4 * random.standard_normal((B, T, D)).astype(np.float32) for _ in range(2))
    return x, dy, layers


def wanted(x, dy, layers, *, adapted, p):
    """Return the output, dx and every dA and dB in float64."""

    def mask(name):
        width = SHAPES[name][1]
        found = seeds.dropout_mask(**STEP, name=name, slots=SLOTS, shape=(T, width), p=p) if p else None
        return None if found is None else found.reshape(-1, width)

    def forward(name, x_ND):
        layer, scale = layers[name], 2.0 * (name in adapted)
        return reference.lora(x_ND, layer.weight, None, layer.A, layer.B, scale, mask(name), p)

    def backward(name, dy_ND, x_ND):
        layer, scale = layers[name], 2.0 * (name in adapted)
        return reference.lora_backward(dy_ND, x_ND, layer.weight, layer.A, layer.B, scale, mask(name), p)

    flat = x.reshape(-1, D).astype(np.float64)
    gate, up = forward("gate_proj", flat), forward("up_proj", flat)
    share = 1 / (1 + np.exp(-gate))
    unit = gate * share * up
    found = {"down_proj": backward("down_proj", dy.reshape(-1, D), unit)}
    dunit = found["down_proj"].x
    found["gate_proj"] = backward("gate_proj", dunit * up * share * (1 + gate * (1 - share)), flat)
    found["up_proj"] = backward("up_proj", dunit * gate * share, flat)
    dx = (found["gate_proj"].x + found["up_proj"].x).reshape(x.shape)
    return forward("down_proj", unit).reshape(dy.shape), dx, {name: (found[name].A, found[name].B) for name in adapted}


def spec_of(adapted, p):
    return AdapterSpec("lora", R, 2.0 * R, p, adapted)


def places():
    return np.broadcast_to(np.array(SLOTS)[:, None], (B, T)), np.broadcast_to(np.arange(T), (B, T))


def run_torch(x, dy, layers, *, adapted, p):
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    from torch_backend.adapters import Dropout, attach_lora
    from torch_backend.gated import gating, is_gated
    from torch_backend.quantized import QuantizedLinear

    root, dropout = LlamaMLP(LlamaConfig(hidden_size=D, intermediate_size=U)).requires_grad_(False), Dropout(p=p)
    assert is_gated(root)
    root.__class__ = gating(type(root))
    for name, layer in layers.items():
        getattr(root, name).weight.data = torch.tensor(layer.weight)
        if layer.packed is not None:
            setattr(root, name, QuantizedLinear(layer.packed, None))
    attach_lora(root, spec_of(adapted, p), dropout, SHAPES)
    for name in adapted:
        module = getattr(root, name)
        module.lora_A.data, module.lora_B.data = torch.tensor(layers[name].A), torch.tensor(layers[name].B)
    dropout.begin(**STEP, places=places(), device="cpu")
    leaves = [factor for name in adapted for factor in (getattr(root, name).lora_A, getattr(root, name).lora_B)]
    x = torch.tensor(x, requires_grad=True)
    y = root(x)
    dx, *factors = torch.autograd.grad((y * torch.tensor(dy)).sum(), [x, *leaves])
    return y.detach().numpy(), dx.numpy(), pairs(adapted, [factor.numpy() for factor in factors])


def run_mlx(x, dy, layers, *, adapted, p):
    import mlx.core as mx
    from mlx_lm.models.llama import MLP, ModelArgs

    from mlxlora.adapters import Dropout, attach_lora
    from mlxlora.gated import gating
    from mlxlora.quantized import QuantizedLinear

    facts = {"num_hidden_layers": 1, "num_attention_heads": 1, "rms_norm_eps": 1e-6, "vocab_size": 8}
    root, dropout = MLP(ModelArgs(model_type="llama", hidden_size=D, intermediate_size=U, **facts)), Dropout(p=p)
    root.__class__ = gating(type(root))
    for name, layer in layers.items():
        root[name].weight = mx.array(layer.weight)
        if layer.packed is not None:
            setattr(root, name, QuantizedLinear(layer.packed, None))
    attach_lora(root, spec_of(adapted, p), dropout, SHAPES)
    dropout.begin(**STEP, places=places())

    def forward(x, *factors):
        for n, name in enumerate(adapted):
            root[name].lora_A, root[name].lora_B = factors[2 * n], factors[2 * n + 1]
        return root(x)

    values = [mx.array(value) for name in adapted for value in (layers[name].A, layers[name].B)]
    y, (dx, *factors) = mx.vjp(forward, [mx.array(x), *values], [mx.array(dy)])
    return np.array(y[0]), np.array(dx), pairs(adapted, [np.array(factor) for factor in factors])


def pairs(adapted, factors):
    return {name: (factors[2 * n], factors[2 * n + 1]) for n, name in enumerate(adapted)}


def close(found, exact):
    assert np.abs(found - exact).max() <= tolerances.LOWRANK * np.abs(exact).max()


@pytest.mark.parametrize("run", [run_mlx, run_torch], ids=["mlx", "torch"])
@pytest.mark.parametrize("adapted", ADAPTED, ids=" ".join)
@pytest.mark.parametrize(("p", "quantized"), [(0.0, False), (0.25, False), (0.0, True)])
def test_a_feed_forward_layer_and_its_gradients_are_those_of_the_reference(run, adapted, p, quantized):
    x, dy, layers = draw(quantized=quantized)
    y, dx, factors = run(x, dy, layers, adapted=adapted, p=p)
    exact_y, exact_dx, exact_factors = wanted(x, dy, layers, adapted=adapted, p=p)
    close(y, exact_y)
    close(dx, exact_dx)
    for name in adapted:
        for found, exact in zip(factors[name], exact_factors[name], strict=True):
            close(found, exact)


def test_the_sigmoid_is_right_to_rounding_over_the_whole_range():
    import mlx.core as mx

    from mlxlora.elementwise import sigmoid

    x = np.linspace(-120, 120, 100_001).astype(np.float32)
    found, exact = np.array(sigmoid(mx.array(x))).astype(np.float64), 1 / (1 + np.exp(-x.astype(np.float64)))
    near = np.abs(x) <= 10
    assert np.abs(found[near] / exact[near] - 1).max() <= 1e-6
    assert np.abs(found - exact).max() <= 1e-7
