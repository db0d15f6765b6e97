"""Memory sizes that models are trained on, and what of them a run may use."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

from shared.errors import ConfigError

GIB = 2**30
MAC_GB = (8, 16, 24, 32, 48, 64, 96, 128)
GPU_GB = (12, 16, 24, 40, 48, 80, 141)
CGROUP = Path("/sys/fs/cgroup/memory.max")
# What Metal recommends as the largest working set (recommendedMaxWorkingSetSize, which MLX's device_info() gives): two
# thirds of the memory up to 32 GB and three quarters above, as logs of llama.cpp have it: 10922.67 MB of 16 GB,
# 21845.34 of 32 (ggml-org/llama.cpp pull 2011), 49152 of 64 (issue 1870).
MAC_SMALL_GB, MAC_SMALL_SHARE, MAC_SHARE = 32, 2 / 3, 3 / 4


@dataclass(frozen=True)
class Machine:
    """A device: the place of `shared.estimate.costs`, its memory, and the bytes that a run may use of it."""

    name: str
    place: str
    limit: int


def mac(gigabytes: int) -> Machine:
    """Return a Mac with that much unified memory; a run may use what Metal recommends.

    >>> round(mac(16).limit / GIB, 2), mac(64).limit / GIB
    (10.67, 48.0)
    """
    share = MAC_SMALL_SHARE if gigabytes <= MAC_SMALL_GB else MAC_SHARE
    return Machine(f"Mac {gigabytes} GB", "mlx-gpu", int(gigabytes * GIB * share))


def gpu(gigabytes: int) -> Machine:
    """Return a CUDA device with that much memory."""
    return Machine(f"GPU {gigabytes} GB", "torch-gpu", gigabytes * GIB)


def machines(backend: str) -> list[Machine]:
    """Return the usual machines of a backend."""
    return [mac(size) for size in MAC_GB] if backend == "mlx" else [gpu(size) for size in GPU_GB]


def parse_memory(text: str, *, backend: str) -> Machine:
    """Return the machine of "here" or of a size such as 16GB; raises ConfigError.

    >>> parse_memory("24GB", backend="torch").name
    'GPU 24 GB'
    """
    if text == "here":
        return here(backend)
    match = re.fullmatch(r"([1-9]\d{0,3})\s*(GB|GiB|G)?", text, re.IGNORECASE)
    if match is None:
        raise ConfigError(f'memory "{text}"', expected="here, or a size such as 16GB")
    return mac(int(match[1])) if backend == "mlx" else gpu(int(match[1]))


def here(backend: str, *, device: str | None = None) -> Machine:
    """Return this machine as a backend uses it; no framework is asked.

    device: "cpu" or "gpu" where it is known already.
    """
    total = physical_memory()
    cuda = cuda_memory() if backend == "torch" and device != "cpu" else None
    if backend == "torch" and cuda:
        return Machine("this GPU", "torch-gpu", cuda)
    apple = platform.system() == "Darwin" and platform.machine() == "arm64"
    if backend == "mlx" and apple and device != "cpu":
        return Machine("this Mac", "mlx-gpu", mac(round(total / GIB)).limit)
    return Machine("this machine", f"{backend}-cpu", total)


def physical_memory() -> int:
    """Return this machine's memory in bytes, or what its container may use."""
    total = psutil.virtual_memory().total
    try:
        limit = CGROUP.read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def cuda_memory() -> int | None:
    """Return the bytes of the first CUDA device, None where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=memory.total", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        return int(done.stdout.split()[0]) * 2**20
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError):
        return None
