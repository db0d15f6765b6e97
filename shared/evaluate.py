"""The loss of a model on rows: nats per supervised token, every token with the same weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shared.data.batch import micro_batches
from shared.data.cut import halve
from shared.data.layout import Layout
from shared.errors import is_out_of_memory
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


def evaluate_examples(model: Model, examples: Sequence[Example], layout: Layout) -> Evaluation:
    """Return the token-weighted loss; sums are taken in float64."""
    total, weight, tokens = 0.0, 0.0, 0
    waiting = micro_batches(examples, layout)[::-1]
    while waiting:
        batch = waiting.pop()
        try:
            log_probs_N = model.log_probs(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            waiting += halve([batch])[::-1]  # raises OutOfMemory where the batch is a single row
            continue
        total += float(sft(log_probs_N.astype("float64"), batch.weights_N))
        weight += float(batch.weights_N.sum(dtype="float64"))
        tokens += batch.num_tokens
    loss = total / weight
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return Evaluation(loss, perplexity, supervised_tokens=int(weight), tokens=tokens, rows=len(examples))
