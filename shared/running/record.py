"""What a run writes down: results that were pending, metrics, checkpoints."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

from shared import gradients
from shared.callbacks import tell
from shared.errors import DivergedError, StorageError
from shared.running.checkpoint import Checkpoint, save
from shared.running.recovery import judge, read, roll_back
from shared.running.run import Run
from shared.running.spikes import LAG, go_back, spike_limit
from shared.tensors import is_finite


def drain(run: Run, *, keep: int = 0) -> None:
    """Read the results that are still pending, but for the last `keep`; raises DivergedError after three without."""
    while len(run.pending) > keep:
        step, pending = run.pending[0]
        run.last = read(run, pending)
        run.pending.pop(0)
        judge(run, step=step, stats=run.last)


def max_loss(run: Run) -> float:
    """Return the loss above which the next update is skipped; go back to a checkpoint first, where a spike asks."""
    if run.config.train.spikes in ("ignore", "warn"):
        return math.inf
    drain(run, keep=LAG)
    if run.state.spike_step and run.state.step >= run.state.spike_step + LAG:
        drain(run)
        go_back(run)
    known = run.state.losses
    return spike_limit(known[: len(known) - LAG + len(run.pending)])


def has_row(run: Run, step: int) -> bool:
    """Return whether an update gets a row of metrics."""
    return step % run.config.log.every == 0 or step == run.updates


def wants_norms(run: Run, step: int) -> bool:
    """Return whether an update's row is to hold norms by module: each row, or the first of every so many updates."""
    log = run.config.log
    every = log.every if log.gradients is True else int(log.gradients)
    return every > 0 and has_row(run, step) and (step % every < log.every or step == run.updates)


def log(run: Run) -> None:
    """Write one row of metrics."""
    assert run.last is not None
    state, elapsed = run.state, run.trained_for()
    run.row_began += elapsed
    state.time_s += elapsed
    numbers = {"loss": run.last.loss, "lr": run.lr, "grad_norm": run.last.grad_norm}
    row = {
        "step": state.step,
        **{name: number for name, number in numbers.items() if math.isfinite(number)},  # JSON has no NaN
        "tokens": state.tokens,
        "supervised_tokens": state.supervised_tokens,
        "padding_share": 1 - state.tokens / state.positions,
        "tokens_per_s": state.tokens / elapsed,
        "peak_memory_bytes": run.trainer.memory().peak,
        "time_s": state.time_s,
        **({"skipped_updates": state.skipped} if state.skipped else {}),
        **({gradients.KEY: gradients.rounded(run.last.norms)} if run.last.norms else {}),
        **({"overflows": state.overflows} if run.config.train.dtype == "float16" else {}),
    }
    state.tokens = state.supervised_tokens = state.positions = 0
    write(run, row)
    tell(
        run.callbacks,
        "on_step",
        {**row, "updates": run.updates, "next_save": next_save(run), "still_s": run.stop.still_s},
    )


def next_save(run: Run) -> int:
    """Return the update behind which a checkpoint is saved next; the end is always saved."""
    every = run.config.checkpoint.every or run.updates
    return min((run.state.step // every + 1) * every, run.updates)


def write(run: Run, row: dict[str, Any]) -> None:
    """Write a row of metrics; where the disk refuses, say so once: the row waits, and checkpoints wait for it."""
    first = not run.metrics.waiting
    try:
        run.metrics.write(row)
    except StorageError as error:
        if first:
            tell(run.callbacks, "on_note", f"{error.what}; training goes on and tries again at the next row")


def checkpoint(run: Run) -> None:
    """Save everything a resume needs; refuses to commit values that are not finite."""
    drain(run)
    adapter, optimizer = dict(run.model.tensors("adapter")), dict(run.trainer.state())
    broken = [name for name, tensor in (adapter | optimizer).items() if not is_finite(tensor)]
    if broken:
        what = f'training diverged: "{broken[0]}" is no longer finite after update {run.state.step}'
        raise DivergedError(what, fix=roll_back(run, run.state.step - 1))
    run.metrics.flush(durable=True)  # no checkpoint is ahead of its metrics, not even after a power cut
    time_s = run.state.time_s + run.trained_for()
    state: dict[str, Any] = {
        "loop": asdict(replace(run.state, time_s=time_s)),
        "identity": run.identity,
        "maker": run.maker,
    }
    if run.config.evaluation.keeps_best and run.state.best_step >= 0:
        state["needs"] = [run.state.best_step]
    found = Checkpoint(run.state.step, adapter, optimizer, state)
    save(run.folder / "checkpoints", found, keep=run.config.checkpoint.keep)


def save_or_go_on(run: Run) -> None:
    """Save; where the disk refuses, say so and train on: the next interval tries again."""
    try:
        checkpoint(run)
    except StorageError as error:
        again = f"training goes on and tries again at update {run.state.step + (run.config.checkpoint.every or 0)}"
        tell(run.callbacks, "on_note", f"{error.what}; {again}")
