"""AdamW alone, on the same gradients: both backends, the reference with the codec, and bitsandbytes' AdamW8bit."""

from __future__ import annotations

import bitsandbytes
import mlx.core as mx
import numpy as np
import pytest
import torch
from torch import nn

import mlxlora.optim
import torch_backend.optim
from shared import reference
from shared.quant.blockwise import decode, encode
from tests import tolerances

SHAPES = [(8, 288), (288, 8), (5,), (3, 100), (70, 31), (300,)]
STEPS = 10


@pytest.fixture
def start():
    random = np.random.default_rng(0)
    return {f"layer.{n}.w": random.standard_normal(shape).astype(np.float32) for n, shape in enumerate(SHAPES)}


def make_gradients(start, *, decades):
    """Return the summed gradients of ten updates, each value's typical size anywhere in so many decades below 1."""
    random = np.random.default_rng(1)
    sizes = {name: 10.0 ** -(decades * random.random(value.shape)) for name, value in start.items()}
    return [
        {name: (random.standard_normal(size.shape) * size).astype(np.float32) for name, size in sizes.items()}
        for _ in range(STEPS)
    ]


@pytest.fixture(params=[1, 3], ids=["one decade", "three decades"])
def gradients(start, request):
    return make_gradients(start, decades=request.param)


@pytest.fixture
def updates(make_update):
    return [make_update(step=n, lr=1e-2, beta2=0.99, weight_decay=0.1) for n in range(1, STEPS + 1)]


def on_mlx(start, gradients, updates, *, state):
    parameters = {name: mx.array(value) for name, value in start.items()}
    optimizer = mlxlora.optim.AdamW(parameters, state=state)
    for grads, update in zip(gradients, updates, strict=True):
        arrays = {name: mx.array(grad) for name, grad in grads.items()}
        optimizer.step(parameters, arrays, update, loss=mx.array(1.0), weight=3.0)
    kept = {name: np.array(array) for name, array in optimizer.tensors()}
    return {name: np.array(array) for name, array in parameters.items()}, kept


def on_torch(start, gradients, updates, *, state):
    parameters = {name: nn.Parameter(torch.from_numpy(value.copy())) for name, value in start.items()}
    optimizer = torch_backend.optim.AdamW(parameters, state=state)
    for grads, update in zip(gradients, updates, strict=True):
        for name, view in zip(optimizer.parameters, optimizer.views(optimizer.grad), strict=True):
            view.copy_(torch.from_numpy(grads[name]))
        optimizer.step(update, loss=torch.tensor(1.0), weight=3.0)
    kept = {name: tensor.numpy() for name, tensor in optimizer.tensors()}
    return {name: parameter.detach().numpy() for name, parameter in parameters.items()}, kept


def on_reference(start, gradients, updates):
    """Return values and codes of AdamW in float64 that keeps its moments as the codec does."""
    values, kept = dict(start), {}
    coded = {
        name: (encode(np.zeros_like(v), signed=True), encode(np.zeros_like(v), signed=False))
        for name, v in start.items()
    }
    for grads, update in zip(gradients, updates, strict=True):
        clipped, _ = reference.clip({name: grad / 3.0 for name, grad in grads.items()}, update.max_grad_norm)
        for name, (m, v) in coded.items():
            old = decode(m, signed=True), decode(v, signed=False)
            found = reference.adamw(values[name], clipped[name], *old, update)
            values[name] = found.param
            coded[name] = encode(found.m, signed=True), encode(found.v, signed=False)
    for name, (m, v) in coded.items():
        kept |= {f"m.{name}": m.codes, f"v.{name}": v.codes, f"m_absmax.{name}": m.absmax, f"v_absmax.{name}": v.absmax}
    return values, kept


def gap(one, other, start):
    """Return |one - other| / |other - start| over all tensors."""
    squares = [(np.square(one[name] - other[name]).sum(), np.square(other[name] - start[name]).sum()) for name in start]
    return float(np.sqrt(sum(a for a, _ in squares) / sum(b for _, b in squares)))


