"""The loss of a model on rows: nats per supervised token, every token with the same weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from shared import faults
from shared.data.batch import micro_batches
from shared.data.cut import halve
from shared.data.layout import Layout
from shared.errors import is_out_of_memory
from shared.protocols import Model
from shared.types import Example


@dataclass(frozen=True)
class Evaluation:
    """Loss in nats per supervised token, its exponential, and over how many tokens and rows."""

    loss: float
    perplexity: float
    supervised_tokens: int
    tokens: int
    rows: int
    scores: Mapping[str, float] = field(default_factory=dict[str, float])  # of answers, shared/evaluating/exams.py


def evaluate_examples(
    model: Model, examples: Sequence[Example], layout: Layout, *, between: Callable[[], None] = lambda: None
) -> Evaluation:
    """Return the token-weighted loss; sums are taken in float64. What `between` raises ends it, as in evaluate_each."""
    losses_E, weights_E = evaluate_each(model, examples, layout, between=between)
    weight = float(weights_E.sum())
    loss = float(losses_E.sum()) / weight
    perplexity = math.exp(loss) if loss < 700 else math.inf
    tokens = sum(len(example.tokens) for example in examples)
    return Evaluation(loss, perplexity, supervised_tokens=int(weight), tokens=tokens, rows=len(examples))


def evaluate_each(
    model: Model, examples: Sequence[Example], layout: Layout, *, between: Callable[[], None] = lambda: None
) -> tuple[np.ndarray, np.ndarray]:
    """Return (E,) float64 twice: the sum of every example's loss in nats, and of its tokens' weights.

    between: called before every micro-batch; what it raises ends the evaluation.
    """
    losses_E, weights_E = np.zeros(len(examples)), np.zeros(len(examples))
    waiting = micro_batches(examples, layout)[::-1]
    while waiting:
        faults.hit("evaluation.batch")
        between()
        batch = waiting.pop()
        try:
            log_probs_N = model.log_probs(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            waiting += halve([batch])[::-1]  # raises OutOfMemory where the batch is a single row
            continue
        owners_N = batch.places()[0].reshape(-1)[batch.positions_N]
        losses_N = -log_probs_N.astype("float64") * batch.weights_N
        losses_E += np.bincount(owners_N, losses_N, minlength=len(examples))
        weights_E += np.bincount(owners_N, batch.weights_N, minlength=len(examples))
    return losses_E, weights_E
