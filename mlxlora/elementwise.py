"""Elementwise functions that MLX computes slowly on a CPU, by a faster way there."""

from __future__ import annotations

import math

import mlx.core as mx

LOG2_E = math.log2(math.e)
LEAST = -125.5  # the exponent of about the least float32 above the subnormals, which take the C library far longer
MOST = 127.0  # the largest exponent of a float32


def on_gpu() -> bool:
    """Return whether MLX computes on Metal or CUDA."""
    return mx.default_device().type == mx.DeviceType.gpu


def exp(x: mx.array) -> mx.array:
    """Return e**x; on a CPU as a power of two, which takes a third of the time (MLX 0.32: 4 ns against 12).

    For x of at most 0, as in a softmax. The product rounds: the relative error is up to 1e-7 * abs(x), next to nothing
    where it counts. On a CPU values below 1.6e-38 are returned as that.
    """
    return mx.exp(x) if on_gpu() else power_of_two(x * LOG2_E)


def power_of_two(x: mx.array) -> mx.array:
    """Return 2**x for x of at most 127, values below 1.6e-38 as that."""
    return mx.power(mx.array(2.0, dtype=x.dtype), mx.maximum(x, LEAST))


def row_sums(x: mx.array) -> mx.array:
    """Return sums over the last axis, kept as one of length 1, as a product: a fifth of the time of a sum on a CPU."""
    return x @ mx.ones((x.shape[-1], 1), dtype=x.dtype)


def sigmoid(x: mx.array) -> mx.array:
    """Return 1 / (1 + e**-x); on a CPU by a power of two, in half the time (MLX 0.32: 8 ns against 17).

    The relative error is that of MLX's own, 5e-7 at most for abs(x) <= 10. Below -87 it is 0.
    """
    if on_gpu():
        return mx.sigmoid(x)
    return 1 / (1 + mx.power(mx.array(2.0, dtype=x.dtype), mx.minimum(x * -LOG2_E, MOST)))
