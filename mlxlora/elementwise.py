"""Elementwise functions and sums that MLX computes slowly or inexactly on a CPU, by a better way there."""

from __future__ import annotations

import math

import mlx.core as mx

LOG2_E = math.log2(math.e)
LEAST = -125.5  # the exponent of about the least float32 above the subnormals, which take the C library far longer
MOST = 127.0  # the largest exponent of a float32
PIECE = 64  # values that are summed in one go


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


def long_sums(x: mx.array) -> mx.array:
    """Return sums over the last axis; on a CPU piece by piece.

    MLX's CPU adds one after the other (0.32): of 128,000 shares of a softmax the sum is 1.8e-4 short, by pieces 3e-8.
    """
    length, whole = x.shape[-1], x.shape[-1] // PIECE * PIECE
    if on_gpu() or length <= PIECE:
        return x.sum(axis=-1)
    sums = long_sums(x[..., :whole].reshape(*x.shape[:-1], -1, PIECE).sum(axis=-1))
    return sums if whole == length else sums + x[..., whole:].sum(axis=-1)


def sigmoid(x: mx.array) -> mx.array:
    """Return 1 / (1 + e**-x); on a CPU by a power of two, in half the time (MLX 0.32: 8 ns against 17).

    The relative error is that of MLX's own, 5e-7 at most for abs(x) <= 10. Below -87 it is 0.
    """
    if on_gpu():
        return mx.sigmoid(x)
    return 1 / (1 + mx.power(mx.array(2.0, dtype=x.dtype), mx.minimum(x * -LOG2_E, MOST)))
