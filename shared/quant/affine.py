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
LANES = (8, 16, 32)  # of a word of eight codes, which is packed in three halvings: pairs, fours, all


@dataclass(frozen=True)
class AffineQuantizer:
    """The affine codec of one scheme; bits 2, 3, 4, 5, 6 or 8, groups of 32, 64 or 128."""

    scheme: Scheme
    by_rows = True

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
        grouped, top = in_groups(weight, self.scheme.group_size), 2**self.scheme.bits - 1
        scale, bias = choose_grid(grouped, levels=top)
        codes = np.clip(np.rint((grouped - bias[..., None]) / scale[..., None]), 0, top)
        return to_packed(self.scheme, codes, scale, bias, dtype=weight.dtype)

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


def in_groups(weight: Tensor, size: int) -> np.ndarray:
    """Return the values of a weight (O, I) in groups, (O, I/size, size) float32; raises ModelError for a rest."""
    rows, width = weight.shape
    if width % size:
        raise ModelError(f"a weight of width {width} does not divide into groups of {size}", code="E314")
    return to_float32(weight).reshape(rows, -1, size)


def to_packed(scheme: Scheme, codes: np.ndarray, scale: np.ndarray, bias: np.ndarray, *, dtype: str) -> Packed:
    """Return a weight of codes in any shape and float32 scale and bias (O, I/G), which are rounded to `dtype`."""
    flat = codes.astype(np.uint8).reshape(len(scale), -1)
    arrays = {
        "weight": Tensor("U32", pack(flat, bits=scheme.bits)),
        "scales": from_float32(scale, dtype),
        "biases": from_float32(bias, dtype),
    }
    return Packed(scheme, arrays, (flat.shape[0], flat.shape[1]), dtype)


def pack(codes: np.ndarray, *, bits: int) -> np.ndarray:
    """Return uint32 words (O, I*bits/32) of codes (O, I) uint8.

    >>> pack(np.arange(8, dtype=np.uint8)[None], bits=4)
    array([[1985229328]], dtype=uint32)
    """
    rows = codes.shape[0]
    if bits in (2, 4, 8):  # whole codes in a byte
        places = codes.reshape(rows, -1, 8 // bits)
        raw = places[..., 0].copy()
        for n in range(1, 8 // bits):
            raw |= places[..., n] << np.uint8(bits * n)
        return raw.view("<u4")
    eight = np.ascontiguousarray(codes).reshape(rows, -1).view("<u8")
    for lane in LANES:
        low, gap = lower_halves(lane, bits=lane // 8 * bits), np.uint64(lane - lane // 8 * bits)
        eight = (eight & low) | ((eight >> gap) & (low << np.uint64(lane // 8 * bits)))
    raw = eight.view(np.uint8).reshape(rows, -1, 8)[..., :bits]
    return np.ascontiguousarray(raw).reshape(rows, -1).view("<u4")


def unpack(words: np.ndarray, *, bits: int) -> np.ndarray:
    """Return codes (O, I) uint8 of uint32 words (O, I*bits/32).

    >>> unpack(np.array([[1985229328]], dtype=np.uint32), bits=4)
    array([[0, 1, 2, 3, 4, 5, 6, 7]], dtype=uint8)
    """
    rows = words.shape[0]
    raw = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return raw.reshape(rows, -1)
    spread = np.zeros((rows, raw.shape[1] // bits, 8), dtype=np.uint8)
    spread[..., :bits] = raw.reshape(rows, -1, bits)
    eight = spread.view("<u8")[..., 0]
    for lane in reversed(LANES):
        low, gap = lower_halves(lane, bits=lane // 8 * bits), np.uint64(lane - lane // 8 * bits)
        eight = (eight & low) | ((eight & (low << np.uint64(lane // 8 * bits))) << gap)
    return eight.view(np.uint8).reshape(rows, -1)


def lower_halves(lane: int, *, bits: int) -> np.uint64:
    """Return a mask of the lowest `bits` of every second lane of a 64-bit word; lane: 8, 16 or 32 bits.

    >>> hex(lower_halves(16, bits=6))
    '0x3f0000003f'
    """
    return np.uint64(sum((2**bits - 1) << at for at in range(0, 64, 2 * lane)))
