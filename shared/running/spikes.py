"""Spikes of the training loss: far above the losses of the last updates, by their median and its deviation.

Both are robust: what a spike leaves in the window hardly moves them, and after half a window a new level is the usual
one. A limit is a pure function of losses that lie LAG updates back, so a resumed run decides as the run without a
break did, and no update waits for the device to tell the loss of the one before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median

from shared.callbacks import tell
from shared.running.checkpoint import drop_after, newest
from shared.running.run import LoopState, Run
from shared.types import StepStats

WINDOW = 32  # losses that say what is usual
LAG = 4  # updates between a loss and its use
SIGMAS = 8.0  # robust standard deviations above the median
RISE = 0.5  # and this share of the median at least


def spike_limit(losses: Sequence[float]) -> float:
    """Return the loss that the next but LAG updates should not exceed; infinite while fewer than WINDOW are known.

    The median absolute deviation times 1.4826 is the standard deviation of normal noise (Hampel 1974).

    >>> spike_limit([2.0, 2.2] * 16), spike_limit([2.0])
    (3.28608, inf)
    """
    if len(losses) < WINDOW:
        return math.inf
    middle = median(losses[-WINDOW:])
    spread = 1.4826 * median(abs(loss - middle) for loss in losses[-WINDOW:])
    return round(middle + max(SIGMAS * spread, RISE * abs(middle)), 6)


def watch_loss(run: Run, *, step: int, stats: StepStats, rows: str) -> None:
    """Take an update's loss into the window; report it where it is a spike."""
    state = run.state
    limit = spike_limit(state.losses[:-LAG])
    loss = stats.loss if math.isfinite(stats.loss) else (state.losses or [math.inf])[-1]
    state.losses = [*state.losses, loss][-WINDOW - LAG :] if math.isfinite(loss) else state.losses
    if run.config.train.spikes == "ignore" or not limit < stats.loss < math.inf:
        return
    done = "skipped: " if stats.skipped else ""
    tell(
        run.callbacks,
        "on_note",
        f"update {step} {done}its loss {stats.loss:.3f} is a spike, {limit:.3f} is usual ({rows})",
    )
    if run.config.train.spikes == "rollback":
        state.spike_step = state.spike_step or step


def go_back(run: Run) -> None:
    """Put weights and moments back to the last checkpoint that is proven good; rows behind it are not done again."""
    root, spike = run.folder / "checkpoints", run.state.spike_step
    drop_after(root, spike - 2)
    found, _ = newest(root)
    run.state.spike_step, run.state.losses = 0, []
    if run.state.best_step > spike - 2:  # its checkpoint has gone, too
        before = found.state["loop"] if found else asdict(LoopState())
        for name in ("metric", "best", "best_step", "evaluations_without_better"):
            setattr(run.state, name, before[name])
    if found is None:
        tell(run.callbacks, "on_note", f"no checkpoint lies before the spike of update {spike}, so it is only skipped")
        return
    run.model.load_tensors("adapter", found.adapter)
    run.trainer.load_state(found.optimizer)
    tell(run.callbacks, "on_note", f"back to the weights of update {found.step}, for the spike of update {spike}")
