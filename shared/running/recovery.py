"""What a run does about trouble: memory that runs out, numbers that are not finite, weights that went bad."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn

from shared import faults
from shared.callbacks import tell
from shared.data.cut import halve
from shared.data.stream import sample_of, source_of
from shared.errors import DivergedError, OutOfMemory, is_out_of_memory
from shared.evaluating.loss import evaluate_examples
from shared.protocols import Pending
from shared.running.checkpoint import drop_after, step_dirs, step_of
from shared.running.run import Run
from shared.running.spikes import watch_loss
from shared.types import Batch, StepStats, Update

MAX_SKIPPED = 3  # updates in a row without finite numbers, then the weights themselves are in doubt
MAX_NAMED = 5  # rows in one message


class LateOutOfMemory(OutOfMemory):
    """Memory ran out where an update cannot be taken back: go on from the last checkpoint, with `micro_tokens`."""

    def __init__(self, what: str, *, micro_tokens: int) -> None:
        super().__init__(what)
        self.micro_tokens = micro_tokens


def step_or_split(run: Run, micro: list[Batch], update: Update) -> Pending[StepStats]:
    """Do one update; where memory runs out, do the same update in smaller pieces, from then on."""
    if faults.hit("update.numbers"):
        micro = [replace(batch, weights_N=batch.weights_N * math.nan) for batch in micro]
    while True:
        try:
            return run.trainer.step(micro, update)
        except OutOfMemory:
            micro = halve(micro)
            run.layout = replace(run.layout, micro_tokens=max(run.layout.micro_tokens // 2, 1), shapes=())
            smaller = f"micro-batches of at most {run.layout.micro_tokens} tokens from here on"
            tell(run.callbacks, "on_note", f"out of memory: {smaller}")
        except (RuntimeError, MemoryError) as error:
            raise_late(run, error)


def read(run: Run, pending: Pending[StepStats]) -> StepStats:
    """Return a pending result; raises LateOutOfMemory where a lazy framework only now finds no memory."""
    try:
        faults.hit("update.result")
        return pending.result()
    except (RuntimeError, MemoryError) as error:
        raise_late(run, error)


def raise_late(run: Run, error: Exception) -> NoReturn:
    """Raise LateOutOfMemory, or OutOfMemory where no smaller piece is left; an error of another kind as it is."""
    if not is_out_of_memory(error):
        raise error
    what, longest = f"out of memory: {str(error)[:200]}", max(len(example.tokens) for example in sample_of(run.train))
    if run.layout.micro_tokens <= longest:
        fix = "a lower data.max_length, train.recompute: true, or a smaller model"
        raise OutOfMemory(f"{what}, with a single row of {longest} tokens in a micro-batch", fix=fix) from None
    raise LateOutOfMemory(what, micro_tokens=max(run.layout.micro_tokens // 2, longest)) from None


def judge(run: Run, *, step: int, stats: StepStats) -> None:
    """Count and report an update that was skipped, or a spike; raises DivergedError after three without numbers."""
    state, rows = run.state, name_some([source_of(run.train, row) for row in run.plan.rows(step).tolist()])
    watch_loss(run, step=step, stats=stats, rows=rows)
    if step == 1 and math.isfinite(stats.loss):
        state.first_loss = stats.loss
    if stats.overflowed:
        state.overflows += 1
        return
    state.skipped += stats.skipped
    broken = stats.skipped and not (math.isfinite(stats.loss) and math.isfinite(stats.grad_norm))
    state.skipped_in_a_row = state.skipped_in_a_row + 1 if broken else 0
    if broken:
        tell(run.callbacks, "on_note", f"update {step} skipped: loss or gradient not finite ({rows})")
    if state.skipped_in_a_row >= MAX_SKIPPED:
        steps = range(step - MAX_SKIPPED + 1, step + 1)
        bad, blame = suspects(run, steps)
        what = f"training diverged: updates {steps[0]} to {step} had no finite loss or gradient; {blame}"
        raise DivergedError(what, fix=roll_back(run, steps[0] - (1 if bad else 2)))


def name_some(rows: Sequence[str]) -> str:
    """Return names of rows, the first few of many.

    >>> name_some(["a:1", "a:2"]), name_some([f"a:{n}" for n in range(1, 9)])
    ('a:1, a:2', 'a:1, a:2, a:3, a:4, a:5 and 3 more')
    """
    more = f" and {len(rows) - MAX_NAMED} more" if len(rows) > MAX_NAMED else ""
    return ", ".join(rows[:MAX_NAMED]) + more


def suspects(run: Run, steps: Sequence[int]) -> tuple[bool, str]:
    """Return whether single rows are to blame for updates without finite numbers, and those rows or the weights."""
    rows = [run.train[row] for row in dict.fromkeys(int(row) for step in steps for row in run.plan.rows(step))]
    bad = [row.source for row in rows if not math.isfinite(evaluate_examples(run.model, [row], run.layout).loss)]
    if len(bad) == len(rows):
        return False, "every row of theirs does that, so the weights are to blame"
    return bool(bad), f"suspects: {name_some(bad)}" if bad else "the loss of each row alone is finite"


def roll_back(run: Run, step: int) -> str:
    """Put the run folder back to the last good checkpoint, at most `step`; return what to do next.

    A checkpoint is good when the update behind it had a finite loss, which was computed with its weights; or when other
    rows have a finite loss with them.
    """
    root = run.folder / "checkpoints"
    drop_after(root, step)
    left = [step_of(folder) for folder in step_dirs(root)]
    run.metrics.truncate(max(left, default=0))
    lower = f"lower optimizer.lr (now {run.config.optimizer.lr:g})"
    if not left:
        return f"{lower} and start anew; no checkpoint was good"
    return f"{lower} with --allow-change optimizer.lr, to go on from update {left[0]}, the last good checkpoint"
