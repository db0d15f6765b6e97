"""mlxlora beside other trainers on the same work: runs them in turns and prints every target with what was reached.

    python benchmarks/peers.py --peers FOLDER --models MODELS --data DATA --python PEERS_PYTHON --runs 3

FOLDER holds a peer benchmark: compare.py, work.py and works/*.json. It runs in its own environment (PEERS_PYTHON), ours
in this one, each run in a process of its own. Ratios are of medians in this one session; "memory" is MLX's own peak, or
the process's peak over what it was when the model was loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OURS = ("ours-mlx", "ours-torch")
Results = Mapping[str, Sequence[Mapping[str, Any]]]  # runner -> its runs


@dataclass(frozen=True)
class Target:
    """A figure of ours over a peer's (None: the figure itself), and the bound it has to keep."""

    work: str
    ours: str
    peer: str | None
    key: str
    bound: float
    at_least: bool

    @property
    def wanted(self) -> str:
        """Return the target in words."""
        unit = f" x {self.peer}" if self.peer else " s"
        return f"{'>=' if self.at_least else '<='} {self.bound}{unit}"


SPEED, MLX_PEAK, OVER_LOADED, FIRST = "real_per_s", "mlx_peak_mib", "train_rss_mib", "first_update_seconds"
TABLE: list[tuple[str, str, str, bool, dict[str, float]]] = [  # work, ours, figure, at least?, bound by peer
    ("mixed", "ours-mlx", SPEED, True, {"mlx-lm": 3.0, "unsloth-mlx": 2.0}),
    ("mixed", "ours-torch", SPEED, True, {"peft-hf": 2.5, "peft-hf-grouped": 1.6}),
    ("mixed", "ours-mlx", MLX_PEAK, False, {"mlx-lm": 0.2, "unsloth-mlx": 0.6}),
    ("mixed", "ours-torch", OVER_LOADED, False, {"peft-hf": 0.3, "trl-packing": 0.5}),
    ("uniform", "ours-mlx", SPEED, True, {"mlx-lm": 1.8, "unsloth-mlx": 1.8}),
    ("uniform", "ours-torch", SPEED, True, {"peft-hf": 1.25}),
    ("uniform", "ours-mlx", MLX_PEAK, False, {"mlx-lm": 0.3, "unsloth-mlx": 0.8}),
    ("uniform", "ours-torch", OVER_LOADED, False, {"peft-hf": 0.35}),
    ("bigvocab", "ours-mlx", SPEED, True, {"mlx-lm": 1.8}),
    ("bigvocab", "ours-torch", SPEED, True, {"peft-hf": 1.2}),
    ("bigvocab", "ours-mlx", MLX_PEAK, False, {"mlx-lm": 0.15, "unsloth-mlx": 0.4}),
    ("bigvocab", "ours-torch", OVER_LOADED, False, {"peft-hf": 0.12, "trl": 0.2}),
    ("real", "ours-mlx", SPEED, True, {"mlx-lm": 2.5}),
    ("real", "ours-torch", SPEED, True, {"peft-hf": 1.5}),
    ("qlora", "ours-mlx", SPEED, True, {"mlx-lm": 20}),
    ("qlora", "ours-torch", SPEED, True, {"peft-hf": 1.3}),
    ("qlora", "ours-mlx", MLX_PEAK, False, {"mlx-lm": 0.6}),
    ("qlora", "ours-torch", OVER_LOADED, False, {"peft-hf": 0.6}),
    ("mixed", "ours-mlx", FIRST, False, {"": 3.3}),
    ("mixed", "ours-torch", FIRST, False, {"": 3.5}),
]
TARGETS = [
    Target(work, ours, peer or None, key, bound, at_least)
    for work, ours, key, at_least, bounds in TABLE
    for peer, bound in bounds.items()
]


def main() -> None:
    """Run what is asked for, and print the table."""
    arguments = parse()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for work in arguments.works:
        if not arguments.report_only:
            run(arguments, work)
    results = {file.stem: json.loads(file.read_text())["results"] for file in sorted(arguments.out.glob("*.json"))}
    rows = [judge(target, results.get(target.work, {})) for target in TARGETS if target.work in results]
    print(table(rows))
    if arguments.output:
        note = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": platform.platform()}
        details = {
            work: {name: [brief(run) for run in runs] for name, runs in found.items()}
            for work, found in results.items()
        }
        arguments.output.write_text(
            json.dumps({**note, "works": arguments.works, "targets": rows, "runs": details}, indent=1)
        )


def parse() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True, help="folder of the peer benchmark")
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--python", default=sys.executable, help="Python of the peers' environment")
    parser.add_argument("--works", nargs="*", default=["mixed", "uniform", "bigvocab", "real", "qlora"])
    parser.add_argument("--without", nargs="*", default=[], help="peers to leave out")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one run")
    parser.add_argument("--cache", type=Path, default=Path("runs/peers/cache"), help="prepared works")
    parser.add_argument("--out", type=Path, default=Path("runs/peers/results"), help="folder for every run's JSON")
    parser.add_argument("--output", type=Path, help="file for targets and runs together")
    parser.add_argument("--report-only", action="store_true", help="of the results in --out")
    return parser.parse_args()


def run(arguments: argparse.Namespace, work: str) -> None:
    """Run one work's trainers in turns."""
    named = dict.fromkeys(target.peer for target in TARGETS if target.work == work and target.peer)
    peers = [peer for peer in named if peer not in arguments.without]
    ours = [
        f"{name}={sys.executable} {ROOT / 'benchmarks/run_ours.py'} {{prepared}} --backend {name.removeprefix('ours-')}"
        for name in OURS
    ]
    command = [
        arguments.python, str(arguments.peers / "compare.py"), str(arguments.peers / "works" / f"{work}.json"),
        "--runs", str(arguments.runs), "--timeout", str(arguments.timeout), "--peers", *peers,
        "--models", str(arguments.models.resolve()), "--data", str(arguments.data.resolve()),
        "--cache", str(arguments.cache.resolve()), "--out", str(arguments.out.resolve()),
        *(word for extra in ours for word in ("--extra", extra)),
    ]  # fmt: skip
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def judge(target: Target, results: Results) -> dict[str, Any]:
    """Return a target with what was reached."""
    ours = median(results.get(target.ours, []), target.key)
    theirs = median(results.get(target.peer, []), target.key) if target.peer else 1.0
    ratio = None if ours is None or not theirs else ours / theirs
    reached = None if ratio is None else (ratio >= target.bound if target.at_least else ratio <= target.bound)
    return {
        "work": target.work, "ours": target.ours, "figure": target.key, "target": target.wanted,
        "found": None if ratio is None else round(ratio, 3), "value": ours, "peer_value": theirs, "reached": reached,
    }  # fmt: skip


def median(runs: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """Return the median of a figure over the runs that have it."""
    values = [found[key] for found in runs if found.get(key) is not None]
    return statistics.median(values) if values else None


def brief(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run without its curves."""
    return {key: value for key, value in found.items() if key not in ("losses", "update_seconds")}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the targets as Markdown."""
    lines = ["| work | ours | figure | target | found | ours, absolute | |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        mark = {True: "reached", False: "**short**", None: "not run"}[row["reached"]]
        cells = [row["work"], row["ours"], row["figure"], row["target"], row["found"], row["value"], mark]
        lines.append("| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
