"""mlxlora as one more runner of a peer benchmark: reads a prepared work folder, prints one line of JSON.

    python benchmarks/run_ours.py PREPARED --backend mlx

PREPARED holds model/, data/train.jsonl and work.json (rows per update, lengths, rank, optimizer numbers). The rows are
gone through exactly once, as `mlxlora train` would do it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.importing import versions_of
from shared.machine import process_age

MIB = 2**20
PACKAGES = ("mlx", "mlx-lm", "torch", "transformers", "bitsandbytes", "numpy")


class Meter:
    """Notes the time of every update and what was in memory when the model was loaded."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.seconds: list[float] = []
        self.loaded_rss = self.last = self.first_update = self.loaded = 0.0

    def on_start(self, facts: Mapping[str, Any]) -> None:
        self.loaded_rss, self.loaded, self.last = rss() / MIB, process_age(), time.perf_counter()

    def on_step(self, row: Mapping[str, Any]) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now
        self.rows.append(dict(row))
        if len(self.rows) == 1:
            self.first_update = process_age()


def main() -> None:
    """Run and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prepared", type=Path)
    parser.add_argument("--backend", choices=("mlx", "torch"), required=True)
    parser.add_argument("--set", action="append", default=[], help="key.sub=value, as on the command line")
    arguments = parser.parse_args()
    work = json.loads((arguments.prepared / "work.json").read_text())
    meter = Meter()
    with tempfile.TemporaryDirectory() as output:
        import mlxlora

        values = recipe(work, arguments, output=f"{output}/run")
        mlxlora.train(mlxlora.load_config(overrides=arguments.set, **values), callbacks=[meter])
    report(work, meter, arguments)


def recipe(work: Mapping[str, Any], arguments: argparse.Namespace, *, output: str) -> dict[str, Any]:
    """Return the config that does the work's mathematics: one pass, constant rate, no clipping, a loss per update."""
    folder = arguments.prepared
    quantized = work["quantization"] == "4bit"
    return {
        "model": str(folder / ("model-mlx-4bit" if quantized else "model")),
        "data": {"path": str(folder / "data"), "max_length": work["max_seq_len"]},
        "adapter": {"rank": work["rank"], "alpha": work["alpha"], "dropout": 0.0},
        "optimizer": {
            "lr": work["learning_rate"], "betas": work["betas"], "eps": work["eps"],
            "weight_decay": work["weight_decay"], "max_grad_norm": None,
        },
        "schedule": {"name": "constant", "warmup": 0},
        "train": {
            "batch_size": work["batch"], "updates": work["warmup"] + work["updates"], "dtype": work["dtype"],
            "seed": work["seed"],
        },
        "evaluation": {"every": None},
        "checkpoint": {"every": None},
        "log": {"every": 1},
        "backend": arguments.backend,
        "output": output,
    }  # fmt: skip


def report(work: Mapping[str, Any], meter: Meter, arguments: argparse.Namespace) -> None:
    """Print the line of JSON that the peer benchmark reads."""
    rows, warmup = meter.rows, work["warmup"]
    padded = [row["tokens"] / (1 - row["padding_share"]) for row in rows]
    timed = sum(meter.seconds[warmup:])

    def total(values: list[float]) -> int:
        return round(sum(values))

    def per_second(values: list[float]) -> float:
        return round(sum(values[warmup:]) / timed, 2)

    real, supervised = [row["tokens"] for row in rows], [row["supervised_tokens"] for row in rows]
    result = {
        "runner": f"mlxlora-{arguments.backend}",
        "work": work["name"],
        "options": {"set": arguments.set, "threads": os.environ.get("OMP_NUM_THREADS")},
        "updates": len(rows),
        "warmup": warmup,
        "timed_seconds": round(timed, 4),
        "all_seconds": round(sum(meter.seconds), 4),
        "first_update_seconds": round(meter.first_update, 3),
        "loaded_seconds": round(meter.loaded, 3),
        "loaded_rss_mib": round(meter.loaded_rss, 1),
        "peak_rss_mib": round(peak_rss() / MIB, 1),
        "tokens": {"supervised": total(supervised), "real": total(real), "padded": total(padded)},
        "supervised_per_s": per_second(supervised),
        "real_per_s": per_second(real),
        "padded_per_s": per_second(padded),
        "all_real_per_s": round(sum(real) / sum(meter.seconds), 2),
        "padding_share": round(1 - sum(real) / sum(padded), 4),
        "losses": [round(row["loss"], 6) for row in rows],
        "update_seconds": [round(seconds, 4) for seconds in meter.seconds],
        "matches_work": {
            "supervised": total(supervised) - work["counts"]["supervised"],
            "real": total(real) - work["counts"]["real"],
        },
        "versions": versions_of(PACKAGES),
        "machine": f"{platform.system()} {platform.machine()} {os.cpu_count()} cores",
    }
    if arguments.backend == "mlx":
        result["mlx_peak_mib"] = round(rows[-1]["peak_memory_bytes"] / MIB, 1)
    print("\n" + json.dumps(result), flush=True)


def rss() -> int:
    """Return the resident size in bytes."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_rss()


def peak_rss() -> int:
    """Return the largest resident size so far in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main()
