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
    """Moments and float32 values of all trained tensors, by name."""

    def __init__(self, parameters: Mapping[str, mx.array]) -> None:
        self.dtypes = {name: parameter.dtype for name, parameter in parameters.items()}
        self.value: Arrays = {name: parameter.astype(mx.float32) for name, parameter in parameters.items()}
        self.m: Arrays = {name: mx.zeros(parameter.shape) for name, parameter in parameters.items()}
        self.v: Arrays = {name: mx.zeros(parameter.shape) for name, parameter in parameters.items()}

    def pull(self, parameters: Mapping[str, mx.array]) -> None:
        """Take the parameters' values."""
        self.value = {name: parameter.astype(mx.float32) for name, parameter in parameters.items()}

    def step(
        self, grads: Mapping[str, mx.array], update: Update, *, loss: mx.array, weight: float
    ) -> tuple[mx.array, mx.array]:
        """Divide the summed gradients by `weight`, clip, update; return (norm before clipping, applied?).

        A non-finite loss or gradient leaves parameters and moments as they are, without a host synchronisation.
        """
        scaled = {name: grad / weight for name, grad in grads.items()}
        norm = mx.sqrt(sum((mx.square(grad).sum() for grad in scaled.values()), start=mx.zeros(())))
        ok = mx.isfinite(norm) & mx.isfinite(loss)
        clip = mx.array(1.0)
        if update.max_grad_norm is not None:
            clip = mx.minimum(update.max_grad_norm / (norm + 1e-6), 1.0)
        for name, grad in scaled.items():
            value, m, v = adamw(self.value[name], grad * clip, self.m[name], self.v[name], update)
            self.value[name] = mx.where(ok, value, self.value[name])
            self.m[name] = mx.where(ok, m, self.m[name])
            self.v[name] = mx.where(ok, v, self.v[name])
        return norm, ok

    def push(self) -> Arrays:
        """Return the values in the parameters' own dtypes."""
        return {name: value.astype(self.dtypes[name]) for name, value in self.value.items()}

    def tensors(self) -> Iterator[tuple[str, mx.array]]:
        """Yield `m.<name>`, `v.<name>`, and `master.<name>` for parameters below float32."""
        for prefix, arrays in (("m", self.m), ("v", self.v), ("master", self.value)):
            for name, array in arrays.items():
                if prefix != "master" or self.dtypes[name] != mx.float32:
                    yield f"{prefix}.{name}", array

    def put(self, name: str, array: mx.array) -> None:
        """Replace one of `tensors` by its name there."""
        prefix, _, inner = name.partition(".")
        {"m": self.m, "v": self.v, "master": self.value}[prefix][inner] = array


def adamw(p: mx.array, g: mx.array, m: mx.array, v: mx.array, update: Update) -> tuple[mx.array, mx.array, mx.array]:
    """Return the next (value, first moment, second moment) of one float32 tensor."""
    m = m + (1 - update.beta1) * (g - m)
    v = update.beta2 * v + (1 - update.beta2) * mx.square(g)
    fix1 = 1 - update.beta1**update.step if update.bias_correction else 1.0
    fix2 = math.sqrt(1 - update.beta2**update.step) if update.bias_correction else 1.0
    if p.ndim >= 2:
        p = p * (1 - update.lr * update.weight_decay)
    return p - (update.lr / fix1) * m / (mx.sqrt(v) / fix2 + update.eps), m, v
