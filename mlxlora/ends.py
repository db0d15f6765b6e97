"""Adapters of the two ends of a model: the embedding, and a head of its own.

Legend: B rows, T tokens, N supervised positions, C of a chunk, D model width, V vocabulary, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx import nn

from mlxlora.adapters import find_owner
from mlxlora.dora import frozen_weight, row_norms
from mlxlora.objectives import chunk_rows, finish, logits_loss
from mlxlora.quantized import base_arrays
from mlxlora.state import from_mlx, to_mlx
from shared.adapters.spec import is_embedding, row_squares
from shared.families import HeadFacts
from shared.types import AdapterSpec, Tensor


class LoRAEmbedding(nn.Module):
    """A frozen embedding with a low-rank product beside it: base(t) + scale * A[:, t].T B.T, A (R, V), B (D, R)."""

    trained_leaves = ("lora_embedding_A", "lora_embedding_B")

    def __init__(self, base: nn.Module, *, name: str, spec: AdapterSpec, shape: tuple[int, int]) -> None:
        super().__init__()
        self.base, self._scale, rank = base, spec.scale_of(name), spec.rank_of(name)
        self.lora_embedding_A, self.lora_embedding_B = mx.zeros((rank, shape[1])), mx.zeros((shape[0], rank))

    def __call__(self, tokens_BT: mx.array) -> mx.array:
        """Return the rows of `tokens`."""
        y_BTD = self.base(tokens_BT)
        low_BTR = self.lora_embedding_A.T[tokens_BT].astype(y_BTD.dtype)
        return y_BTD + self._scale * (low_BTR @ self.lora_embedding_B.astype(y_BTD.dtype).T)


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
        self.base, self._scale, rank = base, spec.scale_of(name), spec.rank_of(name)
        self._leaves, self._table = (() if table else ("lora_A", "lora_B")), table
        if table is not None:
            return
        self.lora_A, self.lora_B = mx.zeros((rank, shape[1])), mx.zeros((shape[0], rank))
        if spec.kind == "dora":
            self._leaves = (*self._leaves, "lora_magnitude_vector")
            squares = row_squares(from_mlx(frozen_weight(base)))
            self._squares = to_mlx(Tensor("F32", squares))
            self._start = Tensor("F32", np.sqrt(squares))
            self.lora_magnitude_vector = to_mlx(self._start)

    @property
    def trained_leaves(self) -> tuple[str, ...]:
        """Return the names of what is trained."""
        return self._leaves

    @property
    def trained(self) -> list[mx.array]:
        """Return what is trained: A, B, and DoRA's magnitudes."""
        if self._table is not None:
            return [self._table.lora_embedding_B.T, self._table.lora_embedding_A.T]
        return [self[leaf] for leaf in self._leaves]

    def decoded(self, dtype: mx.Dtype) -> mx.array:
        """Return the base's (V, D) weight in `dtype`."""
        base: Any = self.base
        return base.decoded(dtype) if hasattr(base, "decoded") else base.weight.astype(dtype)

    def norms(self, dtype: mx.Dtype, trained: list[mx.array]) -> mx.array:
        """Return the (V,) norms of DoRA's rows."""
        return row_norms(self, dtype, trained[0], trained[1], base_arrays(self.base))

    def adapted(self, h_ND: mx.array, weight_VD: mx.array) -> mx.array:
        """Return (N, V) logits without bias, before what the family does to them."""
        z_NV = self.summed(h_ND, weight_VD, self.trained)
        if len(self.trained) == 2:
            return z_NV
        return z_NV * (self.lora_magnitude_vector / self.norms(h_ND.dtype, self.trained)).astype(z_NV.dtype)

    def summed(self, h_CD: mx.array, weight_VD: mx.array, trained: list[mx.array]) -> mx.array:
        """Return (C, V): h W.T + scale * h A.T B.T."""
        A, B = (matrix.astype(h_CD.dtype) for matrix in trained[:2])
        return h_CD @ weight_VD.T + self._scale * ((h_CD @ A.T) @ B.T)

    def sft(self, h_ND: mx.array, targets_N: mx.array, weights_N: mx.array, facts: HeadFacts) -> mx.array:
        """Return the summed loss in nats; its formula is `shared.objectives.sft`."""
        return adapted_sft(self, targets_N, weights_N, facts)(h_ND, *self.trained)[0]


