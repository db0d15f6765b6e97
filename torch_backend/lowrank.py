"""The low-rank products beside frozen layers, with gradients written by hand: the input is kept, nothing else.

Legend: B rows, T tokens, N = B*T, D input width, O output width, R rank, K the sum of the readers' ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from torch_backend.gated import gated, gated_gradients

Layers = Sequence[Any]  # LoRALinear layers of adapters.py


class Readers:
    """Layers that read the same input, such as q, k and v: the one called first computes the outputs of all.

    Their A are multiplied as one matrix, the input is saved once, and its gradient is summed in place.
    """

    def __init__(self, layers: Layers) -> None:
        self.layers = layers
        self.x: torch.Tensor | None = None
        self.waiting: dict[int, torch.Tensor] = {}  # by a layer's place among the readers: a name would be compiled in
        for place, layer in enumerate(layers):
            layer.place = place

    def output_of(self, layer: Any, x_BTD: torch.Tensor, up_BTD: torch.Tensor | None = None) -> torch.Tensor:
        """Return the layer's output for x, computed now or when one of the others was asked.

        With `up` the layers read silu(x) * up.
        """
        if self.x is not x_BTD or layer.place not in self.waiting:
            factors = [factor for reader in self.layers for factor in (reader.lora_A, reader.lora_B)]
            outputs = _LowRank.apply(x_BTD, up_BTD, self.layers, *factors)
            self.waiting = dict(enumerate(outputs))
            self.x = x_BTD
        output = self.waiting.pop(layer.place)
        if not self.waiting:
            self.x = None
        return output


class _LowRank(torch.autograd.Function):
    """y_i = x W_i.T + b_i + scale * dropout(x) A_i.T B_i.T for every reader i of x; of the inputs x alone is saved.

    Where x is silu(gate) * up, these two are saved in its stead, and x is made again.
    With g_i = dy_i and u_i = scale * g_i B_i:
    dx = sum g_i W_i + u_i A_i,  dA_i = u_i.T x,  dB_i = scale * g_i.T (x A_i.T).
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, up: torch.Tensor | None, layers: Layers, *factors: torch.Tensor) -> Any:
        ctx.layers = layers
        ctx.save_for_backward(x, up, *factors)
        x = x if up is None else gated(x, up)
        x_ND = x.reshape(-1, x.shape[-1])
        A_KD = stack(factors[0::2], x.dtype)
        low_NK = narrow(dropped(layers, x, x_ND), A_KD.T)
        outputs = []
        for layer, B, low_NR in zip(layers, factors[1::2], low_NK.split(ranks(layers), dim=1), strict=True):
            weight, bias = layer.weight(x.dtype), getattr(layer.base, "bias", None)
            y_NO = x_ND @ weight.T if bias is None else torch.addmm(bias, x_ND, weight.T)
            y_NO.addmm_(low_NR, B.to(x.dtype).T, alpha=layer.scale)
            outputs.append(y_NO.view(*x.shape[:-1], -1))
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        (gate, up, *factors), layers = ctx.saved_tensors, ctx.layers
        silu = None if up is None else functional.silu(gate)
        x = gate if up is None or silu is None else silu * up
        x_ND, A_KD = x.reshape(-1, x.shape[-1]), stack(factors[0::2], x.dtype)
        read_ND = dropped(layers, x, x_ND)
        low_NK = narrow(read_ND, A_KD.T)
        dx_ND: torch.Tensor | None = None
        dB: list[torch.Tensor | None] = []
        u: list[torch.Tensor] = []  # each (R, N)
        pieces = low_NK.split(ranks(layers), dim=1)
        for layer, grad, B, low_NR in zip(layers, grads, factors[1::2], pieces, strict=True):
            if grad is None:
                dB.append(None)
                u.append(torch.zeros_like(low_NR.T))
                continue
            g_NO = grad.reshape(len(x_ND), -1)
            u.append(narrow(g_NO, B.to(x.dtype) * layer.scale).T)
            dB.append(narrow(g_NO.T, low_NR).mul_(layer.scale).to(B.dtype))
            if ctx.needs_input_grad[0]:
                weight = layer.weight(x.dtype)
                dx_ND = g_NO @ weight if dx_ND is None else dx_ND.addmm_(g_NO, weight)
        u_NK = stack(u, x.dtype).T
        if dx_ND is not None:
            dx_ND = add_low(dx_ND, u_NK, A_KD, layers=layers, x=x).view(x.shape)
        dA = (u_NK.T @ read_ND).to(factors[0].dtype).split(ranks(layers))
        del x, x_ND, read_ND  # as wide as a layer gets: not beside the gradients of gate and up
        dup = None
        if dx_ND is not None and up is not None and silu is not None:
            dx_ND, dup = gated_gradients(gate, up, dx_ND, silu)
        return dx_ND, dup, None, *(factor for pair in zip(dA, dB, strict=True) for factor in pair)


def narrow(left_MI: torch.Tensor, right_IR: torch.Tensor) -> torch.Tensor:
    """Return left @ right where right has few columns; on a CPU as the transpose of a product of few rows.

    That is the same sums, three to seven times faster in MKL for some 8 columns (benchmarks/LOG.md).
    """
    return (right_IR.T @ left_MI.T).T if left_MI.device.type == "cpu" else left_MI @ right_IR


def stack(factors: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Return the A of all readers as one (K, D) matrix, K the sum of ranks."""
    return (factors[0] if len(factors) == 1 else torch.cat(list(factors))).to(dtype)


def ranks(layers: Layers) -> list[int]:
    """Return the readers' ranks."""
    return [len(layer.lora_A) for layer in layers]


def dropped(layers: Layers, x: torch.Tensor, x_ND: torch.Tensor) -> torch.Tensor:
    """Return what A reads: x, or x with features dropped (then a layer has no fellow readers)."""
    layer = layers[0]
    return layer.dropout(x, layer.name).reshape(x_ND.shape) if layer.dropout.active else x_ND


def add_low(
    dx_ND: torch.Tensor, u_NK: torch.Tensor, A_KD: torch.Tensor, *, layers: Layers, x: torch.Tensor
) -> torch.Tensor:
    """Return dx + u A, in place; through the dropout where there is one (its mask is made again)."""
    layer = layers[0]
    if not layer.dropout.active:
        return dx_ND.addmm_(u_NK, A_KD)
    return dx_ND.add_(layer.dropout((u_NK @ A_KD).view(x.shape), layer.name).view(dx_ND.shape))
