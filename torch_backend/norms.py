"""Root-mean-square norms with their gradient by hand: what the zoo composes takes twice as long, and more memory.

MLX has one operation for this, so that its side needs no such file.
Legend: B rows, T tokens, D width of what is normed.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from shared.families import CHECKED

# Families whose norm is weight * (x / sqrt(mean(x^2) + eps)), cast before the weight: tests/parity/test_norms.py.
NORMED = CHECKED | {"granite", "mixtral", "phi3", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3"}


class _RMSNorm(torch.autograd.Function):
    """weight * x / sqrt(mean(x^2) + eps) in float32, over a frozen weight; x and a factor for each row are kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        factor = wide.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, factor)
        return (wide * factor).to(x.dtype).mul_(weight_D)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        x, weight_D, factor = ctx.saved_tensors
        wide, dy = x.float(), (grads[0] * weight_D).float()
        along = (dy * wide).mean(-1, keepdim=True).mul_(factor.pow(3))
        return dy.mul_(factor).addcmul_(wide, along, value=-1).to(x.dtype), None, None


@cache
def norming(norm_class: type) -> type:
    """Return the class of a norm of `NORMED` families that computes so while its weight is frozen."""

    class Norming(norm_class):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.weight.requires_grad:
                return super().forward(x)
            return _RMSNorm.apply(x, self.weight, self.variance_epsilon)

    Norming.__name__ = Norming.__qualname__ = f"Norming{norm_class.__name__}"
    return Norming


def replace_norms(root: nn.Module) -> None:
    """Have every norm under a module of a `NORMED` family computed so."""
    for module in root.modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            module.__class__ = norming(type(module))
