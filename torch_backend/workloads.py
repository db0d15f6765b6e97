"""What shows how fast a device is at best: square matmuls, and copies of a large array.

`shared/measuring/ceilings.py` times them. Legend: S size of a square matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from torch_backend.state import torch_dtype

Run = Callable[[int], None]


def matmul(size: int, dtype: str, device: str) -> Run:
    """Return a function that multiplies (S, S) matrices so many times, one after the other, and waits."""
    # Entries of variance 1/S keep a product's size: neither overflow nor denormal numbers, which are slow on CPUs.
    random = torch.Generator().manual_seed(0)
    right_SS = (torch.randn(size, size, generator=random) / math.sqrt(size)).to(device, torch_dtype(dtype))

    def run(times: int) -> None:
        left_SS = right_SS
        for _ in range(times):
            left_SS = left_SS @ right_SS
        wait(device)

    return run


def copy(num_bytes: int, dtype: str, device: str) -> Run:
    """Return a function that copies an array of about so many bytes into another so many times, and waits."""
    kind = torch_dtype(dtype)
    source = torch.ones(num_bytes // kind.itemsize, dtype=kind, device=device)
    target = torch.zeros_like(source)

    def run(times: int) -> None:
        for _ in range(times):
            target.copy_(source)
        wait(device)

    return run


def wait(device: str) -> None:
    """Return when the device has done what is queued."""
    if device == "cuda":
        torch.cuda.synchronize()


WORKLOADS = {"matmul": matmul, "copy": copy}
