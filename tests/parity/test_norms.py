"""Norms with their gradient by hand, against the zoo's own and float64."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch_backend.norms import NORMED, norming  # noqa: E402

B, T, D, EPS = 2, 9, 48, 1e-5


def zoo_class(family):
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    (name,) = [name for name in vars(module) if name.endswith("RMSNorm")]
    return vars(module)[name]


def draw(family, dtype):
    """Return the zoo's norm, ours over the same weight, an input far from unit size, and the gradient of its output."""
    torch.manual_seed(0)
    theirs, ours = (zoo_class(family)(D, eps=EPS).to(dtype).requires_grad_(False) for _ in range(2))
    for norm in (theirs, ours):
        norm.weight.copy_(1 + torch.arange(D) / D)
    ours.__class__ = norming(type(ours))
    x, dy = (7 * torch.randn(B, T, D)).to(dtype), torch.randn(B, T, D).to(dtype)
    return theirs, ours, x.requires_grad_(True), dy


@pytest.mark.parametrize("family", sorted(NORMED))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_output_is_the_zoos_bit_for_bit_and_the_gradient_to_rounding(family, dtype):
    theirs, ours, x, dy = draw(family, dtype)
    wanted, found = theirs(x), ours(x)
    assert torch.equal(found, wanted)
    gradients = [torch.autograd.grad(y, x, dy)[0].float() for y in (wanted, found)]
    gap = float((gradients[1] - gradients[0]).norm() / gradients[0].norm())
    assert gap < {torch.float32: 3e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]


def test_the_gradient_is_that_of_float64():
    _, ours, x, dy = draw("llama", torch.float32)
    wide, w, g = (value.detach().double().numpy() for value in (x, ours.weight, dy))
    factor = 1 / np.sqrt((wide**2).mean(-1, keepdims=True) + EPS)
    dn = g * w
    wanted = factor * dn - wide * factor**3 * (dn * wide).mean(-1, keepdims=True)
    found = torch.autograd.grad(ours(x), x, dy)[0].double().numpy()
    assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 2e-7


def test_a_trained_weight_gets_its_gradient():
    theirs, ours, x, dy = draw("llama", torch.float32)
    weights = [norm.weight.requires_grad_(True) for norm in (theirs, ours)]
    wanted, found = (
        torch.autograd.grad(norm(x), weight, dy)[0] for norm, weight in zip((theirs, ours), weights, strict=True)
    )
    assert torch.equal(found, wanted)


def test_of_the_input_nothing_is_kept_in_float32():
    _, ours, x, _ = draw("llama", torch.bfloat16)
    kept = ours(x).grad_fn.saved_tensors
    assert sum(value.nbytes for value in kept) == x.nbytes + ours.weight.nbytes + 4 * B * T
