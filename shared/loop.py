"""The only training loop: choose rows, cut, step, log, evaluate, save. No framework in sight.

Everything that decides the result is a pure function of (config, step); what a resume needs beyond the
tensors is `LoopState`.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from shared.callbacks import Callback, Metrics, tell
from shared.checkpoint import Checkpoint, save
from shared.config import RunConfig
from shared.data.batch import Plan, halve, update_batches
from shared.errors import DivergedError, Interrupted, OutOfMemory, StorageError
from shared.evaluate import evaluate_examples
from shared.protocols import Model, Pending, Trainer
from shared.schedules import build_schedule
from shared.signals import stop_signals
from shared.tensors import is_finite
from shared.types import AdapterSpec, Batch, Example, StepStats, Update

MAX_SKIPPED = 3


@dataclass
class LoopState:
    """Where a run stands, as state.json keeps it."""

    step: int = 0
    time_s: float = 0.0
    evaluated_step: int = -1
    best_loss: float | None = None
    evaluations_without_better: int = 0
    skipped_in_a_row: int = 0
    skipped: int = 0
    tokens: int = 0  # these three: since the last logged row
    supervised_tokens: int = 0
    positions: int = 0


@dataclass
class Run:
    """All that the loop works with."""

    config: RunConfig
    folder: Path
    model: Model
    trainer: Trainer
    spec: AdapterSpec
    train: Sequence[Example]
    valid: Sequence[Example]
    plan: Plan
    updates: int
    micro_tokens: int
    identity: dict[str, Any]  # what a resume must find unchanged
    callbacks: Sequence[Callback] = ()
    state: LoopState = field(default_factory=LoopState)
    pending: list[tuple[int, Pending[StepStats]]] = field(default_factory=list)
    last: StepStats | None = None
    row_began: float = 0.0

    @property
    def metrics(self) -> Metrics:
        """Return the run's metrics file."""
        return Metrics(self.folder / "metrics.jsonl")


def fit(run: Run) -> None:
    """Train from `run.state.step` to the end; raises Interrupted (after saving) when a signal asks to stop."""
    schedule = build_schedule(run.config.schedule, lr=run.config.optimizer.lr, updates=run.updates)
    with stop_signals() as stop:
        run.row_began = time.perf_counter()
        if is_due(run, run.config.evaluation.every) or run.state.step == 0:
            evaluate(run)
        while run.state.step < run.updates and not stopped_early(run):
            do_update(run, schedule)
            if stop.number:
                drain(run)
                checkpoint(run)
                raise interrupted(stop.number, run)
            if is_due(run, run.config.evaluation.every):
                evaluate(run)
            if is_due(run, run.config.checkpoint.every) and run.state.step < run.updates:
                save_or_go_on(run)
        drain(run)
        if run.config.evaluation.every:
            evaluate(run)
        checkpoint(run)


def is_due(run: Run, every: int | None) -> bool:
    """Return whether something that happens every so many updates happens now."""
    return every is not None and run.state.step > 0 and run.state.step % every == 0


def do_update(run: Run, schedule: Callable[[int], float]) -> None:
    """Do the next update and log it where a row is due."""
    step = run.state.step + 1
    micro = update_batches(run.train, run.plan, step, micro_tokens=run.micro_tokens)
    update = build_update(run.config, step, lr=schedule(step))
    run.pending.append((step, step_or_split(run, micro, update)))
    state = run.state
    state.step = step
    state.tokens += sum(batch.num_tokens for batch in micro)
    state.supervised_tokens += sum(len(batch.targets_N) for batch in micro)
    state.positions += sum(batch.tokens_BT.size for batch in micro)
    if step % run.config.log.every == 0 or step == run.updates:
        drain(run)
        log(run, lr=update.lr)


def build_update(config: RunConfig, step: int, *, lr: float) -> Update:
    """Return every number of one update."""
    optimizer = config.optimizer
    return Update(
        step=step,
        seed=config.train.seed,
        lr=lr,
        beta1=optimizer.betas[0],
        beta2=optimizer.betas[1],
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.max_grad_norm,
        bias_correction=True,
    )


