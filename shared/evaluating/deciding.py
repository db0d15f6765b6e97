"""What evaluations decide: which one was the best, and when patience has run out."""

from __future__ import annotations

import math
from typing import Protocol

from shared.config import EvaluationConfig


class Standing(Protocol):
    """What a run's state keeps of its evaluations."""

    step: int
    metric: str
    best: float | None
    best_step: int
    evaluations_without_better: int


def rule(config: EvaluationConfig) -> str:
    """Return what decides, as the state keeps it: another rule begins to count anew."""
    return f"{config.better} {config.metric}"


def judge(state: Standing, config: EvaluationConfig, value: float | None) -> bool:
    """Take the metric's value of an evaluation into the state; return whether it is the best so far.

    The best is the best, by however little; for patience only a change of more than min_delta counts as better.
    """
    if value is None:
        return False
    if state.metric != rule(config):
        state.metric, state.best, state.best_step, state.evaluations_without_better = rule(config), None, -1, 0
    gain = math.inf if state.best is None else (state.best - value if config.better == "min" else value - state.best)
    best = math.isfinite(value) and gain > 0
    state.evaluations_without_better = 0 if best and gain > config.min_delta else state.evaluations_without_better + 1
    if best:
        state.best, state.best_step = value, state.step
    return best


def out_of_patience(state: Standing, config: EvaluationConfig) -> bool:
    """Return whether patience has run out."""
    counted = state.metric == rule(config)
    return config.patience is not None and counted and state.evaluations_without_better >= config.patience


def wanted_update(state: Standing, config: EvaluationConfig) -> int:
    """Return which update's weights the config asks for as the result; -1: the best one's, which is not known."""
    return state.best_step if config.keeps_best and state.best is not None else state.step


def stop_words(config: EvaluationConfig, before: str) -> str:
    """Return in words why patience has run out; before: the best before the last evaluation, as `best_words` has it.

    >>> stop_words(EvaluationConfig(patience=1, min_delta=0.5), " than 0.2059 of update 30")
    '1 evaluation without an eval_loss better than 0.2059 of update 30 by 0.5'
    """
    times = f"{config.patience} evaluation{'s' if config.patience != 1 else ''}"
    if not config.min_delta:
        return f"{times} without a better {config.metric}{before}"
    if config.patience == 1:
        return f"{times} without an {config.metric} better{before} by {config.min_delta:g}"
    each = f"{times} without an {config.metric} better than the best before each by {config.min_delta:g}"
    return f"{each} (the last: better{before})" if before else each


def best_words(state: Standing) -> str:
    """Return the best value and its update in words, empty where none is known."""
    if state.best is None:
        return ""
    return f" than {state.best:.4f}" + (f" of update {state.best_step}" if state.best_step >= 0 else "")
