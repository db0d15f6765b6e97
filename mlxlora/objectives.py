"""The head and the loss on supervised positions only: logits exist for one tile, or one chunk of positions, at a time.

Legend: N supervised positions, C of them at once, D model width, V vocabulary, T tokens of it at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx

from mlxlora.decoders import BLOCK_SIZE
from mlxlora.elementwise import exp, long_sums, on_gpu, softplus
from mlxlora.quantized import base_arrays
from shared.families import HeadFacts

CHUNK_ELEMENTS = 3 * 2**20  # logits of one chunk: 12 MiB in float32; MLX begins several before the first is done
LEAST_ROWS = 96
TILE_ROWS = 512  # positions of one tile over a frozen head
TILE_ELEMENTS = 2**20  # logits of one tile: 4 MiB in float32, which a CPU's cache holds
TILE_ELEMENTS_GPU = 2**22  # not measured
DECODED = BLOCK_SIZE  # weights decoded for one tile on a CPU, at most: a cache holds them, and no decoder cuts them
LEAST_SUM = 1e-30  # of a tile whose every logit is far below the highest so far
LOWEST = -3e38  # a logit that nothing is below but -inf


@dataclass(frozen=True)
class Head:
    """The output layer: hidden states -> logits, as the family computes them."""

    module: Any  # Linear, Embedding, or a quantized one of ours
    facts: HeadFacts

    def weight(self, dtype: mx.Dtype) -> mx.array:
        """Return the (V, D) weight, decoded where it is quantized."""
        return self.module.decoded(dtype) if hasattr(self.module, "decoded") else self.module.weight.astype(dtype)

    @property
    def by_rows(self) -> bool:
        """Return whether the weight is packed, some of its rows can be decoded alone, and all would be too many."""
        return getattr(self.module, "by_rows", False) and self.vocabulary * self.width > DECODED

    def row_arrays(self, dtype: mx.Dtype, arrays: Sequence[mx.array]) -> list[mx.array]:
        """Return what holds the weight, with a row for every token: as it is where it goes `by_rows`, else decoded."""
        if self.by_rows or not hasattr(self.module, "decode"):
            return list(arrays)
        return [self.module.decode(arrays).astype(dtype)]

    def decode_rows(self, dtype: mx.Dtype, parts: Sequence[mx.array]) -> mx.array:
        """Return rows of the weight from those rows of each of `row_arrays`, no more than `tile_columns`."""
        return (self.module.decode(parts) if self.by_rows else parts[0]).astype(dtype)

    @property
    def vocabulary(self) -> int:
        """Return V."""
        return self.shape[0]

    @property
    def width(self) -> int:
        """Return D."""
        return self.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """Return (V, D)."""
        return self.module._stored.shape if hasattr(self.module, "_stored") else self.module.weight.shape

    @property
    def bias(self) -> mx.array | None:
        """Return the (V,) bias or None."""
        return self.module.get("bias")

    def logits(self, h_ND: mx.array) -> mx.array:
        """Return (N, V) float32 logits; for a few positions, as generation needs."""
        return self.chunk(h_ND, self.weight(h_ND.dtype))

    def chunk(self, h_ND: mx.array, weight_VD: mx.array) -> mx.array:
        """Return (N, V) float32 logits over a weight of this head; `mlxlora.ends` where it has an adapter."""
        if hasattr(self.module, "adapted"):
            return finish(self.module.adapted(h_ND, weight_VD), self.module.base.get("bias"), self.facts)
        return chunk_logits(h_ND, weight_VD, self.bias, self.facts)


def chunk_logits(h_ND: mx.array, weight_VD: mx.array, bias: mx.array | None, facts: HeadFacts) -> mx.array:
    """Return (N, V) float32 logits with the family's scale and soft-cap."""
    return finish(h_ND @ weight_VD.T, bias, facts)


