"""Elementwise functions and sums that MLX computes slowly or inexactly on a CPU, by a better way there."""

from __future__ import annotations

import math

import mlx.core as mx

LOG2_E = math.log2(math.e)
LEAST = -87.0  # e**-87 is the least power above float32's subnormals, which take the C library many times as long
MOST = 127.0  # the largest exponent of a float32
PIECE = 64  # values that are summed in one go


def on_gpu() -> bool:
    """Return whether MLX computes on Metal or CUDA."""
    return mx.default_device().type == mx.DeviceType.gpu


def exp(x: mx.array) -> mx.array:
    """Return e**x in float32; on a CPU as a power, which takes 0.4 of the time (MLX 0.32: 4.6 ns against 11.7).

    For x of at most 0, as in a softmax. e is rounded: the relative error is up to 8e-8 * abs(x), next to nothing where
    it counts, and less than MLX's own. On a CPU values below 1.6e-38 are returned as that.
    """
    return mx.exp(x) if on_gpu() else mx.power(mx.array(math.e), mx.maximum(x, LEAST))


def row_sums(x: mx.array) -> mx.array:
    """Return sums over the last axis, kept; on a CPU as a product, in a fifth of the time."""
    return x.sum(axis=-1, keepdims=True) if on_gpu() else x @ mx.ones((x.shape[-1], 1), dtype=x.dtype)


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


def softplus(x: mx.array) -> mx.array:
    """Return log(1 + e**x), of large x x."""
    return mx.logaddexp(x, 0.0)
