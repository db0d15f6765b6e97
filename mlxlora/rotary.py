"""Rotary positions on a CPU by a table of cosines and sines, where MLX composes its own of many operations.

The table is read off the zoo's own layer, so that every kind of scaling is in it.
Legend: B rows, H heads, T tokens, K head width.
"""

from __future__ import annotations

from typing import Any, cast

import mlx.core as mx

from mlxlora.elementwise import on_gpu

PROBE = 5  # positions that are tried


def table_of(rope: Any, length: int, width: int) -> mx.array:
    """Return (T, K): cosines in the first half, sines in the second; what the layer makes of ones and zeros."""
    return rope(mx.broadcast_to(ones_and_zeros(width), (1, 1, length, width)))[0, 0]


def ones_and_zeros(width: int) -> mx.array:
    """Return (K,): 1 in the first half."""
    return (mx.arange(width) < width // 2).astype(mx.float32)


def turned_width(rope: Any) -> int:
    """Return the head width K of which a layer turns features k and K/2 + k by an angle, doing nothing else; or 0."""
    width = getattr(rope, "dims", 0) or getattr(rope, "dim", 0)
    if not width or width % 2:
        return 0
    x = mx.sin(mx.arange(PROBE * width, dtype=mx.float32)).reshape(1, 1, PROBE, width)
    gap = mx.abs(turned(x, table_of(rope, PROBE, width)) - rope(x)).max()
    return width if gap < 1e-5 else 0


@mx.custom_function
def turned(x_BHTK: mx.array, table_TK: mx.array) -> mx.array:
    """Return x with every pair of features turned by its position's angle."""
    (a, b), (cos, sin) = mx.split(x_BHTK, 2, axis=-1), mx.split(table_TK, 2, axis=-1)
    return mx.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


@turned.vjp
def turned_back(primals: list[mx.array], grad_BHTK: mx.array, _output: mx.array) -> tuple[mx.array, mx.array]:
    """Return the gradient of x: the output's, turned the other way; the table has none."""
    (a, b), (cos, sin) = mx.split(grad_BHTK, 2, axis=-1), mx.split(primals[1], 2, axis=-1)
    return mx.concatenate([a * cos + b * sin, b * cos - a * sin], axis=-1), mx.zeros_like(primals[1])


def rotate(layer: Any, q_BHTK: mx.array, k_BHTK: mx.array) -> tuple[mx.array, mx.array]:
    """Return queries and keys with their positions, counted from 0, by an attention layer's rope."""
    length, width = q_BHTK.shape[-2:]
    if on_gpu() or q_BHTK.dtype != mx.float32 or width != layer.turned_width:
        return layer.rope(q_BHTK), layer.rope(k_BHTK)
    table_TK = table_of(layer.rope, length, width)
    return cast(mx.array, turned(q_BHTK, table_TK)), cast(mx.array, turned(k_BHTK, table_TK))
