"""The hand-written backward of layers that read the same input, on both backends, against the float64 reference."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest

from shared import reference, seeds
from shared.quant.affine import AffineQuantizer
from shared.tensors import to_float32
from shared.types import AdapterSpec, Scheme, Tensor
from tests import tolerances

D, R, B, T = 64, 4, 2, 7
WIDTHS = {"q_proj": 64, "k_proj": 32, "v_proj": 32, "gate_proj": 128, "up_proj": 128, "o_proj": 64}
GROUPS = [("q_proj", "k_proj", "v_proj"), ("k_proj", "q_proj"), ("gate_proj", "up_proj"), ("o_proj",)]
STEP = {"seed": 3, "step": 5}
SLOTS = [4, 1]


def draw(names, *, biased, quantized):
    """Return x, incoming gradients, and every reader's weight, bias, A, B and packed weight."""
    random = np.random.default_rng(len(names))
    x = random.standard_normal((B, T, D)).astype(np.float32)
    readers = {}
    for name in names:
        width = WIDTHS[name]
        weight, packed = random.standard_normal((width, D)).astype(np.float32), None
        if quantized:
            codec = AffineQuantizer(Scheme("affine", 4, 32))
            packed = codec.quantize(Tensor("F32", weight))
            weight = to_float32(codec.dequantize(packed))
        readers[name] = SimpleNamespace(
            weight=weight, packed=packed, bias=random.standard_normal(width).astype(np.float32) if biased else None,
            A=random.standard_normal((R, D)).astype(np.float32),
            B=random.standard_normal((width, R)).astype(np.float32),
            dy=random.standard_normal((B, T, width)).astype(np.float32),
        )  # fmt: skip
    return x, readers


def wanted(x, readers, *, scale, p, used):
    """Return the outputs, dx and every dA and dB in float64; a reader that is not used gets no gradient."""
    flat, outputs, dx, factors = x.reshape(-1, D), {}, np.zeros((B * T, D)), {}
    for name, r in readers.items():
        mask = seeds.dropout_mask(**STEP, name=name, slots=SLOTS, shape=(T, D), p=p).reshape(-1, D) if p else None
        outputs[name] = reference.lora(flat, r.weight, r.bias, r.A, r.B, scale, mask, p).reshape(r.dy.shape)
        dy = r.dy.reshape(B * T, -1) * (name in used)
        found = reference.lora_backward(dy, flat, r.weight, r.A, r.B, scale, mask, p)
        dx, factors[name] = dx + found.x, (found.A, found.B)
    return outputs, dx.reshape(x.shape), factors


def spec_of(names, p):
    return AdapterSpec("lora", R, 2.0 * R, p, tuple(names))


def places():
    return np.broadcast_to(np.array(SLOTS)[:, None], (B, T)), np.broadcast_to(np.arange(T), (B, T))


def run_torch(x, readers, *, p, used, wants_dx=True):
    import torch

    from torch_backend.adapters import Dropout, attach_lora
    from torch_backend.quantized import QuantizedLinear

    root, dropout = torch.nn.Module(), Dropout(p=p)
    for name, r in readers.items():
        bias = None if r.bias is None else torch.nn.Parameter(torch.tensor(r.bias))
        layer = torch.nn.Linear(D, len(r.weight), bias=r.bias is not None) if r.packed is None else None
        if layer is None:
            layer = QuantizedLinear(r.packed, bias)
        else:
            layer.weight = torch.nn.Parameter(torch.tensor(r.weight))
            layer.bias = bias
        setattr(root, name, layer.requires_grad_(False))
    attach_lora(root, spec_of(readers, p), dropout, {name: (len(r.weight), D) for name, r in readers.items()})
    for name, r in readers.items():
        layer = getattr(root, name)
        layer.lora_A.data, layer.lora_B.data = torch.tensor(r.A), torch.tensor(r.B)
    dropout.begin(**STEP, places=places(), device="cpu")
    x = torch.tensor(x, requires_grad=wants_dx)
    outputs = {name: getattr(root, name)(x) for name in readers}
    loss = sum((outputs[name] * torch.tensor(readers[name].dy)).sum() for name in used)
    leaves = [getattr(getattr(root, name), key) for name in readers for key in ("lora_A", "lora_B")]
    grads = torch.autograd.grad(loss, [*leaves, *([x] if wants_dx else [])], allow_unused=True)
    found = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip([*leaves, x], grads, strict=False)]
    factors = {name: (found[2 * n].numpy(), found[2 * n + 1].numpy()) for n, name in enumerate(readers)}
    assert all(getattr(root, name).readers.waiting == {} and getattr(root, name).readers.x is None for name in readers)
    return {n: y.detach().numpy() for n, y in outputs.items()}, found[-1].numpy() if wants_dx else None, factors


