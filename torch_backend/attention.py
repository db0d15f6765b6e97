"""Causal attention over packed rows: every example attends to itself only, so nothing is masked away or wasted.

Registered under a name with transformers, whose models then call it; `segments` reaches it as one more keyword.
Legend: B rows, H heads, T tokens, K head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from shared.families import CHECKED

NAME = "mlxlora"
PACKABLE = CHECKED | {
    "cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "granite", "olmo2", "phi3", "qwen3", "smollm3", "starcoder2",
}  # proven exact by tests/parity/test_packing.py  # fmt: skip


def register() -> str:
    """Make `attend` known to transformers; return the name it has there. No mask is then built beforehand."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    return NAME


def attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
    *, scaling: float, dropout: float = 0.0, segments: Sequence[int] | None = None, sliding_window: int | None = None,
    softcap: float | None = None, s_aux: torch.Tensor | None = None, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Return (B, T, H, K) and None, as transformers' attention functions do.

    query: (B, H, T, K); key and value: (B, KV heads, cached + T, K). segments: lengths of the examples packed into the
    one row, in order; None: every row is one example, padded on the right at most.
    """
    if attention_mask is not None or dropout or s_aux is not None:
        raise NotImplementedError(f"attention of {type(module).__name__} with a mask, dropout or sinks")
    options = {"scaling": scaling, "window": sliding_window, "softcap": softcap}
    if segments is None or len(segments) == 1:
        return causal(query, key, value, **options).transpose(1, 2).contiguous(), None
    parts = [part.split(tuple(segments), dim=2) for part in (query, key, value)]
    outputs = [causal(q, k, v, **options).transpose(1, 2) for q, k, v in zip(*parts, strict=True)]
    return torch.cat(outputs, dim=1), None


def causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scaling: float, window: int | None,
    softcap: float | None,
) -> torch.Tensor:  # fmt: skip
    """Return (B, H, T, K): each position attends to itself and what stands before it, `window` positions at most."""
    T, S = query.shape[2], key.shape[2]
    shared_heads = query.shape[1] != key.shape[1]
    if softcap is None and T == S and (window is None or window >= S):
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=shared_heads)
    here, there = torch.arange(S - T, S, device=query.device)[:, None], torch.arange(S, device=query.device)
    seen_TS = (there <= here) & (there > here - (window or S))
    if softcap is None:
        return scaled_dot_product_attention(
            query, key, value, attn_mask=seen_TS, scale=scaling, enable_gqa=shared_heads
        )
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = softcap * torch.tanh(query @ key.mT * (scaling / softcap))
    share = scores.masked_fill(~seen_TS, float("-inf")).softmax(dim=-1, dtype=torch.float32)
    return share.to(value.dtype) @ value
