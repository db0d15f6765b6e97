"""Adapters of the two ends of a model: the embedding, and a head of its own.

Legend: B rows, T tokens, N supervised positions, C of a chunk, D model width, V vocabulary, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from shared.adapters.spec import is_embedding, row_squares
from shared.families import HeadFacts
from shared.types import AdapterSpec, Tensor
from torch_backend.dora import frozen_weight, row_norms
from torch_backend.objectives import chunk_loss, chunk_rows, finish
from torch_backend.state import from_torch, to_torch


class LoRAEmbedding(nn.Module):
    """A frozen embedding with a low-rank product beside it: base(t) + scale * A[:, t].T B.T, A (R, V), B (D, R)."""

    trained_leaves = ("lora_embedding_A", "lora_embedding_B")

    def __init__(self, base: nn.Module, *, name: str, spec: AdapterSpec, shape: tuple[int, int]) -> None:
        super().__init__()
        self.base, self.scale = base, spec.scale_of(name) * table_scale(base)
        rank, device = spec.rank_of(name), next(iter([*base.parameters(), *base.buffers()])).device
        self.lora_embedding_A = nn.Parameter(torch.zeros(rank, shape[1], device=device))
        self.lora_embedding_B = nn.Parameter(torch.zeros(shape[0], rank, device=device))

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Return the rows of `tokens`."""
        y_BTD = self.base(tokens_BT)
        low_BTR = functional.embedding(tokens_BT, self.lora_embedding_A.T).to(y_BTD.dtype)
        return y_BTD + self.scale * (low_BTR @ self.lora_embedding_B.to(y_BTD.dtype).T)


def table_scale(base: nn.Module) -> float:
    """Return what an embedding multiplies the rows with that it looks up, as Gemma's does."""
    found: Any = getattr(base, "embed_scale", getattr(base, "scale", 1.0))
    return float(found)