def run_mlx(x, readers, *, p, used, wants_dx=True):
    import mlx.core as mx
    from mlx import nn

    from mlxlora.adapters import Dropout, attach_lora
    from mlxlora.quantized import QuantizedLinear

    root, dropout = nn.Module(), Dropout(p=p)
    for name, r in readers.items():
        bias = None if r.bias is None else mx.array(r.bias)
        layer = nn.Linear(D, len(r.weight), bias=False) if r.packed is None else QuantizedLinear(r.packed, bias)
        if r.packed is None:
            layer.weight = mx.array(r.weight)
            if bias is not None:
                layer.bias = bias
        setattr(root, name, layer)
    attach_lora(root, spec_of(readers, p), dropout, {name: (len(r.weight), D) for name, r in readers.items()})
    dropout.begin(**STEP, places=places())
    names, flat = list(readers), [a for r in readers.values() for a in (mx.array(r.A), mx.array(r.B))]

    def forward(x, *factors):
        for n, name in enumerate(names):
            root[name].lora_A, root[name].lora_B = factors[2 * n], factors[2 * n + 1]
        return {name: root[name](x) for name in names}

    def loss(x, *factors):
        outputs = forward(x, *factors)
        return sum((outputs[name] * mx.array(readers[name].dy)).sum() for name in used)

    numbers = tuple(range(0 if wants_dx else 1, 1 + len(flat)))
    grads = list(mx.grad(loss, argnums=numbers)(mx.array(x), *flat))
    dx = np.array(grads.pop(0)) if wants_dx else None
    factors = {name: (np.array(grads[2 * n]), np.array(grads[2 * n + 1])) for n, name in enumerate(names)}
    assert all(root[name]._readers.waiting == {} and root[name]._readers.x is None for name in names)
    return {name: np.array(y) for name, y in forward(mx.array(x), *flat).items()}, dx, factors


def close(found, exact):
    assert np.abs(found - exact).max() <= tolerances.LOWRANK * max(np.abs(exact).max(), 1e-30)


@pytest.mark.parametrize("run", [run_mlx, run_torch], ids=["mlx", "torch"])
@pytest.mark.parametrize("names", GROUPS, ids=" ".join)
@pytest.mark.parametrize(("p", "biased", "quantized"), list(product([0.0, 0.25], [False, True], [False, True])))
def test_outputs_and_gradients_of_readers_are_those_of_the_reference(run, names, p, biased, quantized):
    x, readers = draw(names, biased=biased, quantized=quantized)
    outputs, dx, factors = run(x, readers, p=p, used=names)
    exact_outputs, exact_dx, exact_factors = wanted(x, readers, scale=2.0, p=p, used=names)
    close(dx, exact_dx)
    for name in names:
        close(outputs[name], exact_outputs[name])
        for found, exact in zip(factors[name], exact_factors[name], strict=True):
            close(found, exact)


@pytest.mark.parametrize("run", [run_mlx, run_torch], ids=["mlx", "torch"])
@pytest.mark.parametrize("unused", GROUPS[0])
def test_a_reader_whose_output_is_not_used_takes_no_part_in_the_gradient(run, unused):
    used = [name for name in GROUPS[0] if name != unused]
    x, readers = draw(GROUPS[0], biased=True, quantized=False)
    _, dx, factors = run(x, readers, p=0.0, used=used)
    _, exact_dx, exact_factors = wanted(x, readers, scale=2.0, p=0.0, used=used)
    close(dx, exact_dx)
    for name in used:
        for found, exact in zip(factors[name], exact_factors[name], strict=True):
            close(found, exact)
    assert not any(np.any(grad) for grad in factors[unused])


@pytest.mark.parametrize("run", [run_mlx, run_torch], ids=["mlx", "torch"])
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_below_the_first_adapted_layer_the_factors_alone_get_gradients(run, p):
    x, readers = draw(GROUPS[0], biased=False, quantized=True)
    _, _, factors = run(x, readers, p=p, used=GROUPS[0], wants_dx=False)
    _, _, exact_factors = wanted(x, readers, scale=2.0, p=p, used=GROUPS[0])
    for name in GROUPS[0]:
        for found, exact in zip(factors[name], exact_factors[name], strict=True):
            close(found, exact)
