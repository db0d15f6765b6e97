"""What the model says to a few prompts before and after training, for the report."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shared.adapters.spec import first_values
from shared.data.stream import sample_of
from shared.data.tokenize import Tokenizer
from shared.folder import end_tokens
from shared.running.run import Run
from shared.types import Example, Sampling
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
    after = answer(run, prompts, tokenizer)
    trained = dict(run.model.tensors("adapter"))
    try:
        run.model.load_tensors("adapter", first_values(run.spec, run.model, seed=0))
        before = answer(run, prompts, tokenizer)
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


def answer(run: Run, prompts: Sequence[Sequence[int]], tokenizer: Tokenizer) -> list[str]:
    """Return the greedy continuation of every prompt."""
    ends = end_tokens(tokenizer.folder, tokenizer_eos=tokenizer.eos)
    sampling = Sampling(MAX_TOKENS, 0.0, 0, ends, batch_size=PROMPTS)
    texts: list[list[int]] = [[] for _ in prompts]
    for token in run.model.generate(prompts, sampling):
        if not token.stopped:
            texts[token.prompt].append(token.token)
    return [tokenizer.decode(tokens) for tokens in texts]
