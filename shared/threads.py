"""Threads: how many there are, and that they wait politely."""

from __future__ import annotations

import ctypes
import os
import sys

SPINS = 30_000  # of a waiting OpenMP thread, some 20 microseconds: benchmarks/LOG.md
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
KEPT_BYTES = 2**30


def wait_politely() -> None:
    """Ask OpenMP, before it is loaded, to let a waiting thread spin for a moment and then sleep.

    By default it spins for milliseconds; on a machine that does anything else, small matmuls then wait for a whole
    time slice at every barrier (an attention backward took 6,000 ms beside two busy processes, and 28 ms asleep).
    Threads that sleep at once take longer to wake than a small matmul lasts.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))


def keep_memory() -> None:
    """Ask glibc to keep freed memory for the next allocation instead of giving it back to the kernel.

    The C library maps every large array anew, so that each is first filled with zeros page by page: MLX on a CPU takes
    a sixth longer for that. Not for torch, which gains nothing by it and whose process only grows.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
            libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
