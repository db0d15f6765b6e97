"""What the machine is, and how fast it multiplies and copies."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "peft", "accelerate", "triton", "bitsandbytes", "safetensors", "numpy", "pytest")
# Dense bfloat16 tensor-core rates of the vendor's data sheets, FLOP/s.
NOMINAL = {"H200": 989e12, "H100": 989e12, "GH200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12}


def describe(device: str) -> dict[str, Any]:
    """Return versions, the device, and its measured and nominal rates."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": versions,
    }
    if device == "cuda":
        facts = torch.cuda.get_device_properties(0)
        found["device"] = f"{facts.name}, {facts.total_memory / 2**30:.1f} GiB, {facts.multi_processor_count} SMs"
        found["cuda"] = torch.version.cuda
    name = found.get("device", "")
    nominal = next((rate for key, rate in NOMINAL.items() if key in name), None)
    found["peaks"] = {"measured": matmul_rate(device), "nominal": nominal}
    found["copy_gb_per_s"] = copy_rate(device) / 1e9
    return found


def seconds_of(work: Callable[[], Any], *, device: str, times: int) -> float:
    """Return the seconds of one call, the mean of several behind three for warming up."""
    for _ in range(3):
        work()
    wait(device)
    start = time.perf_counter()
    for _ in range(times):
        work()
    wait(device)
    return (time.perf_counter() - start) / times


def wait(device: str) -> None:
    """Wait until the device has done all it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def matmul_rate(device: str) -> float:
    """Return FLOP/s of a large bfloat16 product of random matrices."""
    size = 8192 if device == "cuda" else 256
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: a @ b, device=device, times=10)


def copy_rate(device: str) -> float:
    """Return bytes per second of a copy, read and written ones counted."""
    source = torch.ones(2**30 if device == "cuda" else 2**22, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds_of(lambda: target.copy_(source), device=device, times=10)
