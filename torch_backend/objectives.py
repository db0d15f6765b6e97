"""The head and the loss on supervised positions only, in chunks: logits exist for one chunk at a time.

Legend: N supervised positions, D model width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from shared.families import HeadFacts

CHUNK_ELEMENTS = 2**22  # logits of one chunk: 16 MiB in float32
CHUNK_ELEMENTS_CUDA = 2**26  # every chunk reads the whole head: a GPU needs some 500 rows to be busy meanwhile


@dataclass(frozen=True)
class Head:
    """The output layer: hidden states -> logits, as the family computes them."""

    module: Any  # Linear, Embedding, or a quantized one of ours
    facts: HeadFacts

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the (V, D) weight, decoded where it is quantized."""
        return self.module.decoded(dtype) if hasattr(self.module, "decoded") else self.module.weight.to(dtype)

    @property
    def bias(self) -> torch.Tensor | None:
        """Return the (V,) bias or None."""
        return getattr(self.module, "bias", None)

    def logits(self, h_ND: torch.Tensor) -> torch.Tensor:
        """Return (N, V) float32 logits; for a few positions, as generation needs."""
        return chunk_logits(h_ND, self.weight(h_ND.dtype), self.bias, self.facts)


def chunk_logits(
    h_ND: torch.Tensor, weight_VD: torch.Tensor, bias: torch.Tensor | None, facts: HeadFacts
) -> torch.Tensor:
    """Return (N, V) float32 logits with the family's scale and soft-cap."""
    z_NV = h_ND @ weight_VD.T
    z_NV = (z_NV if bias is None else z_NV + bias).float()
    if facts.scale != 1.0:
        z_NV = z_NV * facts.scale
    return z_NV if facts.softcap is None else facts.softcap * torch.tanh(z_NV / facts.softcap)


def chunk_rows(weight_VD: torch.Tensor) -> int:
    """Return how many positions one chunk holds."""
    elements = CHUNK_ELEMENTS_CUDA if weight_VD.is_cuda else CHUNK_ELEMENTS
    return max(elements // weight_VD.shape[0], 16)


def log_probs(h_ND: torch.Tensor, head: Head, targets_N: torch.Tensor) -> torch.Tensor:
    """Return (N,) float32 log-probabilities of the targets, without gradients."""
    weight_VD = head.weight(h_ND.dtype)
    out = []
    for h_CD, target_C in zip(h_ND.split(rows := chunk_rows(weight_VD)), targets_N.split(rows), strict=True):
        z_CV = chunk_logits(h_CD, weight_VD, head.bias, head.facts)
        out.append(z_CV.gather(1, target_C[:, None])[:, 0] - z_CV.logsumexp(dim=1))
    return torch.cat(out)


class _ChunkedSFT(torch.autograd.Function):
    """Sum of -w * log p(target); the gradients are computed in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        h_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_N: torch.Tensor,
        weights_N: torch.Tensor,
        facts: HeadFacts,
    ) -> torch.Tensor:
        wants = ctx.needs_input_grad
        total = torch.zeros((), dtype=torch.float32, device=h_ND.device)
        dh_ND = torch.empty_like(h_ND) if wants[0] else None
        dw_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if wants[1] else None
        db_V = torch.zeros_like(bias_V, dtype=torch.float32) if wants[2] and bias_V is not None else None
        rows = chunk_rows(weight_VD)
        for start in range(0, h_ND.shape[0], rows):
            at = slice(start, start + rows)
            chunk, slope_CV = chunk_loss(h_ND[at], weight_VD, bias_V, targets_N[at, None], weights_N[at], facts)
            total += chunk
            if dh_ND is not None:
                dh_ND[at] = slope_CV @ weight_VD
            if dw_VD is not None:
                dw_VD += slope_CV.T @ h_ND[at]
            if db_V is not None:
                db_V += slope_CV.sum(dim=0)
        ctx.save_for_backward(dh_ND, dw_VD, db_V)
        ctx.dtypes = (weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dh_ND, dw_VD, db_V = ctx.saved_tensors
        scaled = [None if d is None else d * grads[0] for d in (dh_ND, dw_VD, db_V)]
        if scaled[1] is not None:
            scaled[1] = scaled[1].to(ctx.dtypes[0])
        if scaled[2] is not None:
            scaled[2] = scaled[2].to(ctx.dtypes[1])
        return (*scaled, None, None, None)


def chunk_loss(
    h_CD: torch.Tensor,
    weight_VD: torch.Tensor,
    bias: torch.Tensor | None,
    target_C1: torch.Tensor,
    w_C: torch.Tensor,
    facts: HeadFacts,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed loss of one chunk and its gradient with respect to h W.T + b, (C, V) in h's dtype."""
    z_CV = chunk_logits(h_CD, weight_VD, bias, facts)
    share_CV, norm_C = softmax_and_norm(z_CV)
    total = ((norm_C - z_CV.gather(1, target_C1)[:, 0]) * w_C).sum()
    return total, logit_gradient(z_CV, share_CV, target_C1, w_C, facts).to(h_CD.dtype)


def softmax_and_norm(z_CV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return softmax (C, V) and log-sum-exp (C,) with one exponential per logit."""
    top_C1 = z_CV.amax(dim=1, keepdim=True)
    e_CV = (z_CV - top_C1).exp_()
    sum_C1 = e_CV.sum(dim=1, keepdim=True)
    norm_C = (top_C1 + sum_C1.log())[:, 0]
    return e_CV.div_(sum_C1), norm_C


def logit_gradient(
    z_CV: torch.Tensor, share_CV: torch.Tensor, target_C1: torch.Tensor, w_C: torch.Tensor, facts: HeadFacts
) -> torch.Tensor:
    """Return d loss / d (h W.T + b): w * (softmax - onehot), through soft-cap and scale. Overwrites `share`."""
    curve = None if facts.softcap is None else 1 - (z_CV / facts.softcap) ** 2
    slope_CV = share_CV.scatter_add_(1, target_C1, torch.full_like(target_C1, -1, dtype=share_CV.dtype))
    slope_CV *= w_C[:, None] * facts.scale
    return slope_CV if curve is None else slope_CV * curve


def sft(h_ND: torch.Tensor, head: Head, targets_N: torch.Tensor, weights_N: torch.Tensor) -> torch.Tensor:
    """Return the summed loss in nats; its formula is `shared.objectives.sft`."""
    return _ChunkedSFT.apply(h_ND, head.weight(h_ND.dtype), head.bias, targets_N, weights_N, head.facts)


OBJECTIVES = {"sft": sft}