class LoRAHead(nn.Module):
    """A frozen head with a low-rank product beside it: logits z = h W.T + scale * h A.T B.T, with DoRA each times
    m / |W + scale B A|. The objective is here too, so that logits exist for one chunk at a time.

    With `table`, the adapted embedding that the head is tied to, A and B are that one's B and A, turned.
    """

    def __init__(
        self, base: nn.Module, *, name: str, spec: AdapterSpec, shape: tuple[int, int],
        table: LoRAEmbedding | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.base, self.scale, rank = base, spec.scale_of(name), spec.rank_of(name)
        self.table, self.lora_magnitude_vector = table, None
        self.trained_leaves: tuple[str, ...] = ()
        if table is not None:
            return
        device = next(iter([*base.parameters(), *base.buffers()])).device
        self.trained_leaves = ("lora_A", "lora_B")
        self.lora_A = nn.Parameter(torch.zeros(rank, shape[1], device=device))
        self.lora_B = nn.Parameter(torch.zeros(shape[0], rank, device=device))
        if spec.kind == "dora":
            self.trained_leaves = (*self.trained_leaves, "lora_magnitude_vector")
            squares = row_squares(from_torch(frozen_weight(base, torch.float32)))
            self.squares = to_torch(Tensor("F32", squares)).to(device)
            self.start = Tensor("F32", np.sqrt(squares))
            self.lora_magnitude_vector = nn.Parameter(to_torch(self.start).to(device))

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A (R, D) and B (V, R)."""
        if self.table is not None:
            return self.table.lora_embedding_B.T, self.table.lora_embedding_A.T
        return self.lora_A, self.lora_B

    @property
    def bias(self) -> torch.Tensor | None:
        """Return the base's (V,) bias or None."""
        return getattr(self.base, "bias", None)

    def decoded(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the base's (V, D) weight in `dtype`."""
        return frozen_weight(self.base, dtype).to(dtype)

    def adapted(self, h_ND: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
        """Return (N, V) logits without bias, before what the family does to them."""
        z_NV, m_V = self.summed(h_ND, weight_VD), self.lora_magnitude_vector
        if m_V is None:
            return z_NV
        return z_NV * (m_V / row_norms(self, weight_VD, *self.matrices())).to(z_NV.dtype)

    def summed(self, h_CD: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
        """Return (C, V): h W.T + scale * h A.T B.T."""
        A, B = (matrix.to(h_CD.dtype) for matrix in self.matrices())
        return torch.addmm(h_CD @ weight_VD.T, h_CD @ A.T, B.T, alpha=self.scale)

    def sft(
        self, h_ND: torch.Tensor, targets_N: torch.Tensor, weights_N: torch.Tensor, facts: HeadFacts
    ) -> torch.Tensor:
        """Return the summed loss in nats; its formula is `shared.objectives.sft`."""
        trained = (*self.matrices(), self.lora_magnitude_vector)
        return _AdaptedSFT.apply(h_ND, *trained, self, targets_N, weights_N, facts)


class _AdaptedSFT(torch.autograd.Function):
    """Sum of -w * log p(target); the gradients are computed in the forward pass, chunk by chunk.

    With s = d loss / d z (after DoRA's gain g: s g), dh = s W + scale (s B) A, dA = scale (s B).T h,
    dB = scale * s.T (h A.T), dm = sum (s * z) / |.|.
    """

    @staticmethod
    def forward(
        ctx: Any, h_ND: torch.Tensor, A: torch.Tensor, B: torch.Tensor, m_V: torch.Tensor | None, layer: LoRAHead,
        targets_N: torch.Tensor, weights_N: torch.Tensor, facts: HeadFacts,
    ) -> torch.Tensor:  # fmt: skip
        weight_VD, total = layer.decoded(h_ND.dtype), torch.zeros((), device=h_ND.device)
        norms_V = torch.ones(()) if m_V is None else row_norms(layer, weight_VD, A, B)
        gain_V = None if m_V is None else (m_V / norms_V).to(h_ND.dtype)
        own_A, own_B, pieces = A.to(h_ND.dtype), B.to(h_ND.dtype), []
        dA, dB, dm_V = torch.zeros_like(A), torch.zeros_like(B), None if m_V is None else torch.zeros_like(m_V)
        for start in range(0, len(h_ND), rows := chunk_rows(len(weight_VD), on_gpu=h_ND.is_cuda)):
            at = slice(start, start + rows)
            h_CD = h_ND[at]
            summed_CV = layer.summed(h_CD, weight_VD)
            z_CV = summed_CV if gain_V is None else summed_CV * gain_V
            chunk, slope_CV = chunk_loss(finish(z_CV, layer.bias, facts), targets_N[at, None], weights_N[at], facts)
            slope_CV, total = slope_CV.to(h_ND.dtype), total + chunk
            if gain_V is not None and dm_V is not None:
                dm_V += (slope_CV * summed_CV).sum(dim=0, dtype=torch.float32) / norms_V
                slope_CV = slope_CV * gain_V
            u_CR = (slope_CV @ own_B) * layer.scale
            dA += u_CR.T @ h_CD
            dB += (slope_CV.T @ (h_CD @ own_A.T)) * layer.scale
            pieces.append(torch.addmm(slope_CV @ weight_VD, u_CR, own_A))
        ctx.save_for_backward(torch.cat(pieces), dA, dB, dm_V)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        scaled = [None if saved is None else saved * grads[0].to(saved.dtype) for saved in ctx.saved_tensors]
        return (*scaled, None, None, None, None)


def attach_ends(root: nn.Module, spec: AdapterSpec, ends: Mapping[str, tuple[int, int]]) -> LoRAHead | None:
    """Put adapters over the spec's embedding and head, in place; return the head's."""
    head = None
    for name in spec.modules:
        if name not in ends:
            continue
        parent, _, leaf = name.rpartition(".")
        owner = root.get_submodule(parent)
        base = getattr(owner, leaf)
        layer = (LoRAEmbedding if is_embedding(name) else LoRAHead)(base, name=name, spec=spec, shape=ends[name])
        setattr(owner, leaf, layer)
        if isinstance(layer, LoRAEmbedding):
            head = LoRAHead(base, name=name, spec=spec, shape=ends[name], table=layer) if spec.tied else head
        else:
            head = layer
    return head