def finish(z_NV: mx.array, bias: mx.array | None, facts: HeadFacts) -> mx.array:
    """Return float32 logits of h W.T: bias, scale and soft-cap."""
    z_NV = (z_NV if bias is None else z_NV + bias).astype(mx.float32)
    if facts.scale != 1.0:
        z_NV = z_NV * facts.scale
    return z_NV if facts.softcap is None else facts.softcap * mx.tanh(z_NV / facts.softcap)


def chunk_rows(vocabulary: int) -> int:
    """Return how many positions one chunk holds."""
    return max(CHUNK_ELEMENTS // vocabulary, LEAST_ROWS)


def tile_sizes(positions: int) -> tuple[int, int]:
    """Return how many positions and how many tokens of the vocabulary one tile holds."""
    rows = max(min(positions, TILE_ROWS), 1)
    return rows, (TILE_ELEMENTS_GPU if on_gpu() else TILE_ELEMENTS) // rows


def log_probs(h_ND: mx.array, head: Head, targets_N: mx.array) -> mx.array:
    """Return (N,) float32 log-probabilities of the targets, at least one, without gradients."""
    out = []
    if not hasattr(head.module, "adapted"):
        arrays = head.row_arrays(h_ND.dtype, base_arrays(head.module))
        for _, sums in tiled_sums(h_ND, head, arrays, head.bias, targets_N, slopes=False):
            out.append(-softplus(sums.lead_C))
            mx.eval(out[-1])  # one row of tiles at a time
        return mx.concatenate(out)
    weight_VD = head.weight(h_ND.dtype)
    rows = chunk_rows(len(weight_VD))
    for start in range(0, len(h_ND), rows):
        z_CV = head.chunk(h_ND[start : start + rows], weight_VD)
        at_target_C = mx.take_along_axis(z_CV, targets_N[start : start + rows, None], axis=1)[:, 0]
        top_C1 = z_CV.max(axis=1, keepdims=True)
        out.append(at_target_C - top_C1[:, 0] - mx.log(long_sums(exp(z_CV - top_C1))))
        mx.eval(out[-1])  # one chunk of logits at a time
    return mx.concatenate(out)


def tiled_sft(head: Head) -> Callable[..., list[mx.array]]:
    """Return the sum of -w * log p(target) over a frozen head as a function of (h, targets, weights, bias, *arrays).

    It returns [loss, dh]: h's gradient is computed in the forward pass, tile by tile, and the backward pass scales it.
    """

    @mx.custom_function
    def loss(
        h_ND: mx.array, targets_N: mx.array, weights_N: mx.array, bias_V: mx.array, *arrays: mx.array
    ) -> list[mx.array]:
        return tiled_loss(h_ND, head, arrays, bias_V if bias_V.size else None, targets_N, weights_N)

    @loss.vjp
    def backward(primals: list[mx.array], cotangents: list[mx.array], outputs: list[mx.array]) -> list[mx.array]:
        dh_ND = cotangents[0].astype(outputs[1].dtype) * outputs[1]
        return [dh_ND, *(mx.zeros_like(primal) for primal in primals[1:])]

    return cast(Callable[..., list[mx.array]], loss)


def chunked_sft(facts: HeadFacts) -> Callable[..., list[mx.array]]:
    """Return the sum of -w * log p(target) over a trained head as a function of (h, weight, bias, targets, weights).

    It returns [loss, dh, dweight, dbias]: the gradients are computed in the forward pass, chunk by chunk, and
    the backward pass only scales them.
    """

    @mx.custom_function
    def loss(
        h_ND: mx.array, weight_VD: mx.array, bias_V: mx.array, targets_N: mx.array, weights_N: mx.array
    ) -> list[mx.array]:
        return loss_and_gradients(h_ND, weight_VD, bias_V, targets_N, weights_N, facts=facts)

    @loss.vjp
    def backward(primals: list[mx.array], cotangents: list[mx.array], outputs: list[mx.array]) -> list[mx.array]:
        pairs = zip(primals[:3], outputs[1:], strict=True)
        grads = [(cotangents[0] * grad).astype(primal.dtype) for primal, grad in pairs]
        return [*grads, mx.zeros_like(primals[3]), mx.zeros_like(primals[4])]

    return cast(Callable[..., list[mx.array]], loss)


def loss_and_gradients(
    h_ND: mx.array, weight_VD: mx.array, bias_V: mx.array, targets_N: mx.array, weights_N: mx.array, *, facts: HeadFacts
) -> list[mx.array]:
    """Return the summed loss and the gradients of h, weight and bias."""
    bias, rows = bias_V if bias_V.size else None, chunk_rows(weight_VD.shape[0])
    total, slopes = mx.zeros(()), []
    dw_VD, db_V = mx.zeros(weight_VD.shape), mx.zeros(bias_V.shape)
    for start in range(0, h_ND.shape[0], rows):
        at, h_CD = slice(start, start + rows), h_ND[start : start + rows]
        if slopes:  # one chunk after the other, so that few have their logits in memory
            h_CD = mx.depends([h_CD], [slopes[-1], total, dw_VD])[0]
        chunk, slope_CV, share_C, hit_C = chunk_loss(h_CD, weight_VD, bias, targets_N[at], weights_N[at], facts)
        total = total + chunk
        slopes.append(share_C[:, None] * (slope_CV @ weight_VD) - hit_C[:, None] * weight_VD[targets_N[at]])
        dw = (slope_CV.T @ (share_C[:, None] * h_CD)).astype(mx.float32)
        dw_VD = (dw_VD + dw).at[targets_N[at]].add(-(hit_C[:, None] * h_CD).astype(mx.float32))
        if bias is not None:
            db_V = (db_V + (share_C @ slope_CV).astype(mx.float32)).at[targets_N[at]].add(-hit_C)
    return [total, mx.concatenate(slopes), dw_VD, db_V]


def chunk_loss(
    h_CD: mx.array, weight_VD: mx.array, bias: mx.array | None, target_C: mx.array, w_C: mx.array, facts: HeadFacts
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Return the summed loss of one chunk and its gradient with respect to h W.T + b, in three parts.

    With q = 1 - p(target), the gradient is w * scale * curve * (q * softmax of the others - q * onehot), curve being
    that of the soft-cap: (C, V) of the softmax, 0 at the target, to be multiplied by (C,), which costs less after a
    matmul, and (C,) of the onehot, to be taken off at the target.
    """
    return logits_loss(chunk_logits(h_CD, weight_VD, bias, facts), target_C, w_C, facts, dtype=h_CD.dtype)


def logits_loss(
    z_CV: mx.array, target_C: mx.array, w_C: mx.array, facts: HeadFacts, *, dtype: mx.Dtype
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Return what `chunk_loss` does, of finished logits; gradients in `dtype`."""
    sums, slope_CV = others(empty_sums(z_CV, slopes=False), z_CV, target_C, facts)
    hit_C = w_C * facts.scale * mx.sigmoid(sums.lead_C)
    share_C, curve_C = hit_C / mx.maximum(sums.e_C, LEAST_SUM), curve(sums.at_target_C, facts)
    if dtype != mx.float32:  # float16 may not hold a matmul over the vocabulary without the shares
        slope_CV, share_C = (slope_CV * share_C[:, None]).astype(dtype), mx.ones_like(share_C)
    total = (softplus(sums.lead_C) * w_C).sum()
    return total, slope_CV, share_C.astype(dtype), (hit_C * curve_C).astype(dtype)


@dataclass(frozen=True)
class TileSums:
    """What is known of C positions once some tiles of the vocabulary are done; e = exp(z - top) of all but the target.

    The target stands apart: beside one that is nearly certain the others' shares would be lost in rounding.
    """

    top_C1: mx.array  # the highest logit of the others
    e_C: mx.array  # the sum of e
    at_target_C: mx.array  # the target's logit; not a number until its tile has come
    slope_CD: mx.array | None = None  # the sum of e times the soft-cap's curve times the head's rows

    @property
    def lead_C(self) -> mx.array:
        """Return by how much all others together lead the target, in nats; the loss is softplus of it."""
        return self.top_C1[:, 0] - self.at_target_C + mx.log(self.e_C)  # equal logits cancel before small ones add


def tiled_loss(
    h_ND: mx.array, head: Head, arrays: Sequence[mx.array], bias: mx.array | None, targets_N: mx.array,
    weights_N: mx.array,
) -> list[mx.array]:  # fmt: skip
    """Return the summed loss over a frozen head and the gradient of h."""
    total, grads, arrays = mx.zeros(()), [], head.row_arrays(h_ND.dtype, arrays)
    for at, sums in tiled_sums(h_ND, head, arrays, bias, targets_N, slopes=True, behind=grads):
        total = total + (softplus(sums.lead_C) * weights_N[at]).sum()
        target_CD = target_rows(head, arrays, targets_N[at], h_ND.dtype)
        grads.append(hidden_gradient(sums, target_CD, weights_N[at], head.facts).astype(h_ND.dtype))
    return [total, mx.concatenate(grads)]


def target_rows(head: Head, arrays: Sequence[mx.array], target_C: mx.array, dtype: mx.Dtype) -> mx.array:
    """Return the targets' rows of the weight (C, D), no more of them at once than a tile may have."""
    most = tile_columns(head, len(target_C))
    parts = [target_C[first : first + most] for first in range(0, len(target_C), most)]
    return mx.concatenate([head.decode_rows(dtype, [array[some] for array in arrays]) for some in parts])


def tile_columns(head: Head, positions: int) -> int:
    """Return how many tokens of the vocabulary a tile of a head holds: of a packed one what is decoded at once."""
    columns = tile_sizes(positions)[1]
    return max(min(columns, DECODED // head.width), 1) if head.by_rows and not on_gpu() else columns


def tiled_sums(
    h_ND: mx.array, head: Head, arrays: Sequence[mx.array], bias: mx.array | None, targets_N: mx.array, *,
    slopes: bool, behind: Sequence[mx.array] = (),
) -> Iterator[tuple[slice, TileSums]]:  # fmt: skip
    """Yield some positions and their sums over the vocabulary, tile by tile.

    The softmax is kept up over tiles as attention's is over blocks of keys, the head's rows being keys and values:
    every logit is computed once, whatever the vocabulary. Source: Milakov and Gimelshein 2018, algorithm 3.
    arrays: `Head.row_arrays`; behind: what was made of the positions so far, which is computed before the next ones.
    """
    rows, columns = tile_sizes(len(h_ND))[0], tile_columns(head, len(h_ND))
    done: list[mx.array] = []
    for start in range(0, len(h_ND), rows):
        at, done = slice(start, start + rows), [*behind[-1:]] or done
        sums = empty_sums(h_ND[at], slopes=slopes)
        for first in range(0, head.vocabulary, columns):
            some, h_CD = slice(first, first + columns), h_ND[at]
            parts = [array[some] for array in arrays]
            if done:  # one tile after the other, what is decoded for it too
                h_CD, *packed = mx.depends([h_CD, *(parts if head.by_rows else ())], done)
                parts = packed or parts
            weight_TD, bias_T = head.decode_rows(h_ND.dtype, parts), None if bias is None else bias[some]
            sums = add_tile(sums, h_CD, weight_TD, bias_T, targets_N[at] - first, head.facts)
            done = [part for part in (sums.top_C1, sums.e_C, sums.at_target_C, sums.slope_CD) if part is not None]
        yield at, sums


def empty_sums(h_CD: mx.array, *, slopes: bool) -> TileSums:
    """Return the sums before the first tile."""
    top_C1, slope_CD = mx.full((len(h_CD), 1), LOWEST), mx.zeros(h_CD.shape) if slopes else None
    return TileSums(top_C1, mx.zeros(len(h_CD)), mx.full(len(h_CD), math.nan), slope_CD)


def add_tile(
    sums: TileSums, h_CD: mx.array, weight_TD: mx.array, bias_T: mx.array | None, target_C: mx.array, facts: HeadFacts
) -> TileSums:
    """Return the sums with one more tile; targets are counted from its first token, and may lie outside."""
    more, slope_CT = others(sums, chunk_logits(h_CD, weight_TD, bias_T, facts), target_C, facts)
    less_C1, slope_CD = exp(sums.top_C1 - more.top_C1), sums.slope_CD
    if slope_CD is not None:
        slope_CD = add_rows(slope_CD * less_C1, slope_CT, more.e_C, weight_TD)
    return TileSums(more.top_C1, sums.e_C * less_C1[:, 0] + more.e_C, more.at_target_C, slope_CD)


def others(sums: TileSums, z_CT: mx.array, target_C: mx.array, facts: HeadFacts) -> tuple[TileSums, mx.array]:
    """Return the sums of one tile alone, its top and the target's logit those of all so far, and e times the curve."""
    own_C, near_C = (target_C >= 0) & (target_C < z_CT.shape[1]), mx.clip(target_C, 0, z_CT.shape[1] - 1)
    at_near_C1 = mx.take_along_axis(z_CT, near_C[:, None], axis=1)
    known_C1 = mx.where(at_near_C1 == mx.inf, math.nan, at_near_C1)  # an overflow, which would lead all others
    rest_CT = mx.put_along_axis(z_CT, near_C[:, None], mx.where(own_C[:, None], LOWEST, at_near_C1), axis=1)
    top_C1 = mx.maximum(rest_CT.max(axis=1, keepdims=True), sums.top_C1)  # never below LOWEST: -inf - -inf is no number
    e_CT = exp(rest_CT - top_C1)
    slope_CT = e_CT if facts.softcap is None else e_CT * curve(z_CT, facts)
    return TileSums(top_C1, long_sums(e_CT), mx.where(own_C, known_C1[:, 0], sums.at_target_C)), slope_CT


def curve(z: mx.array, facts: HeadFacts) -> mx.array:
    """Return the derivative of the soft-cap at what it gave, 1 without."""
    return mx.ones_like(z) if facts.softcap is None else 1 - (z / facts.softcap) ** 2


def add_rows(sums_CD: mx.array, slope_CT: mx.array, e_C: mx.array, weight_TD: mx.array) -> mx.array:
    """Return sums + slope W in float32."""
    if weight_TD.dtype == mx.float32:
        return mx.addmm(sums_CD, slope_CT, weight_TD)
    e_C1 = mx.maximum(e_C, LEAST_SUM)[:, None]  # float16 may not hold a sum of rows but their mean
    return sums_CD + ((slope_CT / e_C1).astype(weight_TD.dtype) @ weight_TD).astype(mx.float32) * e_C1


def hidden_gradient(sums: TileSums, target_CD: mx.array, w_C: mx.array, facts: HeadFacts) -> mx.array:
    """Return the gradient of C positions' h in float32, once all tiles are done.

    With q = sigmoid(lead), what the target lacks of 1: w scale q (the others' mean row - the target's row), each times
    its soft-cap's curve.
    """
    assert sums.slope_CD is not None
    share_C1 = (w_C * facts.scale * mx.sigmoid(sums.lead_C))[:, None]
    mean_CD = sums.slope_CD / mx.maximum(sums.e_C, LEAST_SUM)[:, None]
    return share_C1 * (mean_CD - curve(sums.at_target_C, facts)[:, None] * target_CD.astype(mx.float32))


def sft(h_ND: mx.array, head: Head, targets_N: mx.array, weights_N: mx.array, *, train_head: bool) -> mx.array:
    """Return the summed loss in nats of N positions, at least one; its formula is `shared.objectives.sft`."""
    if hasattr(head.module, "sft"):
        return head.module.sft(h_ND, targets_N, weights_N, head.facts)
    bias_V = head.bias if head.bias is not None else mx.zeros((0,))
    if not train_head:
        return tiled_sft(head)(h_ND, targets_N, weights_N, bias_V, *base_arrays(head.module))[0]
    return chunked_sft(head.facts)(h_ND, head.weight(h_ND.dtype), bias_V, targets_N, weights_N)[0]


OBJECTIVES = {"sft": sft}
