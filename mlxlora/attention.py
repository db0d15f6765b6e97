"""Causal attention over packed rows: every example attends to itself only, so nothing is masked away or wasted.

mlx-lm's models pass a cache to every layer and to the mask; ours says where the examples lie.
Legend: B rows, T tokens, H heads, K head width, G query heads per key head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any, cast

import mlx.core as mx

from mlxlora.elementwise import exp, on_gpu
from shared.families import CHECKED

PACKABLE = CHECKED | {
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "gemma",
    "granite",
    "qwen3",
    "smollm3",
    "starcoder2",
}  # proven exact by tests/parity/test_packing.py
PADDABLE = PACKABLE | {
    "cohere",
    "cohere2",
    "gemma3_text",
    "glm",
    "olmo2",
    "olmo3",
    "phi3",
}  # on the left too: tests/parity/test_padding.py; mlx-lm's Gemma 2 (0.32) takes no masks of several rows
BLOCK = 128  # query rows computed at once on a CPU: keys behind a block's last row are left out
MASKED = -1e30


class Segments:
    """What stands in a layer's cache during training: the lengths of the examples packed into each row.

    For rows of one example each it is the one length of all, padding included.
    """

    offset = 0

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = lengths

    def make_mask(self, length: int, *, return_array: bool = False, window_size: int | None = None) -> Any:
        """Return None: the attention knows the segments; raises where a window would cut into one."""
        if window_size is not None and max(self.lengths) > window_size:
            raise NotImplementedError(f"a window of {window_size} positions over {max(self.lengths)} packed ones")
        return None

    def slices(self) -> Iterator[tuple[slice, int]]:
        """Yield where examples of one length stand side by side, and how many they are."""
        start = 0
        for length, same in groupby(self.lengths):
            count = len(list(same))
            yield slice(start, start + count * length), count
            start += count * length


class LeftPadded:
    """What stands in a layer's cache during training where rows have padding in front: it keeps nothing.

    Positions count from 0 at each row's first token; padding sees itself alone, and nothing else sees it.
    """

    def __init__(self, pads_B: mx.array) -> None:
        self.pads_B, self.offset = pads_B, -pads_B

    def make_mask(self, length: int, *, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """Return (B, 1, T, T) bool: what every position sees."""
        here, there = mx.arange(length)[:, None], mx.arange(length)[None]
        seen_TT = (there <= here) & (there > here - (window_size or length))
        return (seen_TT & (there >= self.pads_B[:, None, None, None])) | (there == here)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Return the keys and values as they are."""
        return keys, values


@lru_cache(maxsize=16)
def packing(attention_class: type) -> type:
    """Return the class of an attention layer that also takes packed rows.

    It is given to single layers of the families where it is proven (`PACKABLE`); without `Segments` it is the zoo's.
    """

    class Packing(attention_class):
        def __call__(self, x_BTD: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
            if not isinstance(cache, Segments):
                return super().__call__(x_BTD, mask, cache)
            q, k, v = self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)
            outputs = [
                attend(self, q[:, at], k[:, at], v[:, at], count=count).reshape(len(x_BTD), at.stop - at.start, -1)
                for at, count in cache.slices()
            ]
            return self.o_proj(outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=1))

    Packing.__name__ = Packing.__qualname__ = f"Packing{attention_class.__name__}"
    return Packing