def code_gap(one, other):
    """Return the share of codes that differ; fails where one differs by more than a step."""
    names = [name for name, array in other.items() if array.dtype == np.uint8]
    steps = np.concatenate([np.abs(one[name].astype(int) - other[name]).reshape(-1) for name in names])
    assert steps.max() <= 1
    return (steps > 0).mean()


@pytest.mark.parametrize("state", ["float32", "8bit"])
def test_ten_updates_are_the_same_on_both_backends(start, gradients, updates, state):
    ours, kept = on_mlx(start, gradients, updates, state=state)
    theirs, their_kept = on_torch(start, gradients, updates, state=state)
    assert gap(ours, theirs, start) <= (tolerances.OPTIMIZER if state == "float32" else tolerances.OPTIMIZER_8BIT)
    assert kept.keys() == their_kept.keys()
    assert all(kept[name].shape == their_kept[name].shape for name in kept)
    assert all(kept[name].dtype == their_kept[name].dtype for name in kept)
    if state == "8bit":
        assert code_gap(kept, their_kept) <= tolerances.CODES


@pytest.mark.parametrize("train", [on_mlx, on_torch])
def test_ten_updates_in_8bit_are_those_of_the_reference_with_the_codec(start, gradients, updates, train):
    ours, kept = train(start, gradients, updates, state="8bit")
    theirs, their_kept = on_reference(start, gradients, updates)
    assert gap(ours, theirs, start) <= tolerances.OPTIMIZER_8BIT
    assert code_gap(kept, their_kept) <= tolerances.CODES
    for name, array in their_kept.items():
        if array.dtype == np.float32:
            np.testing.assert_allclose(kept[name], array, rtol=1e-3)


def on_bitsandbytes(start, gradients, updates):
    """Return the values of AdamW8bit with our settings: no decay of vectors, small tensors in 8 bits too, clipped."""
    parameters = {name: nn.Parameter(torch.from_numpy(value.copy())) for name, value in start.items()}
    groups = [
        {"params": [p for p in parameters.values() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = bitsandbytes.optim.AdamW8bit(groups, lr=1e-2, betas=(0.9, 0.99), eps=1e-8, min_8bit_size=0)
    for grads, update in zip(gradients, updates, strict=True):
        clipped, _ = reference.clip({name: grad / 3.0 for name, grad in grads.items()}, update.max_grad_norm)
        for name, parameter in parameters.items():
            parameter.grad = torch.from_numpy(clipped[name].astype(np.float32))
        optimizer.step()
    return {name: parameter.detach().numpy() for name, parameter in parameters.items()}


def test_ten_updates_in_8bit_are_near_those_of_bitsandbytes(start, updates):
    """On a CPU its formula is ours, also where eps stands; its codes are those of its coarser kernel."""
    gradients = make_gradients(start, decades=1)
    ours, _ = on_torch(start, gradients, updates, state="8bit")
    assert gap(ours, on_bitsandbytes(start, gradients, updates), start) <= tolerances.BITSANDBYTES


def test_8bit_is_nearer_to_float32_than_bitsandbytes_where_gradients_differ_much_in_size(start, updates):
    """Second moments that code as zero, 6 decades and more below the largest, must not make an update explode."""
    gradients = make_gradients(start, decades=3)
    plain, _ = on_torch(start, gradients, updates, state="float32")
    ours, _ = on_torch(start, gradients, updates, state="8bit")
    assert gap(ours, plain, start) <= tolerances.EIGHT_BITS
    assert gap(ours, plain, start) < gap(on_bitsandbytes(start, gradients, updates), plain, start)


def test_float32_moments_are_four_times_as_large(start, gradients, updates):
    for train in (on_mlx, on_torch):
        sizes = []
        for state in ("float32", "8bit"):
            _, kept = train(start, gradients[:1], updates[:1], state=state)
            sizes.append(sum(array.nbytes for array in kept.values()))
        codes = sum(value.size for value in start.values())
        blocks = sum(-(-value.size // 256) for value in start.values())
        assert sizes == [8 * codes, 2 * codes + 8 * blocks]
