"""Memory figures, in bytes, as MLX counts its own allocations."""

from __future__ import annotations

import mlx.core as mx
import psutil

from shared.types import Memory


def read_memory() -> Memory:
    """Return bytes active, at the highest, and at most."""
    info = mx.device_info()
    limit = info.get("max_recommended_working_set_size") or info.get("memory_size") or psutil.virtual_memory().total
    return Memory(mx.get_active_memory(), mx.get_peak_memory(), int(limit))


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether MLX failed for lack of memory."""
    text = str(error)
    words = ("Insufficient Memory", "Unable to allocate", "bad_alloc", "malloc", "out of memory")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(word in text for word in words))
