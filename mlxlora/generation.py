"""Sequences that go on side by side, with mlx-lm's caches of keys and values.

Legend: B sequences, T tokens, V vocabulary, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlxlora.attention import PADDABLE
from mlxlora.objectives import Head
from shared.generation.loop import common_length


class Rows:
    """Sequences of one model; with width 1 one at a time, in the cache that the zoo has for it.

    A prompt is computed alone, then its keys and values join the others', moved right so that all end together. With
    width 1 a prompt that begins as the last sequence did goes on from there.
    """

    def __init__(self, zoo: Any, head: Head, *, width: int) -> None:
        self.zoo, self.head, self.width = zoo, head, width
        self.caches: list[Any] = []  # one per layer
        self.held: list[int] = []  # with width 1, whose keys and values they have

    def add(self, tokens: Sequence[int]) -> np.ndarray:
        """Begin one more sequence; return (V,) float32 logits of what follows it."""
        from mlx_lm.models.cache import BatchKVCache, make_prompt_cache

        if self.width == 1:
            return self.feed([self.begin(tokens)], self.caches)[0]
        own = make_prompt_cache(self.zoo)
        logits_V = self.feed([tokens], own)[0]
        own = [BatchKVCache.merge([cache]) for cache in own]
        for mine, new in zip(self.caches, own, strict=False):
            mine.extend(new)
        self.caches = self.caches or own
        return logits_V

    def begin(self, tokens: Sequence[int]) -> list[int]:
        """Leave in the cache what a prompt begins with; return the rest of it, one token at least."""
        from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

        common = common_length(self.held, tokens[:-1])
        surplus, self.held = len(self.held) - common, list(tokens)
        if common and surplus and can_trim_prompt_cache(self.caches):
            trim_prompt_cache(self.caches, surplus)
        elif surplus or not common:
            self.caches, common = make_prompt_cache(self.zoo), 0
        return self.held[common:]

    def step(self, tokens: Sequence[int]) -> np.ndarray:
        """Put one token behind every sequence; return (B, V) float32 logits of what follows."""
        if self.width == 1:
            self.held += tokens
        return self.feed([[token] for token in tokens], self.caches)

    def keep(self, rows: Sequence[int]) -> None:
        """Forget all sequences but these; with width 1 the last one stays until the next begins."""
        if self.width == 1:
            return
        if not rows:
            self.caches = []
        for cache in self.caches:
            cache.filter(mx.array(list(rows)))

    def feed(self, tokens: Sequence[Sequence[int]], caches: Any) -> np.ndarray:
        """Return (B, V) float32 logits behind the last of the tokens fed; the caches grow by them."""
        h_BTD = self.zoo.model(mx.array([list(row) for row in tokens]), cache=caches)
        return np.array(self.head.logits(h_BTD[:, -1]))


def can_batch(zoo: Any, family: str) -> bool:
    """Return whether several sequences go on side by side; a layer that keeps a window's keys only cannot."""
    from mlx_lm.models.cache import KVCache, make_prompt_cache

    return family in PADDABLE and all(type(cache) is KVCache for cache in make_prompt_cache(zoo))
