"""The loss of a model on rows: nats per supervised token, every token with the same weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shared.data.batch import micro_batches
from shared.objectives.sft import sft
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


def evaluate_examples(model: Model, examples: Sequence[Example], *, micro_tokens: int) -> Evaluation:
    """Return the token-weighted loss; sums are taken in float64."""
    total, weight, tokens = 0.0, 0.0, 0
    for batch in micro_batches(examples, micro_tokens=micro_tokens):
        total += float(sft(model.log_probs(batch).astype("float64"), batch.weights_N))
        weight += float(batch.weights_N.sum(dtype="float64"))
        tokens += batch.num_tokens
    loss = total / weight
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return Evaluation(loss, perplexity, supervised_tokens=int(weight), tokens=tokens, rows=len(examples))
