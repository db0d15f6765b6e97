"""Kills training with SIGKILL at random moments and inside saves, resumes it, and compares what comes out, bit by bit.

    python benchmarks/kill9.py --backend mlx --kills 1000 [--seed 0] [--output results/FILE.json]

A run is killed again and again until it ends; then its weights must be those of a run that nobody killed, byte by
byte, and its metrics must have every step once. Then the next run begins, until enough kills have hit. One kill in
three comes from a fault point inside a save or the export (`MLXLORA_FAULT`), the others come from outside when the
process has used a random share of the CPU time that a whole run takes. Each try is the command line in a process of
its own, forked from one that has imported the frameworks and done nothing else: a kill costs a fraction of a second.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from common import heading, write

from shared import faults
from shared.callbacks import Metrics
from shared.measuring.synthetic import Shape, write_llama
from shared.registry import find_backend

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "mlxlora/demo"
IMPORTS = {
    "mlx": ("mlxlora.backend", "mlxlora.loading", "mlxlora.trainer", "mlx_lm.models.llama"),
    "torch": ("torch_backend.backend", "torch_backend.loading", "torch_backend.trainer",
              "transformers.models.llama.modeling_llama"),
}  # fmt: skip
POINTS = (
    "checkpoint.begin", "checkpoint.before_sync", "checkpoint.before_marker", "folder.before_rename",
    "checkpoint.before_prune", "checkpoint.trashed", "result.before_rename",
)  # fmt: skip
EVERY = 3  # every third kill is inside a save
UPDATES = 8
SETTINGS = (
    f"train.updates={UPDATES}", "train.batch_size=4", "train.dtype=float32", "train.micro_tokens=128",
    "adapter.rank=2", "adapter.dropout=0.2", "optimizer.lr=3e-3", "checkpoint.every=1", "evaluation.every=3",
    "log.every=1", "data.max_length=48",
)  # fmt: skip
COMPARED = ("step", "loss", "lr", "grad_norm", "tokens", "supervised_tokens", "padding_share", "eval_loss")
PATIENCE_S = 600.0  # wall time of one try; the machine may be busy


@dataclass
class Tally:
    """What has happened so far."""

    kills: int = 0
    inside_a_save: int = 0  # at a fault point, or from outside with a staged folder left behind
    points: dict[str, int] = field(default_factory=dict)
    left_behind: dict[str, int] = field(default_factory=dict)  # kinds of strays, which the next try has to sweep
    runs: int = 0
    identical: int = 0
    failures: list[str] = field(default_factory=list)


def main() -> None:
    """Kill, resume, compare; print and write the result; exit code 1 where a single one differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=tuple(IMPORTS), required=True)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=None, help="begin no further run after so long")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    find_backend(arguments.backend)
    for name in ("mlxlora.cli.main", "shared.jobs.train", "transformers", *IMPORTS[arguments.backend]):
        importlib.import_module(name)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        tally = campaign(arguments, Path(folder), began=began)
    ok = not tally.failures and tally.identical == tally.runs and tally.kills >= arguments.kills
    print(
        f"{arguments.backend}: {tally.kills} kills, {tally.inside_a_save} of them inside a save; "
        f"{tally.identical} of {tally.runs} runs ended bit-identical with complete metrics"
    )
    wall_s = round(time.monotonic() - began, 1)
    result = {**heading([arguments.backend]), "asked": arguments.kills, "ok": ok, "wall_s": wall_s, **asdict(tally)}
    write(arguments.output, result)
    print(json.dumps(result))
    sys.exit(0 if ok else 1)


def prepare(folder: Path) -> None:
    """Write the smallest model there is, with the demo's tokenizer, and a few rows of the demo task."""
    write_llama(folder / "base", Shape(1, 32, 64, 2, 1, 640, True), positions=256, seed=0)
    for file in (DEMO / "base").glob("tokenizer*"):
        shutil.copy(file, folder / "base")
    for name, count in (("train", 12), ("valid", 2)):
        lines = (DEMO / "task" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:count]), encoding="utf-8")


