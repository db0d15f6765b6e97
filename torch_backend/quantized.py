"""Affine-quantized linear and embedding layers: packed bytes stay as they are, a decode lives for one matmul.

Legend: N rows of activations, I input width, O output width, G groups.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from shared.types import Packed, Scheme, Tensor
from torch_backend.state import from_torch, to_torch

PLAIN_DECODE = "triton is not installed: quantized weights are decoded by many small kernels (pip install triton)"


def unpack(raw: torch.Tensor, bits: int) -> torch.Tensor:
    """Return codes (O, I) of a row's bytes (O, I*bits/8) uint8; the codes are one little-endian bit stream."""
    if bits == 8:
        return raw
    rows = raw.shape[0]
    if bits in (2, 4):
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=raw.device)
        return ((raw[..., None] >> shifts) & (2**bits - 1)).reshape(rows, -1)
    num_bytes, num_codes = {3: (3, 8), 5: (5, 8), 6: (3, 4)}[bits]
    wide = torch.int64 if bits == 5 else torch.int32
    groups = raw.reshape(rows, -1, num_bytes).to(wide)
    word = groups[..., 0]
    for n in range(1, num_bytes):
        word = word | (groups[..., n] << (8 * n))
    shifts = torch.arange(num_codes, dtype=wide, device=raw.device) * bits
    return ((word[..., None] >> shifts) & (2**bits - 1)).reshape(rows, -1)


@cache
def has_triton() -> bool:
    """Return whether triton is installed: torch brings it on Linux, not everywhere else."""
    return find_spec("triton") is not None


def decode(raw: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Return the weight (O, I): a product, then a sum, each rounded in the scales' dtype."""
    if raw.device.type == "cuda" and has_triton():
        from torch_backend.kernels import decode_affine

        return decode_affine(raw.view(torch.int32), scales, biases, scheme)
    codes = unpack(raw, scheme.bits).to(scales.dtype)
    grouped = codes.view(codes.shape[0], -1, scheme.group_size)
    return grouped.mul_(scales[..., None]).add_(biases[..., None]).view(codes.shape[0], -1)


def decode_packed(packed: Packed) -> Tensor:
    """Return the weight of a packed array through this backend's kernel."""
    arrays = {key: to_torch(tensor) for key, tensor in packed.arrays.items()}
    weight = decode(arrays["weight"].view(torch.uint8), arrays["scales"], arrays["biases"], packed.scheme)
    return from_torch(weight)


class _DecodedMatmul(torch.autograd.Function):
    """x @ W.T with W decoded once per direction and never kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: QuantizedLinear) -> torch.Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return x @ layer.decoded(x.dtype).T

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0] @ ctx.layer.decoded(ctx.dtype), None


class QuantizedLinear(nn.Module):
    """A frozen linear layer over packed codes."""

    weight: torch.Tensor  # (O, I*bits/32) uint32
    scales: torch.Tensor  # (O, G)
    biases: torch.Tensor  # (O, G)

    def __init__(self, packed: Packed, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.scheme = packed.scheme
        self.out_features, self.in_features = packed.shape
        for key, tensor in packed.arrays.items():
            self.register_buffer(key, to_torch(tensor))
        self.bias = bias

    @classmethod
    def over(cls, embedding: QuantizedEmbedding) -> QuantizedLinear:
        """Return the output layer tied to an embedding; it shares the packed arrays."""
        head = cls.__new__(cls)
        nn.Module.__init__(head)
        head.scheme, head.bias = embedding.scheme, None
        head.out_features, head.in_features = embedding.num_embeddings, embedding.embedding_dim
        for key in ("weight", "scales", "biases"):
            head.register_buffer(key, getattr(embedding, key), persistent=False)
        return head

    def decoded(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight (O, I) in `dtype`, made anew."""
        return decode(self.weight.view(torch.uint8), self.scales, self.biases, self.scheme).to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x @ W.T + bias."""
        y = _DecodedMatmul.apply(x, self)
        return y if self.bias is None else y + self.bias


class QuantizedEmbedding(nn.Module):
    """An embedding over packed codes: only the rows asked for are decoded."""

    weight: torch.Tensor  # (V, D*bits/32) uint32
    scales: torch.Tensor  # (V, G)
    biases: torch.Tensor  # (V, G)

    def __init__(self, packed: Packed, dtype: torch.dtype, *, scale: float) -> None:
        super().__init__()
        self.scheme, self.dtype = packed.scheme, dtype
        self.scale = float(torch.tensor(scale, dtype=dtype))  # rounded as the zoo rounds it
        self.num_embeddings, self.embedding_dim = packed.shape
        for key, tensor in packed.arrays.items():
            self.register_buffer(key, to_torch(tensor))

    def decoded(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the table (V, D) in `dtype`, made anew."""
        return decode(self.weight.view(torch.uint8), self.scales, self.biases, self.scheme).to(dtype)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the rows of `tokens`."""
        flat = tokens.reshape(-1)
        raw = self.weight.view(torch.uint8)[flat]
        rows = decode(raw, self.scales[flat], self.biases[flat], self.scheme)
        rows = rows.to(self.dtype) if self.scale == 1.0 else rows.to(self.dtype) * self.scale
        return rows.view(*tokens.shape, -1)
