"""One measurement in a process of its own, so that nothing else is in its memory: ceilings, or some real updates.

`python -m shared.measuring.measure` reads a task as JSON from standard input; the last line of stdout is its result.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shared import errors
from shared.adapters.spec import first_values, resolve
from shared.ceilings import Ceilings, measure_ceilings
from shared.config import RunConfig
from shared.config_file import build_config
from shared.data.batch import Plan, update_batches
from shared.data.layout import Layout, training_layout
from shared.errors import CapabilityError, MlxloraError, OutOfMemory
from shared.estimate.report import decide_run
from shared.folder import open_folder
from shared.loop import build_update
from shared.measuring.synthetic import make_rows
from shared.optimizers import method_of
from shared.protocols import Backend, Model, Trainer
from shared.registry import find_backend
from shared.schemes import parse_scheme
from shared.types import Example, Recompute


@dataclass(frozen=True)
class Updates:
    """What some updates took: of the same rows each time, the first one apart (it compiles)."""

    tokens: int  # of one update, padding not counted
    supervised_tokens: int
    positions: int  # padding counted
    micro_batches: int
    first_s: float
    times_s: tuple[float, ...]
    cpu_s: tuple[float, ...]  # processor time of this process, all threads together
    loaded_memory_bytes: int  # before the first update
    peak_memory_bytes: int
    recompute: Recompute
    loss: float


@dataclass(frozen=True)
class Loaded:
    """A model ready to be trained, as `train` would have it."""

    model: Model
    trainer: Trainer
    layout: Layout
    recompute: Recompute


@dataclass(frozen=True)
class Effort:
    """How long to go on: at least `least` updates after the first, then until the time is over or at most `most`."""

    least: int
    most: int
    time_s: float


def recipe(folder: str, *, rank: int, quantization: str, dtype: str, recompute: Any, rows: int) -> RunConfig:
    """Return the config of a measurement: what `train` would do with these settings, its defaults for the rest."""
    return build_config(
        {
            "model": folder, "data": {"path": folder}, "quantization": quantization, "adapter": {"rank": rank},
            "train": {"dtype": dtype, "recompute": recompute, "batch_size": rows},
        }
    )  # fmt: skip


def load(backend: Backend, config: RunConfig, rows: Sequence[Example]) -> Loaded:
    """Return a model with its adapter, its trainer, and the settings that `train` would choose for these rows."""
    base = open_folder(Path(config.model))
    chosen = decide_run(config, base, rows, backend=backend)
    model = backend.load_model(
        base.path, dtype=config.train.dtype, quantization=parse_scheme(config.quantization), recompute=chosen.recompute,
        device=None,
    )  # fmt: skip
    spec = resolve(config.adapter, model.info)
    model.attach(spec)
    model.load_tensors("adapter", first_values(spec, model, seed=config.train.seed))
    layout = training_layout(config, model.info, rows, micro_tokens=chosen.micro_tokens)
    trainer = backend.trainer(model, objective="sft", optimizer=method_of(config), shapes=layout.shapes)
    return Loaded(model, trainer, layout, chosen.recompute)


def measure_updates(backend: Backend, config: RunConfig, rows: Sequence[Example], effort: Effort) -> Updates:
    """Return what updates of all these rows take; the order of the rows differs, the lengths are the same."""
    found = load(backend, config, rows)
    trainer, loaded = found.trainer, found.trainer.memory().active
    plan = Plan(len(rows), len(rows), config.train.seed)
    times: list[float] = []
    cpu: list[float] = []
    began, loss, micro = time.perf_counter(), 0.0, []
    while len(times) <= effort.least or (len(times) <= effort.most and time.perf_counter() - began < effort.time_s):
        wall, process = time.perf_counter(), time.process_time()
        micro = update_batches(rows, plan, len(times) + 1, found.layout)
        update = build_update(config, len(times) + 1, lr=config.optimizer.lr)
        loss = trainer.step(micro, update).result().loss
        times.append(time.perf_counter() - wall)
        cpu.append(time.process_time() - process)
        began = time.perf_counter() if len(times) == 1 else began
    return Updates(
        tokens=sum(batch.num_tokens for batch in micro),
        supervised_tokens=sum(batch.num_supervised for batch in micro),
        positions=sum(batch.tokens_BT.size for batch in micro),
        micro_batches=len(micro), first_s=times[0], times_s=tuple(times[1:]), cpu_s=tuple(cpu[1:]),
        loaded_memory_bytes=loaded, peak_memory_bytes=trainer.memory().peak, recompute=found.recompute, loss=loss,
    )  # fmt: skip


def ask_ceilings(backend: str) -> Ceilings:
    """Return a backend's ceilings, measured in a process of its own."""
    return Ceilings(**ask({"task": "ceilings", "backend": backend}))


def ask_updates(backend: str, *, config: Mapping[str, Any], rows: Mapping[str, Any], effort: Effort) -> Updates:
    """Return what updates take in a process of its own; config: of `recipe`, rows: of `make_rows`."""
    task = {"task": "updates", "backend": backend, "config": config, "rows": rows, "effort": asdict(effort)}
    found = ask(task)
    return Updates(**{**found, "times_s": tuple(found["times_s"]), "cpu_s": tuple(found["cpu_s"])})


def ask(task: Mapping[str, Any]) -> dict[str, Any]:
    """Return the answer to a task; raises what the other process raised."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "shared.measuring.measure"], input=json.dumps(task), capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    lines = done.stdout.rstrip("\n").splitlines()
    if done.returncode or not lines:
        raise ended(task, done.returncode, done.stderr)
    answer = json.loads(lines[-1])
    if "error" in answer:
        kind = getattr(errors, answer.pop("error"), MlxloraError)
        raise kind(answer.pop("what"), **answer)
    return answer


def ended(task: Mapping[str, Any], code: int, said: str) -> Exception:
    """Return the error for a process that gave no answer."""
    if code in (-signal.SIGKILL, -signal.SIGABRT):  # the system, or an allocator, ended it
        name = signal.Signals(-code).name
        return OutOfMemory(f"the measurement on {task['backend']} was ended by {name}", fix="take a smaller --size")
    return RuntimeError(f"the measurement on {task['backend']} ended with code {code}:\n{said}")


def answer(task: Mapping[str, Any]) -> dict[str, Any]:
    """Return the result of a task, or the error it met, as JSON has it."""
    try:
        backend = find_backend(task["backend"])
        if task["task"] == "ceilings":
            return asdict(measure_ceilings(backend))
        rows = make_rows(**task["rows"])
        config = recipe(**task["config"], rows=len(rows))
        return asdict(measure_updates(backend, config, rows, Effort(**task["effort"])))
    except MlxloraError as error:
        return {"error": type(error).__name__, **vars(error)}
    except ImportError as error:
        return {"error": CapabilityError.__name__, "what": str(error), "code": "E401", "fix": "mlxlora doctor"}


if __name__ == "__main__":
    print("\n" + json.dumps(answer(json.load(sys.stdin))), flush=True)
