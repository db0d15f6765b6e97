"""The head and the loss on supervised positions only: logits exist for one tile, or one chunk of positions, at a time.

Legend: N supervised positions, C of them at once, D model width, V vocabulary, T tokens of it at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from shared.families import HeadFacts

CHUNK_ELEMENTS = 2**25  # logits of one chunk: 128 MiB in float32, so that its matmuls have rows enough to be fast
CHUNK_ELEMENTS_CUDA = 2**26  # every chunk reads the whole head: a GPU needs some 500 rows to be busy meanwhile
LEAST_ROWS = 96
TILE_ROWS = 1024  # positions of one tile over a frozen head: its matmuls then are as fast as a whole chunk's
TILE_ELEMENTS = 2**21  # logits of one tile: 8 MiB in float32
TILE_ELEMENTS_CUDA = 2**25  # not measured
DECODED = 2**20  # weights decoded for one tile on a CPU, at most: 4 MiB in float32, which a cache holds
LEAST_SUM = 1e-30  # of a tile whose every logit is far below the highest so far
LOWEST = -3e38  # a logit that nothing is below but -inf
Rows = Callable[[slice | torch.Tensor], torch.Tensor]  # some rows of a head's weight


@dataclass(frozen=True)
class Head:
    """The output layer: hidden states -> logits, as the family computes them."""

    module: Any  # Linear, Embedding, or a quantized one of ours
    facts: HeadFacts

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the (V, D) weight, decoded where it is quantized."""
        return self.module.decoded(dtype) if hasattr(self.module, "decoded") else self.module.weight.to(dtype)

    @property
    def by_rows(self) -> bool:
        """Return whether the weight is packed, some of its rows can be decoded alone, and all would be too many."""
        return getattr(self.module, "by_rows", False) and math.prod(self.shape) > DECODED

    def rows(self, dtype: torch.dtype) -> Rows:
        """Return some rows of the weight as a function of which: only these are decoded, where the format has rows."""
        if self.by_rows:
            return lambda some: self.module.decoded_rows(some).to(dtype)
        weight_VD = self.weight(dtype) if hasattr(self.module, "decoded") else self.module.weight
        return lambda some: weight_VD[some].to(dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """Return (V, D)."""
        return self.module.stored.shape if hasattr(self.module, "stored") else tuple(self.module.weight.shape)

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


def chunk_rows(vocabulary: int, *, on_gpu: bool) -> int:
    """Return how many positions one chunk holds."""
    return max((CHUNK_ELEMENTS_CUDA if on_gpu else CHUNK_ELEMENTS) // vocabulary, LEAST_ROWS)


def tile_sizes(positions: int, *, on_gpu: bool) -> tuple[int, int]:
    """Return how many positions and how many tokens of the vocabulary one tile holds."""
    rows = max(min(positions, TILE_ROWS), 1)
    return rows, (TILE_ELEMENTS_CUDA if on_gpu else TILE_ELEMENTS) // rows


def log_probs(h_ND: torch.Tensor, head: Head, targets_N: torch.Tensor) -> torch.Tensor:
    """Return (N,) float32 log-probabilities of the targets, at least one, without gradients."""
    if not hasattr(head.module, "adapted"):
        parts = tiled_sums(h_ND, head, head.rows(h_ND.dtype), targets_N, slopes=False)
        return torch.cat([-functional.softplus(sums.lead_C) for _, sums in parts])
    weight_VD, out = head.weight(h_ND.dtype), []
    rows = chunk_rows(len(weight_VD), on_gpu=h_ND.is_cuda)
    for h_CD, target_C in zip(h_ND.split(rows), targets_N.split(rows), strict=True):
        z_CV = head.chunk(h_CD, weight_VD)
        out.append(z_CV.gather(1, target_C[:, None])[:, 0] - z_CV.logsumexp(dim=1))
    return torch.cat(out)


class _TiledSFT(torch.autograd.Function):
    """Sum of -w * log p(target) over a frozen head; h's gradient is computed in the forward pass, tile by tile."""

    @staticmethod
    def forward(
        ctx: Any, h_ND: torch.Tensor, head: Head, targets_N: torch.Tensor, weights_N: torch.Tensor
    ) -> torch.Tensor:
        total, dh_ND = tiled_loss(h_ND, head, targets_N, weights_N, wanted=ctx.needs_input_grad[0])
        ctx.save_for_backward(dh_ND)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dh_ND,) = ctx.saved_tensors
        return None if dh_ND is None else dh_ND * grads[0], None, None, None


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
        total, *grads = loss_and_gradients(
            h_ND, weight_VD, bias_V, targets_N, weights_N, facts=facts, wants=ctx.needs_input_grad
        )
        ctx.save_for_backward(*grads)
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


def loss_and_gradients(
    h_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, targets_N: torch.Tensor,
    weights_N: torch.Tensor, *, facts: HeadFacts, wants: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """Return the summed loss and the gradients of h, weight and bias that are wanted."""
    total = torch.zeros((), dtype=torch.float32, device=h_ND.device)
    dh_ND = torch.empty_like(h_ND) if wants[0] else None
    dw_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if wants[1] else None
    db_V = torch.zeros_like(bias_V, dtype=torch.float32) if wants[2] and bias_V is not None else None
    rows = min(chunk_rows(len(weight_VD), on_gpu=h_ND.is_cuda), len(h_ND))
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
    return total, dh_ND, dw_VD, db_V


def chunk_loss(
    z_CV: torch.Tensor, target_C1: torch.Tensor, w_C: torch.Tensor, facts: HeadFacts
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed loss of one chunk and its gradient with respect to h W.T + b, (C, V). Overwrites z.

    With p = softmax(z), log-sum-exp is max(z) - log(max(p)): nothing but z is as large as z. What the target lacks of 1
    is the sum of the others' shares, as in `TileSums`.
    """
    top_C, at_target_C = z_CV.amax(dim=1), z_CV.gather(1, target_C1)[:, 0]
    curve_CV = None if facts.softcap is None else 1 - (z_CV / facts.softcap) ** 2
    share_CV = torch.softmax(z_CV, dim=1, out=z_CV)
    top_share_C, own_C = share_CV.amax(dim=1), share_CV.gather(1, target_C1)[:, 0]
    rest_C = share_CV.scatter_(1, target_C1, 0.0).sum(dim=1)
    sum_C = rest_C + own_C  # 1, but for torch's CPU kernel: of 128,000 tokens up to 1.6e-5 less
    far_C = (top_C - at_target_C) - (top_share_C / sum_C).log()  # equal logits cancel before small ones
    loss_C = torch.where(own_C > 0.5, (rest_C / own_C).log1p(), far_C)
    slope_CV = share_CV.scatter_(1, target_C1, -rest_C[:, None])
    slope_CV.mul_((w_C * facts.scale / sum_C)[:, None])
    return (loss_C * w_C).sum(), slope_CV if curve_CV is None else slope_CV.mul_(curve_CV)


@dataclass(frozen=True)
class TileSums:
    """What is known of C positions once some tiles of the vocabulary are done; e = exp(z - top) of all but the target.

    The target stands apart: beside one that is nearly certain the others' shares would be lost in rounding.
    """

    top_C1: torch.Tensor  # the highest logit of the others
    e_C: torch.Tensor  # the sum of e
    at_target_C: torch.Tensor  # the target's logit; not a number until its tile has come
    slope_CD: torch.Tensor | None  # the sum of e times the soft-cap's curve times the head's rows

    @property
    def lead_C(self) -> torch.Tensor:
        """Return by how much all others together lead the target, in nats; the loss is softplus of it."""
        return self.top_C1[:, 0] - self.at_target_C + self.e_C.log()  # equal logits cancel before small ones are added


def tiled_loss(
    h_ND: torch.Tensor, head: Head, targets_N: torch.Tensor, weights_N: torch.Tensor, *, wanted: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the summed loss over a frozen head and, where wanted, the gradient of h."""
    total, dh_ND = torch.zeros((), device=h_ND.device), torch.empty_like(h_ND) if wanted else None
    with torch.autocast(h_ND.device.type, enabled=False):  # matmuls write into what they are given
        rows_of = head.rows(h_ND.dtype)
        for at, sums in tiled_sums(h_ND, head, rows_of, targets_N, slopes=wanted):
            total += (functional.softplus(sums.lead_C) * weights_N[at]).sum()
            if dh_ND is not None:
                dh_ND[at] = hidden_gradient(sums, rows_of(targets_N[at]), weights_N[at], head.facts)
    return total, dh_ND


def tiled_sums(
    h_ND: torch.Tensor, head: Head, rows_of: Rows, targets_N: torch.Tensor, *, slopes: bool
) -> Iterator[tuple[slice, TileSums]]:
    """Yield some positions and their sums over the vocabulary, tile by tile.

    The softmax is kept up over tiles as attention's is over blocks of keys, the head's rows being keys and values:
    every logit is computed once, whatever the vocabulary. Source: Milakov and Gimelshein 2018, algorithm 3.
    """
    vocabulary, width = head.shape
    rows, columns = tile_sizes(len(h_ND), on_gpu=h_ND.is_cuda)
    columns = max(min(columns, DECODED // width), 1) if head.by_rows and not h_ND.is_cuda else columns
    space = torch.empty(rows * min(columns, vocabulary), dtype=h_ND.dtype, device=h_ND.device)
    for start in range(0, len(h_ND), rows):
        at = slice(start, start + rows)
        sums = empty_sums(h_ND[at], slopes=slopes)
        for first in range(0, vocabulary, columns):
            weight_TD = rows_of(slice(first, first + columns))
            z_CT = space[: len(h_ND[at]) * len(weight_TD)].view(-1, len(weight_TD))
            torch.mm(h_ND[at], weight_TD.T, out=z_CT)
            z_CT = finish(z_CT, None if head.bias is None else head.bias[first : first + columns], head.facts)
            sums = add_tile(sums, z_CT, weight_TD, targets_N[at] - first, head.facts)
        yield at, sums


def empty_sums(h_CD: torch.Tensor, *, slopes: bool) -> TileSums:
    """Return the sums before the first tile."""
    none_C = torch.zeros(len(h_CD), device=h_CD.device)
    slope_CD = torch.zeros(h_CD.shape, device=h_CD.device) if slopes else None
    return TileSums(torch.full_like(none_C, LOWEST)[:, None], none_C, torch.full_like(none_C, math.nan), slope_CD)


def add_tile(
    sums: TileSums, z_CT: torch.Tensor, weight_TD: torch.Tensor, target_C: torch.Tensor, facts: HeadFacts
) -> TileSums:
    """Return the sums with one more tile; targets are counted from its first token, and may lie outside.

    Overwrites the logits z, and the sums' own slope.
    """
    curve_CT = None if facts.softcap is None or sums.slope_CD is None else 1 - (z_CT / facts.softcap) ** 2
    own_C, near_C1 = (target_C >= 0) & (target_C < len(weight_TD)), target_C.clamp(0, len(weight_TD) - 1)[:, None]
    near_C = z_CT.gather(1, near_C1)[:, 0]
    known_C = near_C.masked_fill(near_C == math.inf, math.nan)  # an overflow, which would lead all others
    at_target_C = torch.where(own_C, known_C, sums.at_target_C)
    z_CT.scatter_(1, near_C1, torch.where(own_C, LOWEST, near_C)[:, None])
    top_C1 = torch.maximum(z_CT.amax(dim=1, keepdim=True), sums.top_C1)  # never below LOWEST: -inf - -inf is no number
    slope_CT, less_C1 = z_CT.sub_(top_C1).exp_(), (sums.top_C1 - top_C1).exp_()
    more_C = slope_CT.sum(dim=1)
    e_C = sums.e_C * less_C1[:, 0] + more_C
    if sums.slope_CD is None:
        return TileSums(top_C1, e_C, at_target_C, None)
    if curve_CT is not None:
        slope_CT.mul_(curve_CT)
    slope_CD = add_rows(sums.slope_CD.mul_(less_C1), slope_CT, more_C, weight_TD)
    return TileSums(top_C1, e_C, at_target_C, slope_CD)


def add_rows(sums_CD: torch.Tensor, slope_CT: torch.Tensor, e_C: torch.Tensor, weight_TD: torch.Tensor) -> torch.Tensor:
    """Return sums + slope W in float32. Overwrites both."""
    if weight_TD.dtype == torch.float32:
        return sums_CD.addmm_(slope_CT, weight_TD)
    e_C1 = e_C.clamp(min=LEAST_SUM)[:, None]  # float16 may not hold a sum of rows but their mean
    return sums_CD.add_((slope_CT.div_(e_C1).to(weight_TD.dtype) @ weight_TD).float().mul_(e_C1))


def hidden_gradient(sums: TileSums, target_CD: torch.Tensor, w_C: torch.Tensor, facts: HeadFacts) -> torch.Tensor:
    """Return the gradient of C positions' h in float32, once all tiles are done. Overwrites the sums' slope.

    With q = sigmoid(lead), what the target lacks of 1: w scale q (the others' mean row - the target's row), each times
    its soft-cap's curve.
    """
    assert sums.slope_CD is not None
    share_C1 = (w_C * facts.scale * torch.sigmoid(sums.lead_C))[:, None]
    mean_CD, target_CD = sums.slope_CD.div_(sums.e_C.clamp(min=LEAST_SUM)[:, None]), target_CD.float()
    if facts.softcap is not None:
        target_CD = target_CD * (1 - (sums.at_target_C / facts.softcap) ** 2)[:, None]
    return mean_CD.sub_(target_CD).mul_(share_C1)


def sft(h_ND: torch.Tensor, head: Head, targets_N: torch.Tensor, weights_N: torch.Tensor) -> torch.Tensor:
    """Return the summed loss in nats of N positions, at least one; its formula is `shared.objectives.sft`."""
    if hasattr(head.module, "sft"):
        return head.module.sft(h_ND, targets_N, weights_N, head.facts)
    trained = (getattr(head.module, "weight", None), head.bias)
    if not any(isinstance(part, torch.Tensor) and part.requires_grad for part in trained):
        return _TiledSFT.apply(h_ND, head, targets_N, weights_N)
    return _ChunkedSFT.apply(h_ND, head.weight(h_ND.dtype), head.bias, targets_N, weights_N, head.facts)


OBJECTIVES = {"sft": sft}
