"""Sequences that go on side by side, with transformers' caches of keys and values.

Legend: B sequences, T tokens, S tokens cached, V vocabulary, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad

from shared.generation.loop import common_length
from torch_backend import attention
from torch_backend.objectives import Head


class Rows:
    """Sequences of one model; with width 1 one at a time, in the cache that the zoo has for it.

    A prompt is computed alone, then its keys and values join the others', moved right so that all end together. With
    width 1 a prompt that begins as the last sequence did goes on from there.
    """

    def __init__(self, zoo: Any, head: Head, *, width: int) -> None:
        self.zoo, self.head, self.width = zoo, head, width
        self.cache: Any = None
        self.held: list[int] = []  # with width 1, whose keys and values it has
        self.lengths: list[int] = []  # else, of the sequences; the cache is as long as the longest

    def add(self, tokens: Sequence[int]) -> np.ndarray:
        """Begin one more sequence; return (V,) float32 logits of what follows it."""
        from transformers import DynamicCache

        if self.width == 1:
            return self.feed([self.begin(tokens)], self.cache)[0]
        own = DynamicCache()
        logits_V = self.feed([tokens], own)[0]
        if self.lengths:
            join(self.cache, own)
        else:
            self.cache = own
        self.lengths.append(len(tokens))
        return logits_V

    def begin(self, tokens: Sequence[int]) -> list[int]:
        """Leave in the cache what a prompt begins with; return the rest of it, one token at least."""
        from transformers import DynamicCache

        common = common_length(self.held, tokens[:-1])
        surplus, self.held = len(self.held) - common, list(tokens)
        if common and surplus and keeps_all(self.cache):
            self.cache.crop(-surplus)
        elif surplus or not common:
            self.cache, common = DynamicCache(config=self.zoo.config), 0
        return self.held[common:]

    def step(self, tokens: Sequence[int]) -> np.ndarray:
        """Put one token behind every sequence; return (B, V) float32 logits of what follows."""
        if self.width == 1:
            self.held += tokens
            return self.feed([tokens], self.cache)
        places = self.places()
        self.lengths = [length + 1 for length in self.lengths]
        return self.feed([[token] for token in tokens], self.cache, **places)

    def keep(self, rows: Sequence[int]) -> None:
        """Forget all sequences but these; with width 1 the last one stays until the next begins."""
        if self.width == 1:
            return
        self.lengths = [self.lengths[n] for n in rows]
        if not rows:
            self.cache = None
            return
        self.cache.batch_select_indices(torch.tensor(rows, device=self.zoo.device))
        for layer in self.cache.layers:
            layer.keys, layer.values = (x[..., -max(self.lengths) :, :] for x in (layer.keys, layer.values))

    def places(self) -> dict[str, torch.Tensor]:
        """Return what the decoder has to know of sequences that begin at different places in the cache."""
        lengths_B = torch.tensor(self.lengths, device=self.zoo.device)
        pads_B = lengths_B.max() - lengths_B
        hidden = attention.left_padded(self.zoo, pads_B, length=max(self.lengths) + 1)
        return {"position_ids": lengths_B[:, None], **hidden}

    @torch.no_grad()
    def feed(self, tokens: Sequence[Sequence[int]], cache: Any, **places: torch.Tensor) -> np.ndarray:
        """Return (B, V) float32 logits behind the last of the tokens fed; the cache grows by them."""
        tokens_BT = torch.tensor([list(row) for row in tokens], device=self.zoo.device)
        decoder = self.zoo.get_decoder()
        h_BTD = decoder(input_ids=tokens_BT, past_key_values=cache, use_cache=True, **places).last_hidden_state
        return self.head.logits(h_BTD[:, -1]).cpu().numpy()


def can_batch(zoo: Any) -> bool:
    """Return whether every layer keeps all its keys, or windows are for our attention to apply."""
    from transformers import DynamicCache

    return zoo.config._attn_implementation == attention.NAME or keeps_all(DynamicCache(config=zoo.config))


def keeps_all(cache: Any) -> bool:
    """Return whether no layer of a cache has a window."""
    from transformers.cache_utils import DynamicLayer

    return all(type(layer) is DynamicLayer for layer in cache.layers)


def join(cache: Any, other: Any) -> None:
    """Put the sequences of another cache behind those of a cache, all moved right to the same end."""
    for layer, new in zip(cache.layers, other.layers, strict=True):
        longest = max(layer.keys.shape[-2], new.keys.shape[-2])
        layer.keys, layer.values = (
            torch.cat([pad(x, (0, 0, longest - x.shape[-2], 0)) for x in pair])
            for pair in ((layer.keys, new.keys), (layer.values, new.values))
        )
