"""The evaluations of a run: all sets measured and written down, and what a user would want to know of them."""

from __future__ import annotations

import math
from collections.abc import Iterator

from shared.callbacks import tell
from shared.config import EvaluationConfig
from shared.evaluating.deciding import best_words, judge, out_of_patience, stop_words
from shared.evaluating.exams import ask, mean_scores
from shared.evaluating.loss import evaluate_examples
from shared.running.record import write
from shared.running.run import Run


class Stopped(Exception):
    """A signal asked to stop in the middle of an evaluation, which is done again after a resume."""


def evaluate(run: Run) -> bool:
    """Evaluate on all sets, once per step; return whether the weights are now the best, and to be kept."""
    asked = run.valid or run.sets
    if not asked or run.config.evaluation.every is None or run.state.evaluated_step == run.state.step:
        return False
    trained_s = run.trained_for()
    try:
        found = measure(run)
    except Stopped:
        return False
    run.row_began += run.trained_for() - trained_s  # evaluation is not training time
    run.state.evaluated_step = run.state.step
    finite = {key: value for key, value in found.items() if math.isfinite(value)}  # JSON has no NaN
    for key in found.keys() - finite.keys():
        what = f"the evaluation after update {run.state.step} has no finite {key.removeprefix('eval_')} ({found[key]})"
        tell(run.callbacks, "on_note", what.replace("_loss", " loss"))
    if finite:
        row = {"step": run.state.step, **finite}
        write(run, row)
        tell(run.callbacks, "on_evaluate", row)
    before = best_words(run.state)
    is_best = judge(run.state, run.config.evaluation, found.get(run.config.evaluation.metric))
    tell_end(run, before)
    return is_best and run.config.evaluation.keeps_best


def tell_end(run: Run, before: str) -> None:
    """Say that patience has run out, where it has before the last update; before: the best until this evaluation."""
    state, config = run.state, run.config.evaluation
    if state.step < run.updates and stopped_early(run):
        tell(run.callbacks, "on_note", f"stopped early after update {state.step}: {stop_words(config, before)}")


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


def stopped_early(run: Run) -> bool:
    """Return whether patience has run out."""
    return out_of_patience(run.state, run.config.evaluation)


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