def step_or_split(run: Run, micro: list[Batch], update: Update) -> Pending[StepStats]:
    """Do one update; where memory runs out, do the same update in smaller pieces, from then on."""
    while True:
        try:
            return run.trainer.step(micro, update)
        except OutOfMemory:
            micro = halve(micro)
            run.micro_tokens = max(run.micro_tokens // 2, 1)
            tell(
                run.callbacks,
                "on_note",
                f"out of memory: micro-batches of at most {run.micro_tokens} tokens from here on",
            )


def drain(run: Run) -> None:
    """Read the results that are still pending; raises DivergedError after three skipped updates in a row."""
    for step, pending in run.pending:
        run.last = pending.result()
        run.state.skipped_in_a_row = run.state.skipped_in_a_row + 1 if run.last.skipped else 0
        if run.last.skipped:
            run.state.skipped += 1
            rows = ", ".join(run.train[row].source for row in run.plan.rows(step)[:4])
            tell(
                run.callbacks,
                "on_note",
                f"update {step} skipped: its loss or gradient is not finite (rows {rows}, ...)",
            )
        if run.state.skipped_in_a_row >= MAX_SKIPPED:
            raise DivergedError(
                f"training diverged: updates {step - MAX_SKIPPED + 1} to {step} had no finite loss or gradient",
                fix=f"lower optimizer.lr (now {run.config.optimizer.lr:g}); the last checkpoint is good",
            )
    run.pending.clear()


def log(run: Run, *, lr: float) -> None:
    """Write one row of metrics."""
    assert run.last is not None
    state, now = run.state, time.perf_counter()
    elapsed, run.row_began = now - run.row_began, now
    state.time_s += elapsed
    row = {
        "step": state.step,
        "loss": run.last.loss,
        "lr": lr,
        "grad_norm": run.last.grad_norm,
        "tokens": state.tokens,
        "supervised_tokens": state.supervised_tokens,
        "padding_share": 1 - state.tokens / state.positions,
        "tokens_per_s": state.tokens / elapsed,
        "peak_memory_bytes": run.trainer.memory().peak,
        "time_s": state.time_s,
    }
    state.tokens = state.supervised_tokens = state.positions = 0
    run.metrics.write(row)
    tell(run.callbacks, "on_step", {**row, "updates": run.updates})


def evaluate(run: Run) -> None:
    """Evaluate on the validation rows, once per step; note whether the loss is the best so far."""
    if not run.valid or run.config.evaluation.every is None or run.state.evaluated_step == run.state.step:
        return
    began = time.perf_counter()
    loss = evaluate_examples(run.model, run.valid, micro_tokens=run.micro_tokens).loss
    run.row_began += time.perf_counter() - began  # evaluation is not training time
    state = run.state
    better = state.best_loss is None or loss < state.best_loss
    state.evaluations_without_better = 0 if better else state.evaluations_without_better + 1
    state.best_loss = loss if better else state.best_loss
    state.evaluated_step = state.step
    row = {"step": state.step, "eval_loss": loss}
    run.metrics.write(row)
    tell(run.callbacks, "on_evaluate", row)


def stopped_early(run: Run) -> bool:
    """Return whether patience has run out."""
    patience = run.config.evaluation.patience
    return patience is not None and run.state.evaluations_without_better >= patience


def checkpoint(run: Run) -> None:
    """Save everything a resume needs; refuses to commit values that are not finite."""
    drain(run)
    adapter = dict(run.model.tensors("adapter"))
    broken = [name for name, tensor in adapter.items() if not is_finite(tensor)]
    if broken:
        raise DivergedError(
            f'training diverged: "{broken[0]}" is no longer finite after update {run.state.step}',
            fix=f"lower optimizer.lr (now {run.config.optimizer.lr:g}); the last checkpoint is good",
        )
    time_s = run.state.time_s + time.perf_counter() - run.row_began
    state = {"loop": asdict(replace(run.state, time_s=time_s)), "identity": run.identity}
    found = Checkpoint(run.state.step, adapter, dict(run.trainer.state()), state)
    save(run.folder / "checkpoints", found, keep=run.config.checkpoint.keep)


def save_or_go_on(run: Run) -> None:
    """Save; where the disk refuses, say so and train on: the next interval tries again."""
    try:
        checkpoint(run)
    except StorageError as error:
        tell(run.callbacks, "on_note", error.what)


def interrupted(number: int, run: Run) -> Interrupted:
    """Return the exception that ends an interrupted run: exit code 130 or 143, and how to go on."""
    name = signal.Signals(number).name
    return Interrupted(
        f"stopped by {name} after update {run.state.step} of {run.updates}; the state is saved in {run.folder}",
        exit_code=128 + number,
        fix=f"to go on: mlxlora train {run.folder / 'config.yaml'}",
    )
