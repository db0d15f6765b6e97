"""Memory figures, in bytes: the device's own on CUDA, the process's on a CPU."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import psutil
import torch

from shared.types import Memory


def read_memory(device: torch.device) -> Memory:
    """Return bytes active, at the highest, and at most."""
    if device.type == "cuda":
        limit = torch.cuda.get_device_properties(device).total_memory
        return Memory(torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device), limit)
    return Memory(psutil.Process().memory_info().rss, peak_resident(), psutil.virtual_memory().total)


def peak_resident() -> int:
    """Return the largest resident size of this program so far, in bytes."""
    try:  # on Linux ru_maxrss begins with the size of the program that started this one
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # in bytes on macOS, in KiB elsewhere
