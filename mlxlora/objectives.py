"""The head and the loss on supervised positions only, in chunks: logits exist for one chunk at a time.

Legend: N supervised positions, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx

from shared.families import HeadFacts

CHUNK_ELEMENTS = 2**22  # logits of one chunk: 16 MiB in float32


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
        return chunk_logits(h_ND, self.weight(h_ND.dtype), self.bias, self.facts)


def chunk_logits(h_ND: mx.array, weight_VD: mx.array, bias: mx.array | None, facts: HeadFacts) -> mx.array:
    """Return (N, V) float32 logits with the family's scale and soft-cap."""
    z_NV = h_ND @ weight_VD.T
    z_NV = (z_NV if bias is None else z_NV + bias).astype(mx.float32)
    if facts.scale != 1.0:
        z_NV = z_NV * facts.scale
    return z_NV if facts.softcap is None else facts.softcap * mx.tanh(z_NV / facts.softcap)


def chunk_rows(vocabulary: int) -> int:
    """Return how many positions one chunk holds."""
    return max(CHUNK_ELEMENTS // vocabulary, 16)


def log_probs(h_ND: mx.array, head: Head, targets_N: mx.array) -> mx.array:
    """Return (N,) float32 log-probabilities of the targets, without gradients."""
    weight_VD = head.weight(h_ND.dtype)
    rows = chunk_rows(weight_VD.shape[0])
    out = []
    for start in range(0, h_ND.shape[0], rows):
        z_CV = chunk_logits(h_ND[start : start + rows], weight_VD, head.bias, head.facts)
        target_C1 = targets_N[start : start + rows, None]
        out.append(mx.take_along_axis(z_CV, target_C1, axis=1)[:, 0] - mx.logsumexp(z_CV, axis=1))
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
        bias = bias_V if bias_V.size else None
        total, slopes = mx.zeros(()), []
        dw_VD = mx.zeros(weight_VD.shape if train_head else (0,))
        db_V = mx.zeros(bias_V.shape if train_head else (0,))
        rows = chunk_rows(weight_VD.shape[0])
        for start in range(0, h_ND.shape[0], rows):
            # The dependency makes chunks run one after the other, so that only one has its logits in memory.
            h_CD = h_ND[start : start + rows]
            if slopes:
                h_CD = mx.depends([h_CD], [slopes[-1], total, dw_VD])[0]
            target_C1, w_C = targets_N[start : start + rows, None], weights_N[start : start + rows]
            chunk, slope_CV = chunk_loss(h_CD, weight_VD, bias, target_C1, w_C, facts)
            total = total + chunk
            slopes.append(slope_CV @ weight_VD)
            if train_head:
                dw_VD = dw_VD + (slope_CV.T @ h_CD).astype(mx.float32)
                db_V = db_V + slope_CV.sum(axis=0).astype(mx.float32) if bias is not None else db_V
        return [total, mx.concatenate(slopes), dw_VD, db_V]

    @loss.vjp
    def backward(primals: list[mx.array], cotangents: list[mx.array], outputs: list[mx.array]) -> list[mx.array]:
        h_ND, weight_VD, bias_V, targets_N, weights_N = primals
        slope, (_, dh_ND, dw_VD, db_V) = cotangents[0], outputs
        dweight = (slope * dw_VD).astype(weight_VD.dtype) if train_head else mx.zeros_like(weight_VD)
        dbias = (slope * db_V).astype(bias_V.dtype) if train_head else mx.zeros_like(bias_V)
        dh = slope.astype(h_ND.dtype) * dh_ND
        return [dh, dweight, dbias, mx.zeros_like(targets_N), mx.zeros_like(weights_N)]

    return cast(Callable[..., list[mx.array]], loss)


def chunk_loss(
    h_CD: mx.array, weight_VD: mx.array, bias: mx.array | None, target_C1: mx.array, w_C: mx.array, facts: HeadFacts
) -> tuple[mx.array, mx.array]:
    """Return the summed loss of one chunk and its gradient with respect to h W.T + b, (C, V) in h's dtype."""
    z_CV = chunk_logits(h_CD, weight_VD, bias, facts)
    share_CV, norm_C = softmax_and_norm(z_CV)
    total = ((norm_C - mx.take_along_axis(z_CV, target_C1, axis=1)[:, 0]) * w_C).sum()
    return total, logit_gradient(z_CV, share_CV, target_C1, w_C, facts).astype(h_CD.dtype)


def softmax_and_norm(z_CV: mx.array) -> tuple[mx.array, mx.array]:
    """Return softmax (C, V) and log-sum-exp (C,) with one exponential per logit."""
    top_C1 = z_CV.max(axis=1, keepdims=True)
    e_CV = mx.exp(z_CV - top_C1)
    sum_C1 = e_CV.sum(axis=1, keepdims=True)
    return e_CV / sum_C1, (top_C1 + mx.log(sum_C1))[:, 0]


def logit_gradient(
    z_CV: mx.array, share_CV: mx.array, target_C1: mx.array, w_C: mx.array, facts: HeadFacts
) -> mx.array:
    """Return d loss / d (h W.T + b): w * (softmax - onehot), through soft-cap and scale."""
    at_target_C1 = mx.take_along_axis(share_CV, target_C1, axis=1) - 1
    slope_CV = mx.put_along_axis(share_CV, target_C1, at_target_C1, axis=1) * (w_C[:, None] * facts.scale)
    return slope_CV if facts.softcap is None else slope_CV * (1 - (z_CV / facts.softcap) ** 2)


def sft(h_ND: mx.array, head: Head, targets_N: mx.array, weights_N: mx.array, *, train_head: bool) -> mx.array:
    """Return the summed loss in nats; its formula is `shared.objectives.sft`."""
    bias_V = head.bias if head.bias is not None else mx.zeros((0,))
    function = chunked_sft(head.facts, train_head=train_head)
    return function(h_ND, head.weight(h_ND.dtype), bias_V, targets_N, weights_N)[0]


OBJECTIVES = {"sft": sft}
