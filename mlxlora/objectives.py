"""The head and the loss on supervised positions only: logits exist for one tile, or one chunk of positions, at a time.

Legend: N supervised positions, C of them at once, D model width, V vocabulary, T tokens of it at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx

from mlxlora.elementwise import exp, long_sums, on_gpu
from shared.families import HeadFacts

CHUNK_ELEMENTS = 3 * 2**20  # logits of one chunk: 12 MiB in float32; MLX begins several before the first is done
LEAST_ROWS = 96
TILE_ROWS = 512
TILE_ELEMENTS = 2**20  # logits of one tile over a frozen head: 4 MiB in float32, which a CPU's cache holds
TILE_ELEMENTS_GPU = 2**22
LEAST_SUM = 1e-30  # of a tile whose every logit is far below the highest so far


@dataclass(frozen=True)
class Head:
    """The output layer: hidden states -> logits, as the family computes them."""

    module: Any  # Linear, Embedding, or a quantized one of ours
    facts: HeadFacts

    def weight(self, dtype: mx.Dtype) -> mx.array:
        """Return the (V, D) weight, decoded where it is quantized."""
        return self.module.decoded(dtype) if hasattr(self.module, "decoded") else self.module.weight.astype(dtype)

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
    """Return (N,) float32 log-probabilities of the targets, without gradients."""
    weight_VD = head.weight(h_ND.dtype)
    rows = chunk_rows(weight_VD.shape[0])
    out = []
    for start in range(0, h_ND.shape[0], rows):
        z_CV = head.chunk(h_ND[start : start + rows], weight_VD)
        at_target_C = mx.take_along_axis(z_CV, targets_N[start : start + rows, None], axis=1)[:, 0]
        top_C1 = z_CV.max(axis=1, keepdims=True)
        out.append(at_target_C - top_C1[:, 0] - mx.log(long_sums(exp(z_CV - top_C1))))
        mx.eval(out[-1])  # one chunk of logits at a time
    return mx.concatenate(out)


def chunked_sft(facts: HeadFacts, *, train_head: bool) -> Callable[..., list[mx.array]]:
    """Return the sum of -w * log p(target) as a function of (h, weight, bias, targets, weights).

    It returns [loss, dh, dweight, dbias]: the gradients are computed in the forward pass, chunk by chunk, and
    the backward pass only scales them.
    """

    @mx.custom_function
    def loss(
        h_ND: mx.array, weight_VD: mx.array, bias_V: mx.array, targets_N: mx.array, weights_N: mx.array
    ) -> list[mx.array]:
        return loss_and_gradients(h_ND, weight_VD, bias_V, targets_N, weights_N, facts=facts, train_head=train_head)

    @loss.vjp
    def backward(primals: list[mx.array], cotangents: list[mx.array], outputs: list[mx.array]) -> list[mx.array]:
        h_ND, weight_VD, bias_V, targets_N, weights_N = primals
        slope, (_, dh_ND, dw_VD, db_V) = cotangents[0], outputs
        dweight = (slope * dw_VD).astype(weight_VD.dtype) if train_head else mx.zeros_like(weight_VD)
        dbias = (slope * db_V).astype(bias_V.dtype) if train_head else mx.zeros_like(bias_V)
        dh = slope.astype(h_ND.dtype) * dh_ND
        return [dh, dweight, dbias, mx.zeros_like(targets_N), mx.zeros_like(weights_N)]

    return cast(Callable[..., list[mx.array]], loss)


def loss_and_gradients(
    h_ND: mx.array, weight_VD: mx.array, bias_V: mx.array, targets_N: mx.array, weights_N: mx.array,
    *, facts: HeadFacts, train_head: bool,
) -> list[mx.array]:  # fmt: skip
    """Return the summed loss and the gradients of h, weight and bias; those of a frozen head are empty."""
    bias, rows = bias_V if bias_V.size else None, chunk_rows(weight_VD.shape[0])
    if not train_head:
        return [*tiled_loss(h_ND, weight_VD, bias, targets_N, weights_N, facts), mx.zeros((0,)), mx.zeros((0,))]
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

    The gradient is w * scale * curve * (softmax - onehot), curve being that of the soft-cap: (C, V) of the softmax, to
    be multiplied by (C,), which costs less after a matmul, and (C,) of the onehot, to be taken off at the target.
    """
    return logits_loss(chunk_logits(h_CD, weight_VD, bias, facts), target_C, w_C, facts, dtype=h_CD.dtype)


