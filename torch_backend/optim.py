"""AdamW on one flat float32 vector: a handful of operations per update, whatever the number of tensors.

Source: Loshchilov and Hutter 2019 (AdamW), algorithm 2, with Adam's bias correction (Kingma and Ba 2015).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from shared.quant.blockwise import BLOCK, num_blocks
from shared.types import MomentFormat, Update
from torch_backend.blockwise import decode, encode

PIECE = 2**12 * BLOCK  # values decoded at a time: 4 MiB for each moment


@dataclass(frozen=True)
class Scales:
    """0-dimensional float32 tensors on the device, made before anything is replaced."""

    divisor: torch.Tensor  # of the summed gradient: total weight / clipping factor
    skip: torch.Tensor  # 1 where nothing may change, else 0
    step: torch.Tensor  # of the bias correction; infinity for none


class AdamW:
    """Moments and float32 values of all trained tensors, laid end to end, matrices first.

    Each tensor begins at a multiple of 256, so that no block of 8-bit moments spans two; what lies between is zero.
    float32 parameters become views of the flat vector; others are copied from it after each update.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, state: MomentFormat) -> None:
        self.parameters = dict(sorted(parameters.items(), key=lambda item: item[1].ndim < 2))
        self.sizes = [num_blocks(parameter.numel()) * BLOCK for parameter in self.parameters.values()]
        decayed = [parameter.ndim >= 2 for parameter in self.parameters.values()]
        self.num_decayed = sum(size for size, yes in zip(self.sizes, decayed, strict=True) if yes)
        device, total = next(iter(self.parameters.values())).device, sum(self.sizes)
        self.value, self.grad = (torch.zeros(total, device=device) for _ in range(2))
        self.moments = make_moments(total, state=state, device=device)
        self.in_8bit = state == "8bit"
        self.pull()
        for parameter, view in zip(self.parameters.values(), self.views(self.value), strict=True):
            if parameter.dtype == torch.float32:
                parameter.data = view

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Return the pieces of a flat vector in the parameters' shapes."""
        pieces = zip(flat.split(self.sizes), self.parameters.values(), strict=True)
        return [piece[: parameter.numel()].view(parameter.shape) for piece, parameter in pieces]

    def pull(self) -> None:
        """Take the parameters' values into the flat vector."""
        for parameter, view in zip(self.parameters.values(), self.views(self.value), strict=True):
            view.copy_(parameter.detach())

    def step(self, update: Update, *, loss: torch.Tensor, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Divide the summed gradients by `weight`, clip, update; return (norm before clipping, applied?).

        A non-finite loss or gradient leaves parameters and moments as they are, without a host synchronisation.
        Where memory runs out nothing has changed, but for the gradients.
        """
        norm = self.grad.norm() / weight
        ok = torch.isfinite(norm) & torch.isfinite(loss)
        clip = torch.ones_like(norm)
        if update.max_grad_norm is not None:
            clip = torch.clamp(update.max_grad_norm / (norm + 1e-6), max=1.0)
        step = float(update.step) if update.bias_correction else math.inf
        scales = Scales(divisor=weight / clip, skip=(~ok).float(), step=torch.full_like(norm, step))
        if self.in_8bit:
            self.step_8bit(update, scales)
        else:
            m, v = self.moments["m"], self.moments["v"]
            for span, decay in self.spans(len(self.value)):
                adamw(self.value[span], self.grad[span], m[span], v[span], update, scales, decay=decay)
        self.grad.zero_()
        self.push()
        return norm, ok

    def step_8bit(self, update: Update, scales: Scales) -> None:
        """Update piece by piece; next values wait in the gradient, next codes beside the old, until all have memory."""
        news = {name: torch.empty_like(flat) for name, flat in self.moments.items()}
        for span, decay in self.spans(PIECE):
            blocks = slice(span.start // BLOCK, span.stop // BLOCK)
            places = {name: blocks if name.endswith("absmax") else span for name in news}
            olds = {name: flat[places[name]] for name, flat in self.moments.items()}
            m, v = (decode(olds[k], olds[f"{k}_absmax"], signed=k == "m") for k in "mv")
            value = self.value[span].clone()
            adamw(value, self.grad[span], m, v, update, scales, decay=decay)
            self.grad[span] = value
            for key, moment in (("m", m), ("v", v)):
                pair = zip((key, f"{key}_absmax"), encode(moment, signed=key == "m"), strict=True)
                for name, new in pair:
                    news[name][places[name]] = torch.where(scales.skip > 0, olds[name], new)
        self.value.copy_(self.grad)
        self.moments = news

    def spans(self, longest: int) -> Iterator[tuple[slice, bool]]:
        """Yield pieces of the flat vector of at most `longest` values, and whether weight decay applies to them."""
        for start, stop, decay in ((0, self.num_decayed, True), (self.num_decayed, len(self.value), False)):
            for at in range(start, stop, longest):
                yield slice(at, min(at + longest, stop)), decay

    def push(self) -> None:
        """Write the values into the parameters that are not views."""
        for parameter, view in zip(self.parameters.values(), self.views(self.value), strict=True):
            if parameter.dtype != torch.float32:
                parameter.data.copy_(view)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield `m.<name>`, `v.<name>`, and `master.<name>` for parameters below float32; in 8 bits also scales."""
        for prefix, flat in {**self.moments, "master": self.value}.items():
            in_blocks = prefix.endswith("absmax")
            views = flat.split([size // BLOCK for size in self.sizes]) if in_blocks else self.views(flat)
            for (name, parameter), view in zip(self.parameters.items(), views, strict=True):
                if prefix != "master" or parameter.dtype != torch.float32:
                    yield f"{prefix}.{name}", view


def make_moments(size: int, *, state: MomentFormat, device: torch.device) -> dict[str, torch.Tensor]:
    """Return zero moments of a flat vector: m and v, or their codes with m_absmax and v_absmax."""
    if state == "float32":
        return {name: torch.zeros(size, device=device) for name in ("m", "v")}
    moments = {}
    for name in ("m", "v"):
        moments[name], moments[f"{name}_absmax"] = encode(torch.zeros(size, device=device), signed=name == "m")
    return moments


def adamw(
    p: torch.Tensor, g: torch.Tensor, m: torch.Tensor, v: torch.Tensor, update: Update, scales: Scales, *, decay: bool
) -> None:
    """Update values and moments in place, in one pass without further memory: torch.optim.AdamW's fused kernel."""
    torch.ops.aten._fused_adamw_.default(
        [p], [g], [m], [v], [], [scales.step], amsgrad=False, maximize=False,
        grad_scale=scales.divisor, found_inf=scales.skip,
        lr=update.lr, beta1=update.beta1, beta2=update.beta2, eps=update.eps,
        weight_decay=update.weight_decay if decay else 0.0,
    )  # fmt: skip
