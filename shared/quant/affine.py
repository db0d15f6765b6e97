"""Affine codes: w = scale * code + bias per group along the input, as MLX stores them.

Codes are one little-endian bit stream per row: code i takes bits [i*bits, (i+1)*bits), so those of
3, 5 and 6 bits straddle bytes. Scale and bias have the weight's dtype and scales may be negative.
Source: mlx `affine_quantize` (mlx/backend/cpu/quantized.cpp); equal to it bit for bit, by test.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shared.errors import ModelError
from shared.tensors import from_float32, to_float32
from shared.types import Packed, Scheme, Tensor

SMALLEST_SCALE = np.float32(1e-7)


@dataclass(frozen=True)
class AffineQuantizer:
    """The affine codec of one scheme; bits 2, 3, 4, 5, 6 or 8, groups of 32, 64 or 128."""

    scheme: Scheme

    def fits(self, shape: tuple[int, int]) -> bool:
        """Return whether a weight (out, in) divides into whole groups."""
        return shape[1] % self.scheme.group_size == 0

    def num_bytes(self, shape: tuple[int, int], *, scale_bytes: int) -> int:
        """Return the bytes of the arrays of a weight (out, in): codes, and a scale and a bias per group.

        >>> AffineQuantizer(Scheme("affine", 4, 64)).num_bytes((64, 128), scale_bytes=2)
        4608
        """
        elements = shape[0] * shape[1]
        return elements * self.scheme.bits // 8 + 2 * (elements // self.scheme.group_size) * scale_bytes

    def quantize(self, weight: Tensor) -> Packed:
        """Return codes, scales and biases of a weight (O, I); min-max with the larger edge kept exact."""
        rows, width = weight.shape
        if not self.fits((rows, width)):
            raise ModelError(f"a weight of width {width} does not divide into groups of {self.scheme.group_size}")
        grouped = to_float32(weight).reshape(rows, -1, self.scheme.group_size)
        scale, bias = choose_grid(grouped, levels=2**self.scheme.bits - 1)
        codes = np.rint((grouped - bias[..., None]) / scale[..., None])
        codes = np.clip(codes, 0, 2**self.scheme.bits - 1).astype(np.uint8).reshape(rows, width)
        arrays = {
            "weight": Tensor("U32", pack(codes, bits=self.scheme.bits)),
            "scales": from_float32(scale, weight.dtype),
            "biases": from_float32(bias, weight.dtype),
        }
        return Packed(self.scheme, arrays, (rows, width), weight.dtype)

    def dequantize(self, packed: Packed) -> Tensor:
        """Return the weight (O, I): a product, then a sum, each rounded in the scales' dtype."""
        rows, width = packed.shape
        scales = packed.arrays["scales"]
        codes = unpack(packed.arrays["weight"].data, bits=self.scheme.bits)
        grouped = codes.reshape(rows, -1, self.scheme.group_size).astype(np.float32)
        product = from_float32(grouped * to_float32(scales)[..., None], scales.dtype)
        total = to_float32(product) + to_float32(packed.arrays["biases"])[..., None]
        return from_float32(total.reshape(rows, width), scales.dtype)


def choose_grid(grouped: np.ndarray, *, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Return scale and bias per group, float32: zero stays exact where the grid can hold it."""
    low, high = grouped.min(axis=-1), grouped.max(axis=-1)
    scale = np.maximum((high - low) / np.float32(levels), SMALLEST_SCALE)
    low_is_edge = np.abs(low) > np.abs(high)
    scale = np.where(low_is_edge, scale, -scale)
    edge = np.where(low_is_edge, low, high)
    zero_code = np.rint(edge / scale)
    exact = zero_code != 0
    scale = np.where(exact, edge / np.where(exact, zero_code, np.float32(1)), scale)
    return scale.astype(np.float32), np.where(exact, edge, np.float32(0)).astype(np.float32)


def pack(codes: np.ndarray, *, bits: int) -> np.ndarray:
    """Return uint32 words (O, I*bits/32) of codes (O, I) uint8.

    >>> pack(np.arange(8, dtype=np.uint8)[None], bits=4)
    array([[1985229328]], dtype=uint32)
    """
    rows = codes.shape[0]
    if bits in (2, 4, 8):  # whole codes in a byte: ten times as fast as single bits
        places = codes.reshape(rows, -1, 8 // bits)
        raw = places[..., 0].copy()
        for n in range(1, 8 // bits):
            raw |= places[..., n] << np.uint8(bits * n)
        return raw.view("<u4")
    stream = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little").reshape(rows, -1)
    return np.packbits(stream, axis=-1, bitorder="little").view("<u4")


def unpack(words: np.ndarray, *, bits: int) -> np.ndarray:
    """Return codes (O, I) uint8 of uint32 words (O, I*bits/32).

    >>> unpack(np.array([[1985229328]], dtype=np.uint32), bits=4)
    array([[0, 1, 2, 3, 4, 5, 6, 7]], dtype=uint8)
    """
    rows = words.shape[0]
    raw = np.ascontiguousarray(words).view(np.uint8)
    if bits in (2, 4, 8):
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        return ((raw[..., None] >> shifts) & np.uint8(2**bits - 1)).reshape(rows, -1)
    stream = np.unpackbits(raw, axis=-1, bitorder="little").reshape(rows, -1, bits)
    return np.packbits(stream, axis=-1, bitorder="little").reshape(rows, -1)