def logits_loss(
    z_CV: mx.array, target_C: mx.array, w_C: mx.array, facts: HeadFacts, *, dtype: mx.Dtype
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Return what `chunk_loss` does, of finished logits; gradients in `dtype`."""
    at_target_C = mx.take_along_axis(z_CV, target_C[:, None], axis=1)[:, 0]
    top_C1 = z_CV.max(axis=1, keepdims=True)
    e_CV = exp(z_CV - top_C1)
    sum_C = long_sums(e_CV)
    total = (
        (top_C1[:, 0] - at_target_C + mx.log(sum_C)) * w_C
    ).sum()  # equal logits cancel before small ones are added
    slope_CV, share_C, hit_C = e_CV, w_C * facts.scale / sum_C, w_C * facts.scale
    if facts.softcap is not None:
        slope_CV = slope_CV * (1 - (z_CV / facts.softcap) ** 2)
        hit_C = hit_C * (1 - (at_target_C / facts.softcap) ** 2)
    if dtype != mx.float32:  # float16 may not hold a matmul over the vocabulary without the shares
        slope_CV, share_C = (slope_CV * share_C[:, None]).astype(dtype), mx.ones_like(share_C)
    return total, slope_CV, share_C.astype(dtype), hit_C.astype(dtype)


@dataclass(frozen=True)
class TileSums:
    """What is known of C positions once some tiles of the vocabulary are done; e = exp(z - top)."""

    top_C1: mx.array  # the highest logit
    e_C: mx.array  # the sum of e
    at_target_C: mx.array  # the target's logit
    slope_CD: mx.array  # the sum of e times the soft-cap's curve times the head's rows


def tiled_loss(
    h_ND: mx.array, weight_VD: mx.array, bias: mx.array | None, targets_N: mx.array, weights_N: mx.array,
    facts: HeadFacts,
) -> list[mx.array]:  # fmt: skip
    """Return the summed loss over a frozen head and the gradient of h, tile by tile.

    The softmax is kept up over tiles as attention's is over blocks of keys, the head's rows being keys and values:
    every logit is computed once, whatever the vocabulary. Source: Milakov and Gimelshein 2018, algorithm 3.
    """
    total, slopes, done = mx.zeros(()), [], []
    rows, columns = tile_sizes(len(h_ND))
    for start in range(0, len(h_ND), rows):
        at, sums = slice(start, start + rows), None
        for first in range(0, len(weight_VD), columns):
            h_CD = mx.depends([h_ND[at]], done)[0] if done else h_ND[at]  # one tile after the other
            some = slice(first, first + columns)
            bias_T = None if bias is None else bias[some]
            sums = add_tile(sums, h_CD, weight_VD[some], bias_T, targets_N[at] - first, facts)
            done = [sums.top_C1, sums.e_C, sums.at_target_C, sums.slope_CD]
        loss, slope_CD = finished_loss(cast(TileSums, sums), weight_VD, targets_N[at], weights_N[at], facts)
        total = total + loss
        slopes.append(slope_CD.astype(h_ND.dtype))
    return [total, mx.concatenate(slopes)]


def add_tile(
    sums: TileSums | None, h_CD: mx.array, weight_TD: mx.array, bias_T: mx.array | None, target_C: mx.array,
    facts: HeadFacts,
) -> TileSums:  # fmt: skip
    """Return the sums with one more tile; targets are counted from its first token, and may lie outside."""
    z_CT = chunk_logits(h_CD, weight_TD, bias_T, facts)
    own_C = (target_C >= 0) & (target_C < len(weight_TD))
    near_C = mx.clip(target_C, 0, len(weight_TD) - 1)
    at_target_C = mx.where(own_C, mx.take_along_axis(z_CT, near_C[:, None], axis=1)[:, 0], 0.0)
    top_C1 = z_CT.max(axis=1, keepdims=True)
    top_C1 = top_C1 if sums is None else mx.maximum(top_C1, sums.top_C1)
    slope_CT = e_CT = exp(z_CT - top_C1)
    e_C = long_sums(e_CT)
    if facts.softcap is not None:
        slope_CT = e_CT * (1 - (z_CT / facts.softcap) ** 2)
    if sums is None:
        return TileSums(top_C1, e_C, at_target_C, summed_rows(slope_CT, e_C, weight_TD, None))
    less_C1 = exp(sums.top_C1 - top_C1)
    slope_CD = summed_rows(slope_CT, e_C, weight_TD, sums.slope_CD * less_C1)
    return TileSums(top_C1, sums.e_C * less_C1[:, 0] + e_C, sums.at_target_C + at_target_C, slope_CD)


def summed_rows(slope_CT: mx.array, e_C: mx.array, weight_TD: mx.array, sums_CD: mx.array | None) -> mx.array:
    """Return sums + slope W in float32."""
    if weight_TD.dtype == mx.float32:
        return slope_CT @ weight_TD if sums_CD is None else mx.addmm(sums_CD, slope_CT, weight_TD)
    e_C1 = mx.maximum(e_C, LEAST_SUM)[:, None]  # float16 may not hold a sum of rows but their mean
    more_CD = ((slope_CT / e_C1).astype(weight_TD.dtype) @ weight_TD).astype(mx.float32) * e_C1
    return more_CD if sums_CD is None else sums_CD + more_CD


def finished_loss(
    sums: TileSums, weight_VD: mx.array, target_C: mx.array, w_C: mx.array, facts: HeadFacts
) -> tuple[mx.array, mx.array]:
    """Return the summed loss of C positions and the gradient of their h, once all tiles are done."""
    top_C, at_target_C = sums.top_C1[:, 0], sums.at_target_C
    total = ((top_C - at_target_C + mx.log(sums.e_C)) * w_C).sum()  # equal logits cancel before small ones are added
    hit_C = share_C = w_C * facts.scale
    if facts.softcap is not None:
        hit_C = share_C * (1 - (at_target_C / facts.softcap) ** 2)
    target_CD = weight_VD[target_C].astype(mx.float32)
    return total, (share_C / sums.e_C)[:, None] * sums.slope_CD - hit_C[:, None] * target_CD


def sft(h_ND: mx.array, head: Head, targets_N: mx.array, weights_N: mx.array, *, train_head: bool) -> mx.array:
    """Return the summed loss in nats; its formula is `shared.objectives.sft`."""
    if hasattr(head.module, "sft"):
        return head.module.sft(h_ND, targets_N, weights_N, head.facts)
    bias_V = head.bias if head.bias is not None else mx.zeros((0,))
    function = chunked_sft(head.facts, train_head=train_head)
    return function(h_ND, head.weight(h_ND.dtype), bias_V, targets_N, weights_N)[0]


OBJECTIVES = {"sft": sft}
