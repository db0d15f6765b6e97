"""AdamW, tensor by tensor; MLX is lazy, so one update is one graph whatever the number of tensors.

Source: Loshchilov and Hutter 2019 (AdamW), algorithm 2, with Adam's bias correction (Kingma and Ba 2015).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import mlx.core as mx

from shared.types import Update

Arrays = dict[str, mx.array]


class AdamW:
    """Moments of all trained tensors by name, and float32 masters of those below float32."""

    def __init__(self, parameters: Mapping[str, mx.array]) -> None:
        self.dtypes = {name: parameter.dtype for name, parameter in parameters.items()}
        self.m: Arrays = {name: mx.zeros(parameter.shape) for name, parameter in parameters.items()}
        self.v: Arrays = {name: mx.zeros(parameter.shape) for name, parameter in parameters.items()}
        self.master: Arrays = {
            name: parameter.astype(mx.float32)
            for name, parameter in parameters.items()
            if parameter.dtype != mx.float32
        }

    def step(
        self, parameters: Arrays, grads: Mapping[str, mx.array], update: Update, *, loss: mx.array, weight: float
    ) -> tuple[Arrays, mx.array, mx.array]:
        """Divide the summed gradients by `weight`, clip, update.

        Returns the next parameters, the norm before clipping, and whether the update was applied: a non-finite loss or
        gradient leaves parameters and moments as they are, without a host synchronisation.
        """
        scaled = {name: grad / weight for name, grad in grads.items()}
        norm = mx.sqrt(sum((mx.square(grad).sum() for grad in scaled.values()), start=mx.zeros(())))
        ok = mx.isfinite(norm) & mx.isfinite(loss)
        clip = mx.array(1.0)
        if update.max_grad_norm is not None:
            clip = mx.minimum(update.max_grad_norm / (norm + 1e-6), 1.0)
        for name, grad in scaled.items():
            old = self.master.get(name, parameters[name])
            value, m, v = adamw(old, grad * clip, self.m[name], self.v[name], update)
            self.m[name], self.v[name] = mx.where(ok, m, self.m[name]), mx.where(ok, v, self.v[name])
            value = mx.where(ok, value, old)
            if name in self.master:
                self.master[name] = value
            parameters[name] = value.astype(self.dtypes[name])
        return parameters, norm, ok

    def tensors(self) -> Iterator[tuple[str, mx.array]]:
        """Yield `m.<name>`, `v.<name>`, and `master.<name>` for parameters below float32."""
        for prefix, arrays in (("m", self.m), ("v", self.v), ("master", self.master)):
            yield from ((f"{prefix}.{name}", array) for name, array in arrays.items())

    def put(self, name: str, array: mx.array) -> None:
        """Replace one of `tensors` by its name there."""
        prefix, _, inner = name.partition(".")
        {"m": self.m, "v": self.v, "master": self.master}[prefix][inner] = array


def adamw(p: mx.array, g: mx.array, m: mx.array, v: mx.array, update: Update) -> tuple[mx.array, mx.array, mx.array]:
    """Return the next (value, first moment, second moment) of one float32 tensor."""
    m = m + (1 - update.beta1) * (g - m)
    v = update.beta2 * v + (1 - update.beta2) * mx.square(g)
    fix1 = 1 - update.beta1**update.step if update.bias_correction else 1.0
    fix2 = math.sqrt(1 - update.beta2**update.step) if update.bias_correction else 1.0
    if p.ndim >= 2:
        p = p * (1 - update.lr * update.weight_decay)
    return p - (update.lr / fix1) * m / (mx.sqrt(v) / fix2 + update.eps), m, v