def campaign(arguments: argparse.Namespace, folder: Path, *, began: float) -> Tally:
    """Kill run after run until enough kills have hit."""
    tally, dice = Tally(), random.Random(arguments.seed)
    attempt = maker(arguments.backend, folder)
    for name in ("whole", "again"):  # the second has warm caches, as the tries have
        whole_s = attempt(folder / name, fault=None, limit_s=None)[1]
    wanted = outcome(folder / "whole")
    if outcome(folder / "again") != wanted:
        tally.failures.append("two runs that nobody killed differ")
    while tally.kills < arguments.kills and not tally.failures:
        if arguments.minutes and time.monotonic() - began > 60 * arguments.minutes:
            break
        run = folder / f"run{tally.runs}"
        kill_until_done(run, attempt, tally, dice, whole_s=whole_s, most=arguments.kills)
        tally.runs += 1
        found = {} if tally.failures else outcome(run)
        different = [name for name in wanted if found and found[name] != wanted[name]]
        tally.identical += bool(found) and not different
        if different:
            tally.failures.append(f"{run.name}, {tally.kills} kills: {different} differ: {found['metrics']}")
    return tally


def maker(backend: str, folder: Path) -> Callable[..., tuple[int, float]]:
    """Return a function that tries a run once: its exit code, negative for a signal, and CPU seconds it took."""
    words = ["train", "--model", str(folder / "base"), "--data", str(folder), "--backend", backend]
    words += [part for value in SETTINGS for part in ("--set", value)]

    def attempt(run: Path, *, fault: str | None, limit_s: float | None) -> tuple[int, float]:
        pid = os.fork()
        if pid == 0:
            child([*words, "--output", str(run)], fault=fault, log=folder / "log")
        return watch(pid, limit_s=limit_s)

    return attempt


def child(words: list[str], *, fault: str | None, log: Path) -> None:
    """Be the command line, with its output in a file; never returns."""
    if fault:
        os.environ[faults.VARIABLE] = fault
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = 1
    try:
        code = importlib.import_module("mlxlora.cli.main").run(words)
    finally:
        os._exit(code)


def watch(pid: int, *, limit_s: float | None) -> tuple[int, float]:
    """Wait for a process, and kill it when it has used so much CPU time; return its exit code and CPU seconds."""
    process, deadline = psutil.Process(pid), time.monotonic() + PATIENCE_S
    while True:
        ended, status, used = os.wait4(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime
        times = process.cpu_times()
        if time.monotonic() > deadline or (limit_s is not None and times.user + times.system >= limit_s):
            os.kill(pid, signal.SIGKILL)
            limit_s = None
        time.sleep(0.002)


def kill_until_done(
    run: Path,
    attempt: Callable[..., tuple[int, float]],
    tally: Tally,
    dice: random.Random,
    *,
    whole_s: float,
    most: int,
) -> None:
    """Try a run until it ends, killing it on the way."""
    while True:
        point, limit_s = None, None
        if tally.kills < most and tally.kills % EVERY == 0:
            # the least tried point first: those that come late in a run are reached by few tries
            point = min(POINTS, key=lambda name: (tally.points.get(name, 0), dice.random()))
        elif tally.kills < most:
            limit_s = dice.uniform(0, whole_s)
        nth = dice.randint(1, 2) if point and point.startswith("checkpoint") else 1
        code, _ = attempt(run, fault=f"{point}:{nth}" if point else None, limit_s=limit_s)
        if code == 0:
            return
        if code != -signal.SIGKILL:
            tally.failures.append(
                f"{run.name} after {tally.kills} kills: exit code {code}: {(run.parent / 'log').read_text()}"
            )
            return
        note(run, tally, point)


def note(run: Path, tally: Tally, point: str | None) -> None:
    """Count a kill, and what it left behind."""
    strays = [path.name for folder in (run, run / "checkpoints") if folder.is_dir() for path in folder.glob(".*")]
    kinds = {kind for kind in (".tmp-", ".trash-", ".old-", ".adapter.tmp") for name in strays if kind in name}
    tally.kills += 1
    tally.inside_a_save += point is not None or bool(kinds)
    for counts, name in [(tally.points, point or "anywhere"), *((tally.left_behind, kind) for kind in kinds)]:
        counts[name] = counts.get(name, 0) + 1


def outcome(run: Path) -> dict[str, Any]:
    """Return what must be equal: the weights' bytes and the metrics but for times."""
    found = Metrics(run / "metrics.jsonl").read()
    return {
        "weights": (run / "adapter/adapter_model.safetensors").read_bytes(),
        "metrics": [{key: row[key] for key in COMPARED if key in row} for row in found],
        "strays": [path.name for path in (run / "checkpoints").glob(".*")],
    }


if __name__ == "__main__":
    main()
