"""What shows how fast a device is at best: square matmuls, and copies of a large array.

`shared/measuring/ceilings.py` times them. Legend: S size of a square matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx

from mlxlora.state import mlx_dtype

Run = Callable[[int], None]


def matmul(size: int, dtype: str) -> Run:
    """Return a function that multiplies (S, S) matrices so many times, one after the other, and waits."""
    # Entries of variance 1/S keep a product's size: neither overflow nor denormal numbers, which are slow on CPUs.
    right_SS = (mx.random.normal((size, size), key=mx.random.key(0)) / math.sqrt(size)).astype(mlx_dtype(dtype))
    mx.eval(right_SS)

    def run(times: int) -> None:
        left_SS = right_SS
        for _ in range(times):
            left_SS = left_SS @ right_SS
        mx.eval(left_SS)

    return run


def copy(num_bytes: int, dtype: str) -> Run:
    """Return a function that copies an array of about so many bytes into another so many times, and waits."""
    kind = mlx_dtype(dtype)
    source, target = mx.ones(num_bytes // kind.size, dtype=kind), mx.zeros(num_bytes // kind.size, dtype=kind)
    start = mx.array([0])
    mx.eval(source, target, start)
    held = [target]  # the only reference, so that each copy lands in the same memory

    def run(times: int) -> None:
        for _ in range(times):
            held[0] = mx.slice_update(held[0], source, start, axes=(0,))
        mx.eval(held[0])

    del target
    return run


WORKLOADS = {"matmul": matmul, "copy": copy}
