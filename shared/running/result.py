"""The result of a run: which update's weights it is, as the manifest keeps it."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median
from typing import Any

from shared.callbacks import tell
from shared.durable import write_json
from shared.errors import CheckpointError
from shared.evaluating.deciding import wanted_update
from shared.running.checkpoint import folder_of, load
from shared.running.evaluations import stopped_early
from shared.running.run import Run
from shared.running.run_folder import manifest_of

TAIL = 5  # logged training losses that a run's end is judged by
LEVEL = 1e-3  # nats between a loss and that of guessing


def has_ended(run: Run) -> bool:
    """Return whether nothing is left to train: all updates are done, or patience, as it is now, has run out."""
    return run.state.finished and (run.state.step >= run.updates or stopped_early(run))


def has_result(run: Run) -> bool:
    """Return whether the manifest has the result of this state; it has none from a resume on until that is written."""
    result, wanted = read_result(run.folder), wanted_update(run.state, run.config.evaluation)
    return result.get("last_update") == run.state.step and wanted in (result.get("update"), -1)


def restore_best(run: Run) -> dict[str, Any]:
    """Put the best checkpoint's weights into the model where the config asks for it; return what the result is.

    Says so, or why the last weights have to do.
    """
    state, config = run.state, run.config.evaluation
    is_early = stopped_early(run) and state.step < run.updates
    result: dict[str, Any] = {"update": state.step, "last_update": state.step, "stopped_early": is_early}
    if state.best is not None and state.best_step >= 0:
        result |= {"metric": config.metric, "best": state.best, "best_update": state.best_step}
    if bad := divergence(run):
        result["diverged"] = bad
        tell(run.callbacks, "on_note", f"training diverged: {bad}; lower optimizer.lr ({run.config.optimizer.lr:g})")
    if wanted_update(state, config) == state.step:
        return result
    best = (
        f"the best {config.metric} is {state.best:.4f}{f' of update {state.best_step}' if state.best_step >= 0 else ''}"
    )
    try:
        run.model.load_tensors("adapter", load(folder_of(run.folder / "checkpoints", state.best_step)).adapter)
    except CheckpointError as error:
        why = error.what if state.best_step >= 0 else "an older version did not keep its checkpoint"
        tell(run.callbacks, "on_note", f"{best}, but {why}: the result is that of the last update, {state.step}")
        return result
    untrained = " (before training: nothing was better)" if state.best_step == 0 else ""
    tell(run.callbacks, "on_note", f"{best}{untrained}: its weights are the result, not those of update {state.step}")
    return {**result, "update": state.best_step}


def divergence(run: Run) -> str:
    """Return in words that the loss ended far above where it began, or where guessing is; empty where it did not.

    Judged is the validation loss where there is one, else the last few training losses, which are of other rows each.
    """
    rows, guess = run.metrics.read(), math.log(run.model.info.vocab_size)
    validation = [row["eval_loss"] for row in rows if "eval_loss" in row]
    training = [row["loss"] for row in rows if "loss" in row][-TAIL:]
    if validation:
        what, first, last = "validation", validation[0], validation[-1]
        bad = is_far_above(first, last, guess=guess)
    elif training:
        what, last = "training", median(training)
        first = guess if run.state.first_loss is None else run.state.first_loss
        level = first < guess - 0.1 and all(abs(loss - guess) < LEVEL for loss in training)  # every token as likely
        bad = level or last > min(2 * first + 3, 1.5 * max(first, guess))
    else:
        return ""
    return (
        f"the {what} loss ended at {last:.4g}; it began at {first:.4g}, and guessing gives {guess:.4g}" if bad else ""
    )


def is_far_above(first: float, last: float, *, guess: float) -> bool:
    """Return whether a loss on the same rows got so much worse that nothing is left of what the base knew.

    A base that has learnt begins below guessing, an untrained one may begin above it.

    >>> [is_far_above(2.0, last, guess=7.6) for last in (4.0, 7.1, 7.6)], is_far_above(8.0, 8.5, guess=7.6)
    ([False, True, True], False)
    """
    worse = max(guess - LEVEL, first + 0.1) if first < guess else first + 1
    return last > min(worse, 2 * first + 3)


def add_result(run: Run, result: dict[str, Any]) -> None:
    """Write into the manifest which update's weights are the result, and by what."""
    write_json(run.folder / "manifest.json", {**manifest_of(run.folder), "result": result})


def read_result(folder: Path) -> dict[str, Any]:
    """Return what a run's manifest says of its result; empty of an older version's, whose result is the last update."""
    found = manifest_of(folder).get("result")
    return found if isinstance(found, dict) else {}
