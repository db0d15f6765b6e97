"""DoRA: y = m / |W + s B A| * (W x + s B A dropout(x)), rows scaled to learned magnitudes m.

Legend: B rows, T tokens, N = B*T, D input width, O output width, R rank; |.| is the norm of each of the O rows.
Source: Liu et al. 2024, section 4.1; the norm gets no gradient (section 4.3). Dropout is on the low-rank branch alone,
as in mlx-lm. |W + s B A|^2 = |W|^2 + 2 s (W A.T)B + s^2 B (A A.T) B, row by row: no matrix as large as W is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from shared.adapters.spec import row_squares
from shared.types import AdapterSpec, Tensor
from torch_backend.adapters import Dropout
from torch_backend.lowrank import add_low, dropped
from torch_backend.state import from_torch, to_torch

LEAST_SQUARE = float(np.finfo(np.float32).tiny)


class DoRALinear(nn.Module):
    """A frozen linear layer with a low-rank product beside it, and a learned norm for each row of the sum."""

    trained_leaves = ("lora_A", "lora_B", "lora_magnitude_vector")

    def __init__(
        self, base: nn.Module, *, name: str, spec: AdapterSpec, dropout: Dropout, shape: tuple[int, int]
    ) -> None:
        super().__init__()
        self.base, self.name, self.scale, self.dropout = base, name, spec.scale_of(name), dropout
        rank, (self.out_features, self.in_features) = spec.rank_of(name), shape
        device = next(iter([*base.parameters(), *base.buffers()])).device
        squares = row_squares(from_torch(frozen_weight(base, torch.float32)))
        self.squares = to_torch(Tensor("F32", squares)).to(device)
        self.start = Tensor("F32", np.sqrt(squares))
        self.lora_A = nn.Parameter(torch.zeros(rank, self.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=device))
        self.lora_magnitude_vector = nn.Parameter(to_torch(self.start).to(device))

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Return m / |W + s B A| * (base(x) + s dropout(x) A.T B.T); the bias is left as it is."""
        y_BTO = _ScaledRows.apply(x_BTD, self, self.lora_A, self.lora_B, self.lora_magnitude_vector)
        bias = getattr(self.base, "bias", None)
        return y_BTO if bias is None else y_BTO + bias


class _ScaledRows(torch.autograd.Function):
    """y = g (x W.T + s dropout(x) A.T B.T), g = m / |W + s B A|; of the inputs x alone is saved.

    With z the sum in brackets: dz = g dy, dm = sum (dy * z) / |.|; the rest is LoRA's of dz.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, layer: DoRALinear, A: torch.Tensor, B: torch.Tensor, m_O: torch.Tensor
    ) -> torch.Tensor:
        weight = frozen_weight(layer.base, x.dtype)
        norms_O = row_norms(layer, weight, A, B)
        gain_O = (m_O / norms_O).to(x.dtype)
        ctx.layer = layer
        ctx.save_for_backward(x, A, B, gain_O, norms_O)
        x_ND = x.reshape(-1, x.shape[-1])
        low_NR = dropped([layer], x, x_ND) @ A.to(x.dtype).T
        return sum_of(layer, x_ND, weight, low_NR, B).mul_(gain_O).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (x, A, B, gain_O, norms_O), layer = ctx.saved_tensors, ctx.layer
        x_ND, A_RD, weight = x.reshape(-1, x.shape[-1]), A.to(x.dtype), frozen_weight(layer.base, x.dtype)
        dy_NO, read_ND = grads[0].reshape(len(x_ND), -1), dropped([layer], x, x_ND)
        low_NR = read_ND @ A_RD.T
        dm_O = sum_of(layer, x_ND, weight, low_NR, B).mul_(dy_NO).sum(dim=0, dtype=torch.float32) / norms_O
        dz_NO = dy_NO * gain_O
        u_NR = (dz_NO @ B.to(x.dtype)).mul_(layer.scale)
        dB = (dz_NO.T @ low_NR).mul_(layer.scale).to(B.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = add_low(dz_NO @ weight, u_NR, A_RD, layers=[layer], x=x).view(x.shape)
        return dx, None, (u_NR.T @ read_ND).to(A.dtype), dB, dm_O


def sum_of(
    layer: DoRALinear, x_ND: torch.Tensor, weight: torch.Tensor, low_NR: torch.Tensor, B: torch.Tensor
) -> torch.Tensor:
    """Return (N, O): x W.T + s low B.T."""
    return torch.addmm(x_ND @ weight.T, low_NR, B.to(x_ND.dtype).T, alpha=layer.scale)


def row_norms(layer: Any, weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """Return (O,) float32 norms of the rows of W + s B A, above 0: a row of zeros would make NaN of its magnitude."""
    across_OR = (weight @ A.to(weight.dtype).T).float()
    change_OR = layer.scale * B
    twice_O = 2 * (across_OR * change_OR).sum(dim=1)
    squares_O = layer.squares + twice_O + ((change_OR @ (A @ A.T)) * change_OR).sum(dim=1)
    return squares_O.clamp_min(LEAST_SQUARE).sqrt()


def attach_dora(root: nn.Module, spec: AdapterSpec, dropout: Dropout, linears: Mapping[str, tuple[int, int]]) -> None:
    """Replace the spec's modules, in place, by DoRA layers over them."""
    for name in spec.modules:
        parent, _, leaf = name.rpartition(".")
        owner = root.get_submodule(parent)
        layer = DoRALinear(getattr(owner, leaf), name=name, spec=spec, dropout=dropout, shape=linears[name])
        setattr(owner, leaf, layer)


def frozen_weight(base: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight (O, D) of a frozen layer, in `dtype` and decoded where it is quantized."""
    return base.decoded(dtype) if hasattr(base, "decoded") else base.weight


def magnitudes(root: nn.Module) -> dict[str, Tensor]:
    """Return the norms of the base's rows under the names of the magnitudes that start from them."""
    return {
        f"{name}.lora_magnitude_vector": cast(Any, module).start
        for name, module in root.named_modules()
        if "lora_magnitude_vector" in getattr(module, "trained_leaves", ())
    }
