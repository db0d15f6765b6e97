"""The unit between the projections of a decoder layer, silu(gate) * up: its product is made again in the backward pass.

The zoo keeps four arrays of the unit's width in each layer: gate, its silu, up, and the product, which the projection
down reads. Here gate and up are kept, nothing else.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up."""
    return functional.silu(gate).mul_(up)


def gated_gradients(
    gate: torch.Tensor, up: torch.Tensor, dy: torch.Tensor, silu: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of gate and up; silu: of gate, overwritten."""
    return torch.ops.aten.silu_backward.default(dy * up, gate), silu.mul_(dy)


class _Gated(torch.autograd.Function):
    """silu(gate) * up where its reader does not make it again by itself."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return gated(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        return gated_gradients(gate, up, grads[0], functional.silu(gate))


@cache
def gating(mlp_class: type) -> type:
    """Return the class of a feed-forward layer of `shared.families.GATED` that computes its unit so."""

    class Gating(mlp_class):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gate, up = self.gate_proj(x), self.up_proj(x)
            if hasattr(self.down_proj, "after_gate"):
                return self.down_proj.after_gate(gate, up)
            return self.down_proj(_Gated.apply(gate, up))

    Gating.__name__ = Gating.__qualname__ = f"Gating{mlp_class.__name__}"
    return Gating


def is_gated(mlp: nn.Module) -> bool:
    """Return whether a feed-forward layer computes down(silu(gate) * up)."""
    return type(getattr(mlp, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")
