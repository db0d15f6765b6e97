"""Quantized linear and embedding layers: packed bytes stay as they are, a decode lives for one matmul.

Legend: N rows of activations, I input width, O output width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from shared.types import Packed, Stored, Tensor
from torch_backend.decoders import Arrays, find_decoder
from torch_backend.state import from_torch, to_torch


def decode_packed(packed: Packed, *, device: str) -> Tensor:
    """Return the weight of a packed array through this backend's kernel on a device."""
    arrays = {key: to_torch(tensor).to(device) for key, tensor in packed.arrays.items()}
    return from_torch(find_decoder(packed.scheme)(arrays, packed.stored))


class _DecodedMatmul(torch.autograd.Function):
    """x @ W.T with W decoded once per direction and never kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: QuantizedLinear) -> torch.Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return x @ layer.decoded(x.dtype).T

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0] @ ctx.layer.decoded(ctx.dtype), None


def put_arrays(layer: Any, packed: Packed) -> None:
    """Give a layer the packed arrays, under their own names."""
    find_decoder(packed.scheme)
    layer.stored, layer.keys = packed.stored, tuple(packed.arrays)
    for key, tensor in packed.arrays.items():
        layer.register_buffer(key, to_torch(tensor))


def take_rows(array: torch.Tensor, rows: slice | torch.Tensor) -> torch.Tensor:
    """Return rows of an array; of uint32 words as int32, which torch can index."""
    return array.view(torch.int32)[rows] if array.dtype == torch.uint32 else array[rows]


class Decoding:
    """What layers over packed arrays have in common."""

    stored: Stored
    keys: tuple[str, ...]  # of the arrays

    @property
    def arrays(self) -> Arrays:
        """Return the packed arrays."""
        return {key: getattr(self, key) for key in self.keys}

    @property
    def by_rows(self) -> bool:
        """Return whether some rows can be decoded alone."""
        return all(array.ndim and len(array) == self.stored.shape[0] for array in self.arrays.values())

    def decoded(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight (O, I), of an embedding (V, D), in `dtype`, made anew."""
        return find_decoder(self.stored.scheme)(self.arrays, self.stored).to(dtype)

    def decoded_rows(self, some: slice | torch.Tensor) -> torch.Tensor:
        """Return the rows (n, I) of a slice or of (n,) numbers, made anew: decoded alone where it goes `by_rows`."""
        decode = find_decoder(self.stored.scheme)
        if not self.by_rows:
            return decode(self.arrays, self.stored)[some]
        few = {key: take_rows(array, some) for key, array in self.arrays.items()}
        number = len(next(iter(few.values())))
        return decode(few, replace(self.stored, shape=(number, self.stored.shape[1])))


class QuantizedLinear(Decoding, nn.Module):
    """A frozen linear layer over packed arrays."""

    def __init__(self, packed: Packed, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        put_arrays(self, packed)
        self.bias = bias

    @classmethod
    def over(cls, embedding: QuantizedEmbedding) -> QuantizedLinear:
        """Return the output layer tied to an embedding; it shares the packed arrays."""
        head = cls.__new__(cls)
        nn.Module.__init__(head)
        head.stored, head.keys, head.bias = embedding.stored, embedding.keys, None
        head.out_features, head.in_features = embedding.num_embeddings, embedding.embedding_dim
        for key in head.keys:
            head.register_buffer(key, getattr(embedding, key), persistent=False)
        return head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x @ W.T + bias."""
        y = _DecodedMatmul.apply(x, self)
        return y if self.bias is None else y + self.bias


class QuantizedEmbedding(Decoding, nn.Module):
    """An embedding over packed arrays: only the rows asked for are decoded, where the format has whole rows."""

    def __init__(self, packed: Packed, dtype: torch.dtype, *, scale: float) -> None:
        super().__init__()
        self.dtype = dtype
        self.scale = float(torch.tensor(scale, dtype=dtype))  # rounded as the zoo rounds it
        self.num_embeddings, self.embedding_dim = packed.shape
        put_arrays(self, packed)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the rows of `tokens`."""
        rows = self.decoded_rows(tokens.reshape(-1)).view(*tokens.shape, -1).to(self.dtype)
        return rows if self.scale == 1.0 else rows * self.scale


def input_gradient(packed: Packed, grad: np.ndarray, *, device: str) -> np.ndarray:
    """Return the gradient (N, I) of a layer's input for the float32 gradient (N, O) of its output."""
    x = torch.zeros(len(grad), packed.shape[1], device=device, requires_grad=True)
    QuantizedLinear(packed, None).to(device)(x).backward(torch.from_numpy(grad).to(device))
    assert x.grad is not None
    return x.grad.cpu().numpy()
