"""AdamW on one flat float32 vector: a handful of operations per update, whatever the number of tensors.

Source: Loshchilov and Hutter 2019 (AdamW), algorithm 2, with Adam's bias correction (Kingma and Ba 2015).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from shared.types import Update


class AdamW:
    """Moments and float32 values of all trained tensors, laid end to end, matrices first.

    float32 parameters become views of the flat vector; others are copied from it after each update.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(sorted(parameters.items(), key=lambda item: item[1].ndim < 2))
        sizes = [parameter.numel() for parameter in self.parameters.values()]
        self.num_decayed = sum(p.numel() for p in self.parameters.values() if p.ndim >= 2)
        device = next(iter(self.parameters.values())).device
        self.value, self.grad, self.m, self.v = (torch.zeros(sum(sizes), device=device) for _ in range(4))
        self.pull()
        for parameter, view in zip(self.parameters.values(), self.views(self.value), strict=True):
            if parameter.dtype == torch.float32:
                parameter.data = view

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Return the pieces of a flat vector in the parameters' shapes."""
        shapes = [parameter.shape for parameter in self.parameters.values()]
        pieces = flat.split([math.prod(shape) for shape in shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]

    def pull(self) -> None:
        """Take the parameters' values into the flat vector."""
        for parameter, view in zip(self.parameters.values(), self.views(self.value), strict=True):
            view.copy_(parameter.detach())

    def step(self, update: Update, *, loss: torch.Tensor, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Divide the summed gradients by `weight`, clip, update; return (norm before clipping, applied?).

        A non-finite loss or gradient leaves parameters and moments as they are, without a host synchronisation.
        """
        grad = self.grad.div_(weight)
        norm = grad.norm()
        ok = torch.isfinite(norm) & torch.isfinite(loss)
        if update.max_grad_norm is not None:
            grad.mul_(torch.clamp(update.max_grad_norm / (norm + 1e-6), max=1.0))
        m = torch.lerp(self.m, grad, 1 - update.beta1)
        v = (self.v * update.beta2).addcmul_(grad, grad, value=1 - update.beta2)
        fix1 = 1 - update.beta1**update.step if update.bias_correction else 1.0
        fix2 = 1 - update.beta2**update.step if update.bias_correction else 1.0
        value = self.value.clone()
        value[: self.num_decayed].mul_(1 - update.lr * update.weight_decay)
        value.addcdiv_(m, (v / fix2).sqrt_().add_(update.eps), value=-update.lr / fix1)
        olds = (self.m, self.v, self.value)
        news = [torch.where(ok, new, old) for old, new in zip(olds, (m, v, value), strict=True)]
        for old, new in zip(olds, news, strict=True):  # nothing is replaced before everything has found memory
            old.copy_(new)
        self.grad.zero_()
        self.push()
        return norm, ok

    def push(self) -> None:
        """Write the values into the parameters that are not views."""
        for parameter, view in zip(self.parameters.values(), self.views(self.value), strict=True):
            if parameter.dtype != torch.float32:
                parameter.data.copy_(view)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield `m.<name>`, `v.<name>`, and `master.<name>` for parameters below float32."""
        for prefix, flat in (("m", self.m), ("v", self.v), ("master", self.value)):
            for (name, parameter), view in zip(self.parameters.items(), self.views(flat), strict=True):
                if prefix != "master" or parameter.dtype != torch.float32:
                    yield f"{prefix}.{name}", view
