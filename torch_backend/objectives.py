"""The head and the loss on supervised positions only, in chunks: logits exist for one chunk at a time.

Legend: N supervised positions, D model width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from shared.families import HeadFacts

CHUNK_ELEMENTS = 2**25  # logits of one chunk: 128 MiB in float32, so that its matmuls have rows enough to be fast
CHUNK_ELEMENTS_CUDA = 2**26  # every chunk reads the whole head: a GPU needs some 500 rows to be busy meanwhile
LEAST_ROWS = 96


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
        return self.chunk(h_ND, self.weight(h_ND.dtype))

    def chunk(self, h_ND: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
        """Return (N, V) float32 logits over a weight of this head; `torch_backend.ends` where it has an adapter."""
        if hasattr(self.module, "adapted"):
            return finish(self.module.adapted(h_ND, weight_VD), self.bias, self.facts)
        return chunk_logits(h_ND, weight_VD, self.bias, self.facts)


def chunk_logits(
    h_ND: torch.Tensor, weight_VD: torch.Tensor, bias: torch.Tensor | None, facts: HeadFacts
) -> torch.Tensor:
    """Return (N, V) float32 logits with the family's scale and soft-cap."""
    return finish(h_ND @ weight_VD.T, bias, facts)


def finish(z_NV: torch.Tensor, bias: torch.Tensor | None, facts: HeadFacts) -> torch.Tensor:
    """Return float32 logits of h W.T: bias, scale and soft-cap, in place where it is float32 already."""
    z_NV = (z_NV if bias is None else z_NV.add_(bias)).float()
    if facts.scale != 1.0:
        z_NV.mul_(facts.scale)
    return z_NV if facts.softcap is None else z_NV.div_(facts.softcap).tanh_().mul_(facts.softcap)


def chunk_rows(weight_VD: torch.Tensor) -> int:
    """Return how many positions one chunk holds."""
    elements = CHUNK_ELEMENTS_CUDA if weight_VD.is_cuda else CHUNK_ELEMENTS
    return max(elements // weight_VD.shape[0], LEAST_ROWS)


def log_probs(h_ND: torch.Tensor, head: Head, targets_N: torch.Tensor) -> torch.Tensor:
    """Return (N,) float32 log-probabilities of the targets, without gradients."""
    weight_VD = head.weight(h_ND.dtype)
    out = []
    for h_CD, target_C in zip(h_ND.split(rows := chunk_rows(weight_VD)), targets_N.split(rows), strict=True):
        z_CV = head.chunk(h_CD, weight_VD)
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
        rows = min(chunk_rows(weight_VD), len(h_ND))
        space_CV = torch.empty(rows, weight_VD.shape[0], dtype=h_ND.dtype, device=h_ND.device)
        for start in range(0, h_ND.shape[0], rows):
            at = slice(start, start + rows)
            h_CD = h_ND[at]
            z_CV = torch.mm(h_CD, weight_VD.T, out=space_CV[: len(h_CD)])
            chunk, slope_CV = chunk_loss(finish(z_CV, bias_V, facts), targets_N[at, None], weights_N[at], facts)
            slope_CV, total = slope_CV.to(h_ND.dtype), total.add_(chunk)
            if dh_ND is not None:
                torch.mm(slope_CV, weight_VD, out=dh_ND[at])
            if dw_VD is not None:
                dw_VD += slope_CV.T @ h_CD
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
    z_CV: torch.Tensor, target_C1: torch.Tensor, w_C: torch.Tensor, facts: HeadFacts
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed loss of one chunk and its gradient with respect to h W.T + b, (C, V). Overwrites z.

    With p = softmax(z), log-sum-exp is max(z) - log(max(p)): nothing but z is as large as z.
    """
    top_C, at_target_C = z_CV.amax(dim=1), z_CV.gather(1, target_C1)[:, 0]
    curve_CV = None if facts.softcap is None else 1 - (z_CV / facts.softcap) ** 2
    share_CV = torch.softmax(z_CV, dim=1, out=z_CV)
    sum_C = share_CV.sum(dim=1)  # 1, but for torch's CPU kernel: of 128,000 tokens up to 1.6e-5 less
    loss_C = (top_C - at_target_C) - (share_CV.amax(dim=1) / sum_C).log()  # equal logits cancel before small ones
    slope_CV = share_CV.scatter_add_(1, target_C1, -sum_C[:, None])
    slope_CV.mul_((w_C * facts.scale / sum_C)[:, None])
    return (loss_C * w_C).sum(), slope_CV if curve_CV is None else slope_CV.mul_(curve_CV)


def sft(h_ND: torch.Tensor, head: Head, targets_N: torch.Tensor, weights_N: torch.Tensor) -> torch.Tensor:
    """Return the summed loss in nats; its formula is `shared.objectives.sft`."""
    if hasattr(head.module, "sft"):
        return head.module.sft(h_ND, targets_N, weights_N, head.facts)
    return _ChunkedSFT.apply(h_ND, head.weight(h_ND.dtype), head.bias, targets_N, weights_N, head.facts)


OBJECTIVES = {"sft": sft}
