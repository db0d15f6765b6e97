"""From the command to the first update, beside a bare script that imports the frameworks and reads the weights.

    python benchmarks/startup.py --model MODEL --data DATA [--runs 5] [--backend mlx torch]

Every measurement is a process of its own; the kinds take turns, medians are compared. "cold" tokenizes, "warm" finds
the tokens in the cache, "resume" goes on from a checkpoint. CPU seconds are user + system of the process; they bear a
busy machine better than wall time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.importing import versions_of

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("mlx", "mlx-lm", "torch", "transformers", "numpy")
RATIO = 1.3  # first update over bare imports and weights, at most
BARE = {
    "mlx": """
import sys
from mlxlora.backend import lend_blas
lend_blas()
import mlx.core as mx, mlx.nn, mlx_lm
from mlx_lm.models import llama
weights = [mx.load(file) for file in sys.argv[1:]]
mx.eval(weights)
""",
    "torch": """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama import modeling_llama
from safetensors.torch import load_file
weights = [load_file(file) for file in sys.argv[1:]]
total = sum(float(value.sum()) for found in weights for value in found.values())
""",
}
OURS = """
import json, os, sys
from mlxlora.cli.main import run

class Stop:
    def on_step(self, row):
        if row["step"] >= int(sys.argv[2]):
            os._exit(0)

import mlxlora
values = json.loads(sys.argv[1])
mlxlora.train(mlxlora.load_config(**values), callbacks=[Stop()])
"""


def main() -> None:
    """Measure, print the table, and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl")
    parser.add_argument("--backend", nargs="+", choices=tuple(BARE), default=list(BARE))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=512)
    arguments = parser.parse_args()
    results = {}
    print(f"{'':<14}{'CPU s':>8}{'wall s':>8}{'CPU ratio':>11}{'wall ratio':>12}")
    for backend in arguments.backend:
        results[backend] = measure(arguments, backend)
        show(backend, results[backend])
    print(json.dumps({"results": results, **surroundings(arguments)}))


def measure(arguments: argparse.Namespace, backend: str) -> dict[str, dict[str, float]]:
    """Return the median CPU and wall seconds of the bare script, and of a cold, a warm and a resumed run."""
    weights = sorted(str(file) for file in arguments.model.glob("*.safetensors"))
    seconds: dict[str, list[tuple[float, float]]] = {"bare": [], "cold": [], "warm": [], "resume": []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.runs + 1):
            values = json.dumps(recipe(arguments, backend, output=f"{folder}/run{number}"))
            again = values.replace(f"run{number}", f"again{number}")
            kept = {"MLXLORA_CACHE": f"{folder}/cache{number}"}
            found = {
                "bare": timed("-c", BARE[backend], *weights),
                "cold": timed("-c", OURS, values, "1", **kept),
                "warm": timed("-c", OURS, again, "1", **kept),
                "resume": timed("-c", OURS, again, "3", **kept) and timed("-c", OURS, again, "1", **kept),
            }
            for kind in seconds if number else ():  # the first turn reads everything from the disk
                seconds[kind].append(found[kind])
    return {kind: summary(pairs) for kind, pairs in seconds.items()}


def recipe(arguments: argparse.Namespace, backend: str, *, output: str) -> dict[str, Any]:
    """Return the config of a run that logs its first update."""
    return {
        "model": str(arguments.model.resolve()),
        "data": {"path": str(arguments.data.resolve()), "max_length": arguments.max_length},
        "train": {"batch_size": arguments.batch_size, "updates": 100, "dtype": "float32"},
        "evaluation": {"every": None},
        "log": {"every": 1},
        "checkpoint": {"every": 1},
        "backend": backend,
        "output": output,
    }


def timed(*words: str, **environment: str) -> tuple[float, float]:
    """Return the CPU and the wall seconds of one Python process."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(done.stderr)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def summary(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Return medians and spread."""
    cpu, wall = zip(*pairs, strict=True)
    return {
        "cpu_s": round(statistics.median(cpu), 3),
        "cpu_spread_s": round(max(cpu) - min(cpu), 3),
        "wall_s": round(statistics.median(wall), 3),
        "wall_spread_s": round(max(wall) - min(wall), 3),
    }


def show(backend: str, found: dict[str, dict[str, float]]) -> None:
    """Print a backend's lines, each with its ratio to the bare script."""
    bare = found["bare"]
    for kind, row in found.items():
        cpu, wall = row["cpu_s"] / bare["cpu_s"], row["wall_s"] / bare["wall_s"]
        met = "" if kind in ("bare", "resume") else f"   {'within' if cpu <= RATIO else 'ABOVE'} {RATIO}"
        print(f"{backend:<8}{kind:<6}{row['cpu_s']:>8.2f}{row['wall_s']:>8.2f}{cpu:>11.2f}{wall:>12.2f}{met}")


def surroundings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what the figures depend on: machine, load, versions."""
    system = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    return {
        "model": arguments.model.name,
        "data": arguments.data.name,
        "runs": arguments.runs,
        "machine": f"{system}, Python {platform.python_version()}",
        "load": os.getloadavg()[0],
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "versions": versions_of(PACKAGES),
    }


if __name__ == "__main__":
    main()
