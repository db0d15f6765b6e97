"""Causal attention over packed rows: every example attends to itself only, so nothing is masked away or wasted.

Registered under a name with transformers, whose models then call it; `segments` reaches it as one more keyword.
Legend: B rows, H heads, T tokens, K head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from inspect import signature
from typing import Any, cast

import torch
from torch.nn.functional import scaled_dot_product_attention

from shared.families import CHECKED

NAME = "mlxlora"
WIDEST = 192  # head width for which flash attention has gradients on every GPU; it has to be a multiple of 8
PACKABLE = CHECKED | {
    "cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "granite", "mixtral", "olmo2", "phi3",
    "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "starcoder2",
}  # proven exact by tests/parity/test_packing.py  # fmt: skip


PADDABLE = PACKABLE | {"glm", "olmo3"}  # on the left too: tests/parity/test_padding.py


def register() -> str:
    """Make `attend` known to transformers; return the name it has there. No mask is then built beforehand."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    return NAME


def left_padded(zoo: Any, pads_B: torch.Tensor, *, length: int) -> dict[str, torch.Tensor]:
    """Return what tells a decoder that the first positions of rows are padding: our attention, or the zoo's mask."""
    if zoo.config._attn_implementation == NAME:
        return {"pads": pads_B}
    there_S = torch.arange(length, device=pads_B.device)
    return {"attention_mask": (there_S >= pads_B[:, None]).long()}


def attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
    *, scaling: float, dropout: float = 0.0, segments: Sequence[int] | None = None, bounds: torch.Tensor | None = None,
    sliding_window: int | None = None, softcap: float | None = None, s_aux: torch.Tensor | None = None,
    pads: torch.Tensor | None = None, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Return (B, T, H, K) and None, as transformers' attention functions do.

    query: (B, H, T, K); key and value: (B, KV heads, cached + T, K). segments: lengths of the examples packed into the
    one row, in order; None: every row is one example, padded. bounds: (examples + 1,) int32 on the
    device, where each of them begins and the last one ends; needed by a kernel that takes them all. pads: (B,) how many
    positions stand in front of each row's first token, which nothing but themselves attends to.
    """
    if attention_mask is not None or dropout or s_aux is not None:
        raise NotImplementedError(f"attention of {type(module).__name__} with a mask, dropout or sinks")
    options: dict[str, Any] = {"scaling": scaling, "window": sliding_window, "softcap": softcap, "pads": pads}
    if segments is None or len(segments) == 1:
        return causal(query, key, value, **options).transpose(1, 2).contiguous(), None
    if bounds is not None and softcap is None and has_kernel(query):
        limits = {"longest": max(segments), "window": sliding_window}
        return packed(query, key, value, bounds, scaling=scaling, **limits), None
    parts = [part.split(tuple(segments), dim=2) for part in (query, key, value)]
    outputs = [causal(q, k, v, **options).transpose(1, 2) for q, k, v in zip(*parts, strict=True)]
    return torch.cat(outputs, dim=1), None


def causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scaling: float, window: int | None,
    softcap: float | None, pads: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Return (B, H, T, K): each position attends to itself and what stands before it, `window` positions at most."""
    T, S = query.shape[2], key.shape[2]
    shared_heads = query.shape[1] != key.shape[1]
    if softcap is None and T == S and pads is None and (window is None or window >= S):
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=shared_heads)
    here, there = torch.arange(S - T, S, device=query.device)[:, None], torch.arange(S, device=query.device)
    seen_TS = (there <= here) & (there > here - (window or S))
    if pads is not None:
        seen_TS = (seen_TS & (there >= pads[:, None, None, None])) | (here == there)  # (B, 1, T, S)
    if softcap is None:
        return scaled_dot_product_attention(
            query, key, value, attn_mask=seen_TS, scale=scaling, enable_gqa=shared_heads
        )
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = softcap * torch.tanh(query @ key.mT * (scaling / softcap))
    share = scores.masked_fill(~seen_TS, float("-inf")).softmax(dim=-1, dtype=torch.float32)
    return share.to(value.dtype) @ value


@cache
def kernel() -> Callable[..., torch.Tensor] | None:
    """Return torch's own attention over packed rows, or None where it takes no scale and no windows (2.10)."""
    if find_spec("torch.nn.attention.varlen") is None:
        return None
    from torch.nn.attention.varlen import varlen_attn

    takes_all = {"scale", "window_size"} <= signature(varlen_attn).parameters.keys()
    return cast(Callable[..., torch.Tensor], varlen_attn) if takes_all else None


def has_kernel(query: torch.Tensor) -> bool:
    """Return whether `packed` can take this query: flash attention on CUDA, from Ampere on, in half precision."""
    width = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and width % 8 == 0
        and width <= WIDEST
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and kernel() is not None
    )


def packed(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, *, scaling: float,
    longest: int, window: int | None,
) -> torch.Tensor:  # fmt: skip
    """Return (1, T, H, K): what `causal` gives for every example, all in one kernel."""
    attention = kernel()
    assert attention is not None
    if key.shape[1] != query.shape[1] and "enable_gqa" not in signature(attention).parameters:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    shared_heads = {"enable_gqa": True} if key.shape[1] != query.shape[1] else {}
    rows = [part[0].transpose(0, 1) for part in (query, key, value)]  # (T, heads, K)
    left = -1 if window is None or window >= longest else window - 1  # the position itself is not counted
    found = attention(*rows, bounds, bounds, longest, longest, scale=scaling, window_size=(left, 0), **shared_heads)
    return found[None]
