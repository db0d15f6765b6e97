"""Causal attention over packed rows: every example attends to itself only, so nothing is masked away or wasted.

mlx-lm's models pass a cache to every layer and to the mask; ours says where the examples lie.
Legend: B rows, T tokens, C channels, H heads, K head width, G query heads per key head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, cast

import mlx.core as mx
import numpy as np

from mlxlora.elementwise import exp, on_gpu, row_sums
from mlxlora.rotary import rotate
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
BLOCK = 128  # query rows computed at once on a CPU, at most: keys behind a block's last row are left out
JOIN = 2**16  # scores that cost what one more call does: an example is filled up to a longer one for fewer
MASKED = -1e30


class Group:
    """Examples that stand side by side and go through attention in one call, each filled up to the first, the longest.

    What fills up stands behind an example, where causal attention does not look, and no gradient comes from there.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.count, self.longest, self.size = len(lengths), lengths[0], sum(lengths)
        self.is_even = self.size == self.count * self.longest
        if self.is_even:
            return
        times_T, lengths_N1 = np.arange(self.longest), np.array(lengths)[:, None]
        starts_N1, own_NT = np.cumsum(lengths)[:, None] - lengths_N1, times_T < lengths_N1
        places, back = mx.array((starts_N1 + times_T * own_NT).reshape(-1)), mx.array(np.flatnonzero(own_NT))
        own_M1: np.ndarray = own_NT.reshape(-1, 1)
        self.move_out, self.move_back = moving(places, back), moving(back, places, own=mx.array(own_M1))

    def spread(self, x_BTC: mx.array) -> mx.array:
        """Return (B, count * longest, C) of (B, size, C)."""
        return x_BTC if self.is_even else self.move_out(x_BTC)

    def gather(self, y_BTC: mx.array) -> mx.array:
        """Return (B, size, C) of (B, count * longest, C)."""
        return y_BTC if self.is_even else self.move_back(y_BTC)


def moving(there: mx.array, back: mx.array, *, own: mx.array | None = None) -> Callable[[mx.array], mx.array]:
    """Return a function that takes positions `there` of (B, T, C).

    Its gradient takes positions `back`, all or those that are `own`: MLX's own adds row by row, twelve times as slow.
    """

    @mx.custom_function
    def move(x_BTC: mx.array) -> mx.array:
        return mx.take(x_BTC, there, axis=1)

    @move.vjp
    def backward(_primals: Any, grad_BTC: mx.array, _output: mx.array) -> mx.array:
        moved = mx.take(grad_BTC, back, axis=1)
        return moved if own is None else moved * own.astype(moved.dtype)

    return cast(Callable[[mx.array], mx.array], move)


class Segments:
    """What stands in a layer's cache during training: the lengths of the examples packed into each row.

    For rows of one example each it is the one length of all, padding included.
    """

    offset = 0

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = lengths
        self.groups: dict[int, list[Group]] = {}

    def make_mask(self, length: int, *, return_array: bool = False, window_size: int | None = None) -> Any:
        """Return None: the attention knows the segments; raises where a window would cut into one."""
        if window_size is not None and max(self.lengths) > window_size:
            raise NotImplementedError(f"a window of {window_size} positions over {max(self.lengths)} packed ones")
        return None

    def groups_for(self, heads: int) -> list[Group]:
        """Return the examples in groups whose lengths are close enough for a layer of so many heads."""
        if heads not in self.groups:
            found: list[list[int]] = []
            for length in self.lengths:
                first = found[-1][0] if found else 0
                if 0 <= heads * (first**2 - length**2) <= JOIN:
                    found[-1].append(length)
                else:
                    found.append([length])
            self.groups[heads] = [Group(lengths) for lengths in found]
        return self.groups[heads]


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
            groups = cache.groups_for(heads_of(self)[0])
            parts = [pieces(projected(x_BTD), groups) for projected in (self.q_proj, self.k_proj, self.v_proj)]
            outputs = [attend(self, *qkv, group=group) for group, *qkv in zip(groups, *parts, strict=True)]
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


