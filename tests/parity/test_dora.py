"""DoRA's layer on both backends against the float64 reference, and where it starts from."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from shared import reference, seeds
from shared.adapters.spec import row_squares
from shared.jobs.parity import parity
from shared.quant.affine import AffineQuantizer
from shared.tensors import to_float32
from shared.types import AdapterSpec, Scheme, Tensor
from tests import tolerances

D, O, R, B, T = 64, 48, 4, 2, 7  # noqa: E741
STEP = {"seed": 3, "step": 5}
SLOTS = [4, 1]
SLOWER = ("nf4", "int8", "mxfp4", "ternary-g32", "quanto-qint4")
LEAVES = ("lora_A", "lora_B", "lora_magnitude_vector")


def draw(*, biased, quantized):
    """Return a layer's input, incoming gradient and values; the low-rank change is as large as the weight."""
    random = np.random.default_rng(0)
    weight, packed = random.standard_normal((O, D)).astype(np.float32), None
    if quantized:
        codec = AffineQuantizer(Scheme("affine", 4, 32))
        packed = codec.quantize(Tensor("F32", weight))
        weight = to_float32(codec.dequantize(packed))
    return SimpleNamespace(
        x=random.standard_normal((B, T, D)).astype(np.float32),
        dy=random.standard_normal((B, T, O)).astype(np.float32),
        weight=weight, packed=packed, bias=random.standard_normal(O).astype(np.float32) if biased else None,
        A=(0.4 * random.standard_normal((R, D))).astype(np.float32),
        B=random.standard_normal((O, R)).astype(np.float32),
        m=(8 + random.standard_normal(O)).astype(np.float32),
    )  # fmt: skip


def spec_of(p):
    return AdapterSpec("dora", R, 2.0 * R, p, ("o_proj",))


def places():
    return np.broadcast_to(np.array(SLOTS)[:, None], (B, T)), np.broadcast_to(np.arange(T), (B, T))


def run_torch(v, *, p, wants_dx=True):
    import torch

    from torch_backend.adapters import Dropout
    from torch_backend.dora import attach_dora, magnitudes
    from torch_backend.quantized import QuantizedLinear

    root, dropout = torch.nn.Module(), Dropout(p=p)
    bias = None if v.bias is None else torch.nn.Parameter(torch.tensor(v.bias))
    root.o_proj = torch.nn.Linear(D, O, bias=False) if v.packed is None else QuantizedLinear(v.packed, bias)
    if v.packed is None:
        root.o_proj.weight, root.o_proj.bias = torch.nn.Parameter(torch.tensor(v.weight)), bias
    root.requires_grad_(False)
    attach_dora(root, spec_of(p), dropout, {"o_proj": (O, D)})
    fresh, start = root.o_proj(torch.tensor(v.x)).detach().numpy(), magnitudes(root)
    for leaf, value in zip(LEAVES, (v.A, v.B, v.m), strict=True):
        getattr(root.o_proj, leaf).data = torch.tensor(value)
    dropout.begin(**STEP, places=places(), device="cpu")
    x = torch.tensor(v.x, requires_grad=wants_dx)
    y = root.o_proj(x)
    leaves = [getattr(root.o_proj, leaf) for leaf in LEAVES] + ([x] if wants_dx else [])
    grads = [grad.numpy() for grad in torch.autograd.grad((y * torch.tensor(v.dy)).sum(), leaves)]
    return y.detach().numpy(), grads, fresh, start


def run_mlx(v, *, p, wants_dx=True):
    import mlx.core as mx
    from mlx import nn

    from mlxlora.adapters import Dropout
    from mlxlora.dora import attach_dora, magnitudes
    from mlxlora.quantized import QuantizedLinear

    root, dropout = nn.Module(), Dropout(p=p)
    bias = None if v.bias is None else mx.array(v.bias)
    root.o_proj = nn.Linear(D, O, bias=False) if v.packed is None else QuantizedLinear(v.packed, bias)
    if v.packed is None:
        root.o_proj.weight = mx.array(v.weight)
        if bias is not None:
            root.o_proj.bias = bias
    attach_dora(root, spec_of(p), dropout, {"o_proj": (O, D)})
    fresh, start = np.array(root.o_proj(mx.array(v.x))), magnitudes(root)
    dropout.begin(**STEP, places=places())

    def loss(*values):
        for leaf, value in zip(LEAVES, values, strict=False):
            root.o_proj[leaf] = value
        return (root.o_proj(values[3]) * mx.array(v.dy)).sum()

    values = [mx.array(value) for value in (v.A, v.B, v.m, v.x)]
    grads = [np.array(g) for g in mx.grad(loss, argnums=tuple(range(4 if wants_dx else 3)))(*values)]
    for leaf, value in zip(LEAVES, values, strict=False):
        root.o_proj[leaf] = value
    return np.array(root.o_proj(values[3])), grads, fresh, start


