"""What evaluations decide: which checkpoint is the best, when a run stops early, and what its result is."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.callbacks import tell
from shared.config import EvaluationConfig
from shared.durable import write_json
from shared.errors import CheckpointError
from shared.evaluating.exams import ask, mean_scores
from shared.evaluating.loss import evaluate_examples
from shared.running.checkpoint import folder_of, load
from shared.running.record import write
from shared.running.run import Run


class Stopped(Exception):
    """A signal asked to stop in the middle of an evaluation, which is done again after a resume."""


def evaluate(run: Run) -> bool:
    """Evaluate on all sets, once per step; return whether the weights are now the best, and to be kept."""
    asked = run.valid or run.sets
    if not asked or run.config.evaluation.every is None or run.state.evaluated_step == run.state.step:
        return False
    began = time.perf_counter()
    try:
        found = measure(run)
    except Stopped:
        return False
    run.row_began += time.perf_counter() - began  # evaluation is not training time
    run.state.evaluated_step = run.state.step
    finite = {key: value for key, value in found.items() if math.isfinite(value)}  # JSON has no NaN
    for key in found.keys() - finite.keys():
        what = f"the evaluation after update {run.state.step} has no finite {key.removeprefix('eval_')} ({found[key]})"
        tell(run.callbacks, "on_note", what.replace("_loss", " loss"))
    if finite:
        row = {"step": run.state.step, **finite}
        write(run, row)
        tell(run.callbacks, "on_evaluate", row)
    return judge(run, found.get(run.config.evaluation.metric)) and run.config.evaluation.keeps_best


def measure(run: Run) -> dict[str, float]:
    """Return every metric of every set under its key of metrics.jsonl; raises Stopped where a signal came."""

    def go_on() -> None:
        if run.stop.number:
            raise Stopped

    found: dict[str, float] = {}
    for name, examples in {"": run.valid, **run.sets}.items():
        prefix = f"eval_{name}_" if name else "eval_"
        if examples:
            found[f"{prefix}loss"] = evaluate_examples(run.model, examples, run.layout, between=go_on).loss
        if run.exam and (questions := run.exam.questions.get(name)):
            answers = ask(
                run.model, questions, run.exam.tokenizer, max_tokens=run.exam.max_tokens, between=go_on
            )  # fmt: skip
            found |= {prefix + metric: value for metric, value in mean_scores(answers).items()}
    return found


def rule(config: EvaluationConfig) -> str:
    """Return what decides, as the state keeps it: another rule begins to count anew."""
    return f"{config.better} {config.metric}"


def judge(run: Run, value: float | None) -> bool:
    """Take the metric's value of an evaluation into the state; return whether it is the best so far.

    The best is the best, by however little; for patience only a change of more than min_delta counts as better.
    """
    state, config = run.state, run.config.evaluation
    if value is None:
        return False
    if state.metric != rule(config):
        state.metric, state.best, state.best_step, state.evaluations_without_better = rule(config), None, -1, 0
    gain = math.inf if state.best is None else (state.best - value if config.better == "min" else value - state.best)
    best = math.isfinite(value) and gain > 0
    state.evaluations_without_better = 0 if best and gain > config.min_delta else state.evaluations_without_better + 1
    if best:
        state.best, state.best_step = value, state.step
    if stopped_early(run) and state.step < run.updates:
        times = f"{config.patience} evaluation{'s' if config.patience != 1 else ''}"
        text = f"stopped early after update {state.step}: {times} without a better {config.metric}{best_words(run)}"
        tell(run.callbacks, "on_note", text)
    return best


def best_words(run: Run) -> str:
    """Return the best value and its update in words, empty where none is known."""
    state = run.state
    if state.best is None:
        return ""
    return f" than {state.best:.4f}" + (f" of update {state.best_step}" if state.best_step >= 0 else "")


def stopped_early(run: Run) -> bool:
    """Return whether patience has run out."""
    patience = run.config.evaluation.patience
    counted = run.state.metric == rule(run.config.evaluation)
    return patience is not None and counted and run.state.evaluations_without_better >= patience


def wanted_update(run: Run) -> int:
    """Return which update's weights the config asks for as the result; -1: the best one's, which is not known."""
    state = run.state
    return state.best_step if run.config.evaluation.keeps_best and state.best is not None else state.step


def has_ended(run: Run) -> bool:
    """Return whether nothing is left to train: all updates are done, or patience, as it is now, has run out."""
    return run.state.finished and (run.state.step >= run.updates or stopped_early(run))


def has_result(run: Run) -> bool:
    """Return whether the manifest has the result of this state; it has none from a resume on until that is written."""
    result = read_result(run.folder)
    return result.get("last_update") == run.state.step and wanted_update(run) in (result.get("update"), -1)


def restore_best(run: Run) -> dict[str, Any]:
    """Put the best checkpoint's weights into the model where the config asks for it; return what the result is.

    Says so, or why the last weights have to do.
    """
    state, config = run.state, run.config.evaluation
    is_early = stopped_early(run) and state.step < run.updates
    result: dict[str, Any] = {"update": state.step, "last_update": state.step, "stopped_early": is_early}
    if state.best is not None and state.best_step >= 0:
        result |= {"metric": config.metric, "best": state.best, "best_update": state.best_step}
    if wanted_update(run) == state.step:
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


def evaluation_warnings(run: Run) -> Iterator[str]:
    """Yield what a user would want to know of the evaluations: that there are none, or cannot decide or match."""
    config = run.config.evaluation
    if config.every is None:
        return
    if not run.valid:
        nothing = "nothing is" if not run.sets else "only evaluation.sets are"
        yield f"no valid.jsonl, so {nothing} evaluated during the run"
        deciding = config.keeps_best or config.patience is not None
        if deciding and config.metric in EvaluationConfig(generate=config.generate).metrics:
            yield f"{config.metric} is never measured, so the run does not stop early and its last update is the result"
    answers = [question for some in (run.exam.questions.values() if run.exam else ()) for question in some]
    long = sum(question.num_wanted > config.max_tokens for question in answers)
    if long:
        most = max(question.num_wanted for question in answers)
        yield (
            f"{long} of {len(answers)} answers have more than evaluation.max_tokens {config.max_tokens} tokens "
            f"(up to {most}), so they are never matched"
        )