def pieces(x_BTC: mx.array, groups: Sequence[Group]) -> list[mx.array]:
    """Return the positions of each group."""
    return list(mx.split(x_BTC, np.cumsum([group.size for group in groups])[:-1].tolist(), axis=1))


def attend(layer: Any, q: mx.array, k: mx.array, v: mx.array, *, group: Group) -> mx.array:
    """Return (B, T, C) of the positions of a group in every row."""

    def heads(x: mx.array, number: int, norm: Any = None) -> mx.array:
        x = group.spread(x).reshape(len(x) * group.count, group.longest, number, -1)
        return (x if norm is None else norm(x)).transpose(0, 2, 1, 3)

    query_heads, key_heads = heads_of(layer)
    rows, window = len(q), getattr(layer, "window", None)
    q, k, v = heads(q, query_heads, layer.get("q_norm")), heads(k, key_heads, layer.get("k_norm")), heads(v, key_heads)
    q, k = rotate(layer, q, k)
    y = causal(q, k, v, scale=layer.scale, window=window).transpose(0, 2, 1, 3)
    return group.gather(y.reshape(rows, group.count * group.longest, -1))


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
    q = q * scale
    for start, stop in blocks(q.shape[-2]):
        seen = kept(start, stop, window=window)
        s = scores(q, k, start, stop) + (1 - seen) * MASKED
        top = s.max(axis=-1, keepdims=True)
        p = exp(s - top) * seen
        total = row_sums(p)
        outputs.append(((p @ v[..., :stop, :]) / total).astype(dtype))
        norms.append(top + mx.log(total))
    return [joined(outputs), joined(norms)]


def gradients(
    primals: Sequence[mx.array], dout: mx.array, outputs: Sequence[mx.array], *, scale: float, window: int | None
) -> list[mx.array]:
    """Return the gradients of q, k and v; the probabilities are computed again."""
    q, k, v, dout, out, norm = wide(*primals, dout, *outputs)
    delta = (dout * out).sum(axis=-1, keepdims=True)
    q, dq, dk, dv = q * scale, [], mx.zeros_like(k), mx.zeros_like(v)
    for start, stop in blocks(q.shape[-2]):
        at = (..., slice(start, stop), slice(None))
        seen = kept(start, stop, window=window)
        p = exp(scores(q, k, start, stop) - norm[at] + (1 - seen) * MASKED) * seen
        ds = p * (dout[at] @ v[..., :stop, :].swapaxes(-1, -2) - delta[at])
        dq.append((ds @ k[..., :stop, :]) * scale)
        dk = dk.at[..., :stop, :].add((ds.swapaxes(-1, -2) @ q[at]).sum(axis=2, keepdims=True))
        dv = dv.at[..., :stop, :].add((p.swapaxes(-1, -2) @ dout[at]).sum(axis=2, keepdims=True))
    return [grad.astype(primals[0].dtype) for grad in (joined(dq), dk, dv)]


def joined(pieces: Sequence[mx.array]) -> mx.array:
    """Return blocks of rows as one."""
    return pieces[0] if len(pieces) == 1 else mx.concatenate(list(pieces), axis=-2)


def wide(*arrays: mx.array) -> list[mx.array]:
    """Return the arrays in float32: in bfloat16 scores and sums would be four times as far off as MLX's own."""
    return [array.astype(mx.float32) for array in arrays]


def scores(q: mx.array, k: mx.array, start: int, stop: int) -> mx.array:
    """Return the scores of rows [start, stop) over columns [0, stop)."""
    return q[..., start:stop, :] @ k[..., :stop, :].swapaxes(-1, -2)


def kept(start: int, stop: int, *, window: int | None) -> mx.array:
    """Return (stop - start, stop): 1 where a row sees a column, 0 behind it and before its window."""
    here, there = mx.arange(start, stop)[:, None], mx.arange(stop)[None]
    seen = there <= here
    return (seen if window is None else seen & (there > here - window)).astype(mx.float32)


def blocks(length: int) -> Iterator[tuple[int, int]]:
    """Yield [start, stop) of the blocks of rows, all of about one size: the fewest scores that nothing sees."""
    size = -(-length // -(-length // BLOCK))
    yield from ((start, min(start + size, length)) for start in range(0, length, size))
