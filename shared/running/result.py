"""The result of a run: which update's weights it is, as the manifest keeps it."""

from __future__ import annotations

import json
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

TAIL = 5  # logged training losses that a run's end is judged by


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

    Judged is the validation loss where there is one, else the median of the last few training losses.
    """
    rows, guess = run.metrics.read(), math.log(run.model.info.vocab_size)
    found = [row["eval_loss"] for row in rows if "eval_loss" in row]
    what, first, last = "validation", *(found[:1] or [None]), found[-1] if found else math.nan
    if not found:
        losses = [row["loss"] for row in rows if "loss" in row]
        if not losses:
            return ""
        what, first, last = "training", run.state.first_loss, median(losses[-TAIL:])
    first = guess if first is None else first
    worse = max(guess - 1e-3, first + 0.1) if first < guess else first + 1  # an untrained base begins behind guessing
    if last <= min(worse, 2 * first + 3):
        return ""
    return f"the {what} loss ended at {last:.4g}; it began at {first:.4g}, and guessing gives {guess:.4g}"


def add_result(run: Run, result: dict[str, Any]) -> None:
    """Write into the manifest which update's weights are the result, and by what."""
    file = run.folder / "manifest.json"
    write_json(file, {**json.loads(file.read_bytes()), "result": result})


def read_result(folder: Path) -> dict[str, Any]:
    """Return what a run's manifest says of its result; empty of an older version's, whose result is the last update."""
    try:
        found = json.loads((folder / "manifest.json").read_bytes()).get("result", {})
    except (OSError, ValueError, AttributeError):
        return {}
    return found if isinstance(found, dict) else {}
