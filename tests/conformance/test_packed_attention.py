"""Torch's kernel for packed rows: its shapes here, its values on a CUDA device against the loop over examples."""

from __future__ import annotations

import pytest
import torch

from tests.tolerances import HALF_ATTENTION
from torch_backend.attention import causal, has_kernel, kernel, packed

LENGTHS = (5, 64, 1, 130, 17)
SCALE = 0.3


def tensors(heads: int, kv_heads: int, *, width: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """Return query, key and value (1, H, T, K) as a projection leaves them, and the gradient of the output."""
    random, total = torch.Generator().manual_seed(heads * width), sum(LENGTHS)
    shapes = [(1, total, number, width) for number in (heads, kv_heads, kv_heads, heads)]
    made = [torch.randn(shape, generator=random).to(dtype).to(device) for shape in shapes]
    return [*(part.transpose(1, 2).requires_grad_() for part in made[:3]), made[3]]


def bounds_on(device: str) -> torch.Tensor:
    return torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)


def looped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> torch.Tensor:
    parts = zip(*(part.split(LENGTHS, dim=2) for part in (q, k, v)), strict=True)
    return torch.cat([causal(*each, scaling=SCALE, window=window, softcap=None) for each in parts], dim=2).transpose(
        1, 2
    )


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_kernel_takes_what_we_give_it_and_returns_every_gradient(kv_heads):
    """On tensors without values, which torch checks as it would real ones."""
    q, k, v, slope = tensors(4, kv_heads, width=32, dtype=torch.bfloat16, device="meta")
    found = packed(q, k, v, bounds_on("meta"), scaling=SCALE, longest=max(LENGTHS), window=None)
    assert found.shape == slope.shape
    grads = torch.autograd.grad(found, [q, k, v], slope)
    assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]


def test_on_a_cpu_there_is_the_loop():
    q, *_ = tensors(4, 2, width=32, dtype=torch.bfloat16, device="cpu")
    assert kernel() is not None
    assert not has_kernel(q)


@pytest.mark.cuda
@pytest.mark.parametrize("window", [None, 2, 16, 1000])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 4, 32), (8, 2, 64), (4, 1, 128)])
def test_the_kernel_equals_the_loop_over_examples_in_float32(heads, kv_heads, width, window):
    """The loop in float32 on the same half-precision numbers is the measure of both."""
    q, k, v, slope = tensors(heads, kv_heads, width=width, dtype=torch.bfloat16, device="cuda")
    assert has_kernel(q)
    own = packed(q, k, v, bounds_on("cuda"), scaling=SCALE, longest=max(LENGTHS), window=window)
    wide = [part.detach().float().requires_grad_() for part in (q, k, v)]
    exact = looped(*wide, window)
    found = [own, *torch.autograd.grad(own, [q, k, v], slope)]
    wanted = [exact, *torch.autograd.grad(exact, wide, slope.float())]
    for ours, theirs in zip(found, wanted, strict=True):
        assert float((ours.float() - theirs).abs().max() / theirs.abs().max()) < HALF_ATTENTION
