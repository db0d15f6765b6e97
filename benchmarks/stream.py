"""Training on a file larger than memory: how much memory that takes, how long the first update waits, and a kill.

    python benchmarks/stream.py --model MODEL [--gigabytes 10] [--updates 30] [--backends torch mlx] [--output FILE]

Writes a file of rows of 0.5 to 4 KB into a temporary folder, and removes it. Each backend trains on it
(`data.streaming: auto`), and on its first rows alone in memory: the difference of the two processes' peaks (VmHWM) is
what the file's size adds. The first backend makes the index, the others find it. Then the same run is ended by SIGKILL
in the middle and started again; its adapter has to be that of the run without a break, byte for byte.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import heading, write

from shared.config_file import build_config
from shared.jobs.train import train

WORDS = "the little big old red dog cat girl boy bird tree house saw went found lost liked made in on to with and"
POOL = 5000  # texts that rows are put together from
FEW = 2000  # rows of the file in memory
BOUND = 500e6  # bytes that the file may add


class Clock:
    """Prints a line of JSON when the run starts, after every update, and at its end."""

    def __init__(self) -> None:
        self.began = time.perf_counter()

    def say(self, **facts: Any) -> None:
        """Print facts with seconds since the command and the process's peak."""
        status = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
        facts |= {"s": round(time.perf_counter() - self.began, 2), "peak_bytes": int(status) * 1024}
        print(json.dumps(facts), flush=True)

    def on_start(self, facts: Mapping[str, Any]) -> None:
        """Say how many rows there are."""
        self.say(at="start", rows=facts["rows"]["train"], streamed=facts.get("streamed", False))

    def on_update(self, step: int) -> None:
        """Say which update is done."""
        self.say(at="update", step=step)


def write_rows(file: Path, size: float) -> None:
    """Write distinct rows until the file has so many bytes."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS.split(), k=draw.randint(50, 400))) for _ in range(POOL)]
    written = number = 0
    with file.open("w", buffering=2**22) as out:
        while written < size:
            first, second = draw.randrange(POOL), draw.randrange(POOL)
            row = f'{{"prompt": "Row {number}: {texts[first]}", "completion": " {texts[second]}"}}\n'
            written += out.write(row)
            number += 1


def start(values: dict[str, Any], folder: Path) -> subprocess.Popen[str]:
    """Start a run in a process of its own, with an empty cache that the runs of this benchmark share."""
    command = [sys.executable, __file__, "--child", json.dumps(values)]
    environment = {**os.environ, "MLXLORA_CACHE": str(folder / "cache")}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def follow(process: subprocess.Popen[str], *, kill_at: int | None = None) -> dict[str, Any]:
    """Return what a run says, killed after an update where asked."""
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        if line.startswith("{"):
            said.append(json.loads(line))
            if kill_at is not None and said[-1].get("step") == kill_at:
                process.send_signal(signal.SIGKILL)
    code = process.wait()
    assert code == (0 if kill_at is None else -signal.SIGKILL), f"the run ended with {code}"
    updates = [one for one in said if one["at"] == "update"]
    return {
        "rows": said[0]["rows"], "streamed": said[0]["streamed"], "ready_s": said[0]["s"],
        "first_update_s": updates[0]["s"], "first_step": updates[0]["step"], "updates": len(updates),
        "peak_bytes": said[-1]["peak_bytes"],
    }  # fmt: skip


def measure(backend: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the figures of one backend: in memory, streamed, and streamed with a kill in the middle."""

    def values(data: str, output: str) -> dict[str, Any]:
        return {
            "model": str(arguments.model), "data": {"path": str(folder / data), "max_length": 512}, "backend": backend,
            "train": {"updates": arguments.updates, "dtype": "float32", "micro_tokens": 2048},
            "checkpoint": {"every": 5}, "log": {"every": 1}, "evaluation": {"every": None},
            "output": str(folder / f"{backend}-{output}"),
        }  # fmt: skip

    few = follow(start(values("few.jsonl", "few"), folder))
    whole = follow(start(values("rows.jsonl", "whole"), folder))
    middle = arguments.updates // 2 + 2
    killed = follow(start(values("rows.jsonl", "killed"), folder), kill_at=middle)
    resumed = follow(start(values("rows.jsonl", "killed"), folder))
    adapters = [folder / f"{backend}-{name}/adapter/adapter_model.safetensors" for name in ("whole", "killed")]
    same = adapters[0].read_bytes() == adapters[1].read_bytes()
    metrics = (folder / f"{backend}-whole/metrics.jsonl").read_text().splitlines()
    added = whole["peak_bytes"] - few["peak_bytes"]
    print(
        f"{backend}: {whole['rows']:,} rows, ready after {whole['ready_s']:.0f} s, first update "
        f"{whole['first_update_s']:.0f} s; {added / 1e6:.0f} MB more than {few['rows']} rows in memory; killed after "
        f"update {killed['updates']}, went on with {resumed['first_step']}: {'same bytes' if same else 'DIFFERENT'}",
        flush=True,
    )
    return {
        "in_memory": few, "streamed": whole, "killed": killed, "resumed": resumed, "added_bytes": added,
        "within_bound": added < BOUND, "same_bytes_after_kill": same,
        "losses": [json.loads(line)["loss"] for line in metrics if '"loss"' in line],
    }  # fmt: skip


def main() -> None:
    """Write the file, measure every backend, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--gigabytes", type=float, default=10)
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--backends", nargs="+", default=["torch", "mlx"])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        clock = Clock()
        train(build_config(arguments.child), callbacks=[clock])
        clock.say(at="end")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "rows.jsonl", arguments.gigabytes * 1e9)
        with (folder / "rows.jsonl").open() as rows:
            (folder / "few.jsonl").write_text("".join(next(rows) for _ in range(FEW)))
        found = {backend: measure(backend, arguments, folder) for backend in arguments.backends}
        sizes = {"file_bytes": (folder / "rows.jsonl").stat().st_size}
        sizes["index_bytes"] = sum(file.stat().st_size for file in (folder / "cache/rows").iterdir())
    curves = [one["losses"] for one in found.values()]
    gap = max(max(abs(a - b) / abs(a) for a, b in zip(curves[0], curve, strict=True)) for curve in curves)
    print(f"largest gap of the losses between backends, relative: {gap:.1e}")
    result = {**heading(arguments.backends), **sizes, "bound_bytes": BOUND, "largest_loss_gap": gap, "runs": found}
    write(arguments.output, result)


if __name__ == "__main__":
    main()