def adapted_sft(
    layer: LoRAHead, targets_N: mx.array, weights_N: mx.array, facts: HeadFacts
) -> Callable[..., list[mx.array]]:
    """Return [loss, dh, dA, dB(, dm)] as a function of h, A, B(, m): sum of -w * log p(target), chunk by chunk.

    With s = d loss / d z (after DoRA's gain g: s g), dh = s W + scale (s B) A, dA = scale (s B).T h,
    dB = scale * s.T (h A.T), dm = sum (s * z) / |.|.
    """

    @mx.custom_function
    def loss(h_ND: mx.array, *trained: mx.array) -> list[mx.array]:
        return loss_and_gradients(layer, h_ND, list(trained), targets_N, weights_N, facts)

    @loss.vjp
    def backward(primals: list[mx.array], cotangents: list[mx.array], outputs: list[mx.array]) -> list[mx.array]:
        return [cotangents[0].astype(grad.dtype) * grad for grad in outputs[1:]]

    return cast(Callable[..., list[mx.array]], loss)


def loss_and_gradients(
    layer: LoRAHead, h_ND: mx.array, trained: list[mx.array], targets_N: mx.array, weights_N: mx.array, facts: HeadFacts
) -> list[mx.array]:
    """Return the summed loss and the gradients of h and of what is trained."""
    weight_VD, total, sums = layer.decoded(h_ND.dtype), mx.zeros(()), [mx.zeros(array.shape) for array in trained]
    norms_V = layer.norms(h_ND.dtype, trained) if len(trained) == 3 else None
    gain_V = None if norms_V is None else (trained[2] / norms_V).astype(h_ND.dtype)
    A, B, pieces = trained[0].astype(h_ND.dtype), trained[1].astype(h_ND.dtype), []
    for start in range(0, h_ND.shape[0], rows := chunk_rows(weight_VD.shape[0])):
        at, h_CD = slice(start, start + rows), h_ND[start : start + rows]
        if pieces:  # one chunk after the other, so that few have their logits in memory
            h_CD = mx.depends([h_CD], [pieces[-1], total, *sums])[0]
        summed_CV = layer.summed(h_CD, weight_VD, trained)
        z_CV = finish(summed_CV if gain_V is None else summed_CV * gain_V, layer.base.get("bias"), facts)
        chunk, slope_CV, share_C, hit_C = logits_loss(z_CV, targets_N[at], weights_N[at], facts, dtype=h_ND.dtype)
        slope_CV = (slope_CV * share_C[:, None]).at[mx.arange(len(h_CD)), targets_N[at]].add(-hit_C)
        total = total + chunk
        if norms_V is not None and gain_V is not None:
            sums[2] = sums[2] + (slope_CV * summed_CV).astype(mx.float32).sum(axis=0) / norms_V
            slope_CV = slope_CV * gain_V
        u_CR = layer._scale * (slope_CV @ B)
        sums[0] = sums[0] + (u_CR.T @ h_CD).astype(mx.float32)
        sums[1] = sums[1] + layer._scale * (slope_CV.T @ (h_CD @ A.T)).astype(mx.float32)
        pieces.append(slope_CV @ weight_VD + u_CR @ A)
    return [total, mx.concatenate(pieces), *sums]


def tied_base(root: Any) -> nn.Module:
    """Return the frozen embedding that is the head of a model without a module for it."""
    table: Any = root.model.embed_tokens
    return getattr(table, "base", table)  # below an adapter of its own


def attach_ends(root: nn.Module, spec: AdapterSpec, ends: Mapping[str, tuple[int, int]]) -> LoRAHead | None:
    """Put adapters over the spec's embedding and head, in place; return the head's."""
    head = None
    for name in spec.modules:
        if name not in ends:
            continue
        owner, leaf = find_owner(root, name)
        base = getattr(owner, leaf) if leaf in owner else tied_base(root)
        layer = (LoRAEmbedding if is_embedding(name) else LoRAHead)(base, name=name, spec=spec, shape=ends[name])
        setattr(owner, leaf, layer)
        if isinstance(layer, LoRAEmbedding):
            head = LoRAHead(base, name=name, spec=spec, shape=ends[name], table=layer) if spec.tied else head
        else:
            head = layer
    return head