@lru_cache(maxsize=16)
def windowed(attention_class: type, positions: int) -> type:
    """Return the class of an attention layer whose positions see no further back than `positions`, itself included.

    It narrows the mask that the zoo hands to the layer, for families whose models apply no window.
    """

    class Windowed(attention_class):
        window = positions

        def __call__(self, x_BTD: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
            if not isinstance(cache, Segments):
                mask = narrowed(mask, positions, new=x_BTD.shape[1], cached=cache)
            return super().__call__(x_BTD, mask, cache)

    Windowed.__name__ = Windowed.__qualname__ = f"Windowed{attention_class.__name__}"
    return Windowed


def narrowed(mask: Any, window: int, *, new: int, cached: Any) -> Any:
    """Return a mask of (..., T, S) bool that hides what lies behind the window; as it is where nothing does."""
    total = mask.shape[-1] if isinstance(mask, mx.array) else new + (0 if cached is None else cached.offset)
    if total <= window:
        return mask
    here, there = mx.arange(total - new, total)[:, None], mx.arange(total)[None]
    seen_TS = (there <= here) & (there > here - window)
    return mask & seen_TS if isinstance(mask, mx.array) else seen_TS


def attend(layer: Any, q: mx.array, k: mx.array, v: mx.array, *, count: int) -> mx.array:
    """Return (B * count, T, H, K): in every row of q, k and v stand `count` examples of one length, side by side."""

    def heads(x: mx.array, number: int, norm: Any = None) -> mx.array:
        x = x.reshape(len(x) * count, x.shape[1] // count, number, -1)
        return (x if norm is None else norm(x)).transpose(0, 2, 1, 3)

    query_heads, key_heads = heads_of(layer)
    q, k, v = heads(q, query_heads, layer.get("q_norm")), heads(k, key_heads, layer.get("k_norm")), heads(v, key_heads)
    window = getattr(layer, "window", None)
    return causal(layer.rope(q), layer.rope(k), v, scale=layer.scale, window=window).transpose(0, 2, 1, 3)


def heads_of(layer: Any) -> tuple[int, int]:
    """Return how many heads queries and keys have; mlx-lm's families call them by two names."""
    plain = hasattr(layer, "n_heads")
    return (layer.n_heads, layer.n_kv_heads) if plain else (layer.num_heads, layer.num_key_value_heads)


def causal(q: mx.array, k: mx.array, v: mx.array, *, scale: float, window: int | None = None) -> mx.array:
    """Return (B, H, T, K): each position attends to itself and what stands before it, `window` positions at most."""
    B, H, T, K = q.shape
    window = None if window is None or window >= T else window
    if on_gpu():
        mask = "causal" if window is None else narrowed(None, window, new=T, cached=None)
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    groups = H // k.shape[1]
    wide = [q.reshape(B, -1, groups, T, K), k[:, :, None], v[:, :, None]]
    return blockwise(scale, window)(*wide)[0].reshape(B, H, T, K)


@lru_cache(maxsize=16)
def blockwise(scale: float, window: int | None = None) -> Callable[..., list[mx.array]]:
    """Return attention of q (B, H/G, G, T, K) over k and v (B, H/G, 1, T, K), gradients written by hand.

    Of the (T, T) probabilities nothing is kept but the log-sum-exp of each row. Source: Dao et al. 2022, appendix B.
    """

    @mx.custom_function
    def attention(q: mx.array, k: mx.array, v: mx.array) -> list[mx.array]:
        return forward(q, k, v, scale=scale, window=window)

    @attention.vjp
    def backward(primals: list[mx.array], cotangents: list[mx.array], outputs: list[mx.array]) -> list[mx.array]:
        return gradients(primals, cotangents[0], outputs, scale=scale, window=window)

    return cast(Callable[..., list[mx.array]], attention)


def forward(q: mx.array, k: mx.array, v: mx.array, *, scale: float, window: int | None) -> list[mx.array]:
    """Return the output and the log-sum-exp of every row's scores."""
    dtype, outputs, norms = q.dtype, [], []
    q, k, v = wide(q, k, v)
    for start, stop in blocks(q.shape[-2]):
        s = scores(q, k, start, stop, scale=scale, window=window)
        top = s.max(axis=-1, keepdims=True)
        p = exp(s - top) * kept(start, stop, q.dtype, window=window)
        total = p.sum(axis=-1, keepdims=True)
        outputs.append(((p @ v[..., :stop, :]) / total).astype(dtype))
        norms.append(top + mx.log(total))
    return [mx.concatenate(outputs, axis=-2), mx.concatenate(norms, axis=-2)]


def gradients(
    primals: Sequence[mx.array], dout: mx.array, outputs: Sequence[mx.array], *, scale: float, window: int | None
) -> list[mx.array]:
    """Return the gradients of q, k and v; the probabilities are computed again."""
    q, k, v, dout, out, norm = wide(*primals, dout, *outputs)
    delta = (dout * out).sum(axis=-1, keepdims=True)
    dq, dk, dv = [], mx.zeros_like(k), mx.zeros_like(v)
    for start, stop in blocks(q.shape[-2]):
        at = (..., slice(start, stop), slice(None))
        p = exp(scores(q, k, start, stop, scale=scale, window=window) - norm[at]) * kept(
            start, stop, q.dtype, window=window
        )
        ds = p * (dout[at] @ v[..., :stop, :].swapaxes(-1, -2) - delta[at]) * scale
        dq.append(ds @ k[..., :stop, :])
        dk = dk.at[..., :stop, :].add((ds.swapaxes(-1, -2) @ q[at]).sum(axis=2, keepdims=True))
        dv = dv.at[..., :stop, :].add((p.swapaxes(-1, -2) @ dout[at]).sum(axis=2, keepdims=True))
    return [grad.astype(primals[0].dtype) for grad in (mx.concatenate(dq, axis=-2), dk, dv)]


def wide(*arrays: mx.array) -> list[mx.array]:
    """Return the arrays in float32: in bfloat16 scores and sums would be four times as far off as MLX's own."""
    return [array.astype(mx.float32) for array in arrays]


def scores(q: mx.array, k: mx.array, start: int, stop: int, *, scale: float, window: int | None) -> mx.array:
    """Return the scores of rows [start, stop) over columns [0, stop)."""
    later = (1 - kept(start, stop, q.dtype, window=window)) * MASKED
    return (q[..., start:stop, :] * scale) @ k[..., :stop, :].swapaxes(-1, -2) + later


def kept(start: int, stop: int, dtype: mx.Dtype, *, window: int | None) -> mx.array:
    """Return (stop - start, stop): 1 where a row sees a column, 0 behind it and before its window."""
    here, there = mx.arange(start, stop)[:, None], mx.arange(stop)[None]
    seen = there <= here
    return (seen if window is None else seen & (there > here - window)).astype(dtype)


def blocks(length: int) -> Iterator[tuple[int, int]]:
    """Yield [start, stop) of the blocks of rows."""
    yield from ((start, min(start + BLOCK, length)) for start in range(0, length, BLOCK))
