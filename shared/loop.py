"""The only training loop: choose rows, cut, step, log, evaluate, save. No framework in sight.

Everything that decides the result is a pure function of (config, step); what a resume needs beyond the
tensors is `LoopState`.
"""

from __future__ import annotations

import math
import shlex
import signal
import time
from collections.abc import Callable

from shared.callbacks import tell
from shared.config import RunConfig
from shared.data.ahead import Ahead
from shared.data.batch import update_batches
from shared.errors import Interrupted
from shared.running.evaluations import evaluate, stopped_early
from shared.running.record import checkpoint, drain, has_row, log, max_loss, save_or_go_on, wants_norms
from shared.running.recovery import step_or_split
from shared.running.run import Run
from shared.schedules import build_schedule
from shared.signals import stop_signals
from shared.types import Update


def fit(run: Run) -> None:
    """Train from `run.state.step` to the end; raises Interrupted (after saving) when a signal asks to stop."""
    schedule = build_schedule(run.config.schedule, lr=run.config.optimizer.lr, updates=run.updates)
    ahead = Ahead(lambda step, layout: update_batches(run.train, run.plan, step, layout))
    with stop_signals() as run.stop:
        run.row_began = time.perf_counter()
        if (is_due(run, run.config.evaluation.every) or run.state.step == 0) and evaluate(run):
            save_or_go_on(run)
        while run.state.step < run.updates and not (run.stop.number or stopped_early(run)):
            do_update(run, schedule, ahead)
            is_best = is_due(run, run.config.evaluation.every) and evaluate(run)
            is_wanted = is_best or is_due(run, run.config.checkpoint.every)
            if is_wanted and run.state.step < run.updates and not run.stop.number:
                save_or_go_on(run)
        drain(run)
        if not run.stop.number and run.state.positions and run.last is not None:  # none: patience had run out before
            log(run)
        evaluate(run)
        number = run.stop.number
        run.state.finished = not number
        checkpoint(run)
        if number:
            raise interrupted(number, run)


def is_due(run: Run, every: int | None) -> bool:
    """Return whether something that happens every so many updates happens now."""
    return every is not None and run.state.step > 0 and run.state.step % every == 0


def do_update(run: Run, schedule: Callable[[int], float], ahead: Ahead) -> None:
    """Do the next update and log it where a row is due."""
    step = run.state.step + 1
    micro = ahead.take(step, run.layout)
    limit, by_module = max_loss(run), wants_norms(run, step)
    update = build_update(run.config, step, lr=schedule(step), max_loss=limit, by_module=by_module)
    run.pending.append((step, step_or_split(run, micro, update)))
    state = run.state
    state.step = step
    state.tokens += sum(batch.num_tokens for batch in micro)
    state.supervised_tokens += sum(batch.num_supervised for batch in micro)
    state.positions += sum(batch.tokens_BT.size for batch in micro)
    run.lr = update.lr
    tell(run.callbacks, "on_update", step)
    if has_row(run, step):
        drain(run)
        log(run)


def build_update(
    config: RunConfig, step: int, *, lr: float, max_loss: float = math.inf, by_module: bool = False
) -> Update:
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
        momentum=optimizer.momentum,
        nesterov=optimizer.nesterov,
        max_loss=max_loss,
        by_module=by_module,
    )


def interrupted(number: int, run: Run) -> Interrupted:
    """Return the exception that ends an interrupted run: exit code 130, 143 or 129, and how to go on."""
    name = signal.Signals(number).name
    return Interrupted(
        f"stopped by {name} after update {run.state.step} of {run.updates}; the state is saved in {run.folder}",
        exit_code=128 + number,
        fix=f"to go on: mlxlora train {shlex.quote(str(run.folder / 'config.yaml'))}",
    )
