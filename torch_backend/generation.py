"""Generation with a KV cache: one prompt after the other, tokens picked by `shared.sampling`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from shared.sampling import pick
from shared.types import Sampling, Token

if TYPE_CHECKING:
    from torch_backend.model import TorchModel


def generate(model: TorchModel, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[Token]:
    """Yield tokens prompt by prompt; the end token is yielded too, marked `stopped`."""
    for number, prompt in enumerate(prompts):
        yield from continue_prompt(model, number, prompt, sampling)


def continue_prompt(model: TorchModel, number: int, prompt: Sequence[int], sampling: Sampling) -> Iterator[Token]:
    """Yield the tokens that follow one prompt."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.zoo.config)
    feed = list(prompt)
    for n in range(sampling.max_tokens):
        logits_V = next_logits(model, feed, cache)
        token, log_prob = pick(logits_V, sampling, prompt=number, n=n)
        stopped = token in sampling.stop_tokens
        yield Token(prompt=number, token=token, log_prob=log_prob, stopped=stopped)
        if stopped:
            return
        feed = [token]


@torch.no_grad()
def next_logits(model: TorchModel, feed: Sequence[int], cache: object) -> np.ndarray:
    """Return (V,) float32 logits behind the last of the tokens fed; the cache grows by them."""
    tokens_1T = torch.tensor([list(feed)], device=model.device)
    h_1TD = model.decoder(input_ids=tokens_1T, past_key_values=cache, use_cache=True).last_hidden_state
    return model.head.logits(h_1TD[:, -1])[0].cpu().numpy()
