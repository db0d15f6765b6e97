"""Sequences that go on side by side, with transformers' caches of keys and values.

Legend: B sequences, T tokens, S tokens cached, V vocabulary, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad

from torch_backend import attention
from torch_backend.objectives import Head


class Rows:
    """Sequences of one model; with width 1 one at a time, in the cache that the zoo has for it.

    A prompt is computed alone, then its keys and values join the others', moved right so that all end together.
    """

    def __init__(self, zoo: Any, head: Head, *, width: int) -> None:
        self.zoo, self.head, self.width = zoo, head, width
        self.cache: Any = None
        self.lengths: list[int] = []  # of the sequences; the cache is as long as the longest

    def add(self, tokens: Sequence[int]) -> np.ndarray:
        """Begin one more sequence; return (V,) float32 logits of what follows it."""
        from transformers import DynamicCache

        own = DynamicCache() if self.width > 1 else DynamicCache(config=self.zoo.config)
        logits_V = self.feed([tokens], own)[0]
        if self.lengths:
            join(self.cache, own)
        else:
            self.cache = own
        self.lengths.append(len(tokens))
        return logits_V

    def step(self, tokens: Sequence[int]) -> np.ndarray:
        """Put one token behind every sequence; return (B, V) float32 logits of what follows."""
        places = self.places() if self.width > 1 else {}
        self.lengths = [length + 1 for length in self.lengths]
        return self.feed([[token] for token in tokens], self.cache, **places)

    def keep(self, rows: Sequence[int]) -> None:
        """Forget all sequences but these."""
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
        if self.zoo.config._attn_implementation == attention.NAME:
            return {"position_ids": lengths_B[:, None], "pads": pads_B}
        there_S = torch.arange(max(self.lengths) + 1, device=self.zoo.device)
        return {"position_ids": lengths_B[:, None], "attention_mask": (there_S >= pads_B[:, None]).long()}

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
    from transformers.cache_utils import DynamicLayer

    if zoo.config._attn_implementation == attention.NAME:
        return True
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=zoo.config).layers)


def join(cache: Any, other: Any) -> None:
    """Put the sequences of another cache behind those of a cache, all moved right to the same end."""
    for layer, new in zip(cache.layers, other.layers, strict=True):
        longest = max(layer.keys.shape[-2], new.keys.shape[-2])
        layer.keys, layer.values = (
            torch.cat([pad(x, (0, 0, longest - x.shape[-2], 0)) for x in pair])
            for pair in ((layer.keys, new.keys), (layer.values, new.values))
        )
