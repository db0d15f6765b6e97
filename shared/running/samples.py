"""What the model says to a few prompts before and after training, for the report."""

from __future__ import annotations

import numpy as np

from shared.adapters.spec import first_values
from shared.data.stream import sample_of
from shared.data.tokenize import Tokenizer
from shared.evaluating.exams import answer_all
from shared.running.run import Run
from shared.types import Example
from shared.watching.report import Sample

PROMPTS = 3
MAX_TOKENS = 48
MAX_PROMPT = 512


def take_samples(run: Run, tokenizer: Tokenizer) -> list[Sample]:
    """Return greedy answers to the first rows' prompts; after full fine-tuning there is no "before" to ask."""
    if run.spec.kind == "none":
        return []
    rows = [row for row in (run.valid or sample_of(run.train)) if len(row.tokens) <= MAX_PROMPT][:PROMPTS]
    prompts = [row.tokens[: prompt_length(row)].tolist() for row in rows]
    after = answer_all(run.model, prompts, tokenizer, max_tokens=MAX_TOKENS)
    trained = dict(run.model.tensors("adapter"))
    try:
        run.model.load_tensors("adapter", first_values(run.spec, run.model, seed=0))
        before = answer_all(run.model, prompts, tokenizer, max_tokens=MAX_TOKENS)
    finally:
        run.model.load_tensors("adapter", trained)
    return [
        Sample(tokenizer.decode(prompt), tokenizer.decode(row.tokens[len(prompt) :].tolist()), old, new)
        for row, prompt, old, new in zip(rows, prompts, before, after, strict=True)
    ]


def prompt_length(row: Example) -> int:
    """Return how many tokens stand before the first supervised one; of a plain text, a quarter."""
    first = int(np.argmax(row.supervised))
    return first if first > 1 else max(len(row.tokens) // 4, 1)
