"""Memory figures, in bytes: the device's own on CUDA, the process's on a CPU."""

from __future__ import annotations

import resource
import sys

import psutil
import torch

from shared.types import Memory


def read_memory(device: torch.device) -> Memory:
    """Return bytes active, at the highest, and at most."""
    if device.type == "cuda":
        limit = torch.cuda.get_device_properties(device).total_memory
        return Memory(torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device), limit)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return Memory(psutil.Process().memory_info().rss, peak, psutil.virtual_memory().total)
