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
