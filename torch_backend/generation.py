"""Generation with a KV cache: one prompt after the other, tokens picked by `shared.sampling`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from shared.sampling import pick
from shared.types import Sampling, Token
from torch_backend.objectives import Head


def generate(zoo: Any, head: Head, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[Token]:
    """Yield tokens prompt by prompt; the end token is yielded too, marked `stopped`."""
    for number, prompt in enumerate(prompts):
        yield from continue_prompt(zoo, head, number, prompt, sampling)


def continue_prompt(zoo: Any, head: Head, number: int, prompt: Sequence[int], sampling: Sampling) -> Iterator[Token]:
    """Yield the tokens that follow one prompt."""
    from transformers import DynamicCache

    cache = DynamicCache(config=zoo.config)
    feed = list(prompt)
    for n in range(sampling.max_tokens):
        logits_V = next_logits(zoo, head, feed, cache)
        token, log_prob = pick(logits_V, sampling, prompt=number, n=n)
        stopped = token in sampling.stop_tokens
        yield Token(prompt=number, token=token, log_prob=log_prob, stopped=stopped)
        if stopped:
            return
        feed = [token]


@torch.no_grad()
def next_logits(zoo: Any, head: Head, feed: Sequence[int], cache: Any) -> np.ndarray:
    """Return (V,) float32 logits behind the last of the tokens fed; the cache grows by them."""
    tokens_1T = torch.tensor([list(feed)], device=zoo.device)
    h_1TD = zoo.get_decoder()(input_ids=tokens_1T, past_key_values=cache, use_cache=True).last_hidden_state
    return head.logits(h_1TD[:, -1])[0].cpu().numpy()
