"""What checkpoints cost a run: seconds of one save beside seconds of one update, and their share at `checkpoint.every`.

    python benchmarks/checkpoints.py --model MODEL --data DATA --backend mlx [--updates 40] [--set KEY=VALUE ...]

A real run with the defaults but for the number of updates and a save every fourth one; every update is read before the
next begins, so that its time is its own. A save is all of it: values taken from the device and checked, metrics synced,
files written, hashed and synced. Medians; the first four updates are left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import heading, write

from shared.config import CheckpointConfig
from shared.config_file import build_config
from shared.jobs.train import train
from shared.running import record
from shared.running.run import Run

EVERY = 4
BOUND = 0.01  # of a run's time, at the default interval


class Meter:
    """Takes the time of every update and every save."""

    def __init__(self) -> None:
        self.updates: list[float] = []
        self.saves: list[float] = []
        self.bytes = 0
        self.last = time.perf_counter()

    def on_step(self, row: Mapping[str, Any]) -> None:
        """Note how long an update took."""
        self.updates.append(time.perf_counter() - self.last)
        self.last = time.perf_counter()

    def save(self, run: Run) -> None:
        """Save as the loop does, and take its time, which is no update's."""
        began = time.perf_counter()
        checkpoint(run)
        self.saves.append(time.perf_counter() - began)
        self.last = time.perf_counter()
        folder = run.folder / f"checkpoints/step-{run.state.step:06d}"
        self.bytes = sum(file.stat().st_size for file in folder.iterdir())


checkpoint = record.checkpoint


def main() -> None:
    """Train, print the share and the JSON, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--backend", choices=("mlx", "torch"), required=True)
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--set", action="append", default=[], help="further settings, as of `mlxlora train`")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    meter = Meter()
    record.checkpoint = meter.save
    with tempfile.TemporaryDirectory() as folder:
        values = {
            "model": str(arguments.model), "data": {"path": str(arguments.data)}, "output": f"{folder}/run",
            "train": {"updates": arguments.updates}, "log": {"every": 1}, "checkpoint": {"every": EVERY},
            "evaluation": {"every": None}, "backend": arguments.backend,
        }  # fmt: skip
        train(build_config(values, overrides=arguments.set), callbacks=[meter])
    update_s, save_s = statistics.median(meter.updates[EVERY:]), statistics.median(meter.saves)
    every = CheckpointConfig().every or 0
    share = save_s / (every * update_s)
    print(
        f"{arguments.backend}: a save takes {1000 * save_s:.1f} ms ({meter.bytes:,} bytes), an update "
        f"{1000 * update_s:.0f} ms: {share:.3%} of a run with checkpoint.every {every}, "
        f"{'within' if share < BOUND else 'ABOVE'} {BOUND:.0%}"
    )
    found = {"save_s": save_s, "saves": len(meter.saves), "update_s": update_s, "bytes": meter.bytes, "share": share}
    result = {**heading([arguments.backend]), "every": every, "set": arguments.set, **found}
    write(arguments.output, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