def close(found, exact):
    assert np.abs(found - exact).max() <= tolerances.LOWRANK * max(np.abs(exact).max(), 1e-30)


@pytest.mark.parametrize("run", [run_mlx, run_torch], ids=["mlx", "torch"])
@pytest.mark.parametrize(
    ("p", "biased", "quantized"), [(0.0, False, False), (0.25, True, False), (0.0, True, True), (0.25, False, True)]
)
def test_output_and_gradients_are_those_of_the_reference(run, p, biased, quantized):
    v = draw(biased=biased, quantized=quantized)
    y, grads, _, _ = run(v, p=p)
    flat = v.x.reshape(-1, D)
    mask = seeds.dropout_mask(**STEP, name="o_proj", slots=SLOTS, shape=(T, D), p=p).reshape(-1, D) if p else None
    close(y.reshape(-1, O), reference.dora(flat, v.weight, v.bias, v.A, v.B, v.m, 2.0, mask, p))
    exact = reference.dora_backward(v.dy.reshape(-1, O), flat, v.weight, v.A, v.B, v.m, 2.0, mask, p)
    for found, wanted in zip(grads, (exact.A, exact.B, exact.m, exact.x.reshape(v.x.shape)), strict=True):
        close(found, wanted)


@pytest.mark.parametrize("run", [run_mlx, run_torch], ids=["mlx", "torch"])
def test_below_the_first_adapted_layer_the_adapter_alone_gets_gradients(run):
    v = draw(biased=False, quantized=True)
    for found, wanted in zip(run(v, p=0.0, wants_dx=False)[1], run(v, p=0.0)[1], strict=False):
        close(found, wanted)


@pytest.mark.parametrize("quantized", [False, True])
def test_it_starts_at_the_base_with_the_same_magnitudes_on_both_backends(quantized):
    v = draw(biased=True, quantized=quantized)
    (_, _, one, start), (_, _, two, other) = run_mlx(v, p=0.0), run_torch(v, p=0.0)
    plain = v.x @ v.weight.T + v.bias
    close(one, plain)
    close(two, plain)
    name = "o_proj.lora_magnitude_vector"
    assert np.array_equal(start[name].data, other[name].data)
    np.testing.assert_allclose(start[name].data, np.linalg.norm(v.weight.astype(np.float64), axis=1), rtol=1e-7)


@pytest.mark.parametrize("run", [run_mlx, run_torch], ids=["mlx", "torch"])
def test_a_row_of_zeros_stays_zero_and_trains_nothing(run):
    v = draw(biased=False, quantized=False)
    v.weight[3] = v.m[3] = v.B[3] = 0
    y, (dA, dB, dm, dx), fresh, _ = run(v, p=0.0)
    assert all(np.isfinite(found).all() for found in (y, dA, dB, dm, dx, fresh))
    assert not any(found.any() for found in (y[..., 3], fresh[..., 3], dB[3], dm[3]))


def test_row_squares_do_not_depend_on_how_rows_are_cut():
    random = np.random.default_rng(1)
    words = random.integers(0x3F00, 0x4000, (600, 9000), dtype=np.uint16)  # more than one cut
    whole = row_squares(Tensor("BF16", words))
    assert whole.dtype == np.float32
    assert np.array_equal(whole, np.concatenate([row_squares(Tensor("BF16", words[n : n + 1])) for n in range(600)]))


@pytest.mark.parametrize(
    "scheme",
    ["nf4-dq", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOWER)],
)
def test_it_trains_alike_on_bases_of_every_kind(make_config, tiny_model_folder, scheme):
    result = parity(make_config(tiny_model_folder(), "adapter.type=dora", f"quantization={scheme}"), updates=3)
    assert result.ok, [vars(gap) for gap in result.gaps if not gap.ok]
