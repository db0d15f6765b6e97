"""`doctor`: this machine, its versions, and one real training step on every backend."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from shared.capabilities import examine_schemes, summarize
from shared.config_file import build_config
from shared.errors import MlxloraError
from shared.jobs.train import train
from shared.registry import BACKENDS, resolve

REFERENCE_LOSS_GAP = 1e-3


@dataclass(frozen=True)
class Check:
    """One line of the report: PASS, FAIL or INFO, what was found, and what to do."""

    name: str
    status: str
    found: str
    fix: str | None


def examine(demo: Path) -> list[Check]:
    """Return the report; demo: the folder with the embedded base and task."""
    memory = psutil.virtual_memory()
    free = shutil.disk_usage(Path.cwd()).free
    checks = [
        Check(
            "machine",
            "INFO",
            f"{platform.machine()}, {os.cpu_count()} cores, {memory.total / 2**30:.0f} GiB memory",
            None,
        ),
        Check("system", "INFO", f"{platform.platform(terse=True)}, Python {platform.python_version()}", None),
        Check(
            "disk",
            "PASS" if free > 2**30 else "FAIL",
            f"{free / 2**30:.1f} GiB free here",
            None if free > 2**30 else "free some space",
        ),
    ]
    losses: dict[str, float] = {}
    for name in BACKENDS:
        checks += examine_backend(name, demo, losses)
    if len(losses) == 2:
        one, two = losses.values()
        gap = abs(one - two) / abs(two)
        status = "PASS" if gap < REFERENCE_LOSS_GAP else "FAIL"
        checks.append(
            Check(
                "agreement", status, f"loss after two updates: gap {gap:.1e}", None if status == "PASS" else "report it"
            )
        )
    return checks


def examine_backend(name: str, demo: Path, losses: dict[str, float]) -> list[Check]:
    """Return the lines of one backend: what it is, and a smoke step; notes its loss."""
    found = resolve(BACKENDS, name, "backend")().probe()
    versions = ", ".join(f"{package} {number}" for package, number in found.versions.items())
    if not found.available:
        return [Check(name, "FAIL", found.reason, found.fix)]
    checks = [Check(name, "PASS", f"{found.reason}; {versions}", None)]
    began = time.perf_counter()
    try:
        losses[name] = smoke_step(name, demo)
    except (MlxloraError, RuntimeError, ImportError) as error:
        return [
            *checks,
            Check(f"{name} step", "FAIL", str(error).splitlines()[0], "reinstall the backend; --debug shows more"),
        ]
    took = time.perf_counter() - began
    return [
        *checks,
        examine_formats(name),
        Check(
            f"{name} step", "PASS", f"two LoRA updates of the demo base in {took:.1f} s, loss {losses[name]:.4f}", None
        ),
    ]


def examine_formats(name: str) -> Check:
    """Return the line on storage formats: which of them this backend trains over, and why not the others."""
    cells = examine_schemes(resolve(BACKENDS, name, "backend")())
    wrong = any(cell.verdict != "trains" for cell in cells)
    return Check(f"{name} quantization", "INFO" if wrong else "PASS", summarize(cells), None)


def smoke_step(backend: str, demo: Path) -> float:
    """Return the loss after two real updates of the demo base."""
    with tempfile.TemporaryDirectory() as folder:
        config = build_config(
            {
                "model": str(demo / "base"),
                "data": {"path": str(demo / "task"), "max_length": 128},
                "train": {"batch_size": 4, "updates": 2, "dtype": "float32"},
                "evaluation": {"every": None},
                "backend": backend,
                "output": folder,
            }
        )
        loss = train(config).loss
    assert loss is not None
    return loss
