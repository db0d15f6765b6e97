"""Weights as optimum-quanto stores them: qint8 and qfloat8 by rows, qint2 and qint4 by groups of a row.

qint8, qfloat8: w = scale * code, code int8 or E4M3, scale = max |row| / 127 (or 448).
qint2, qint4: w = scale * code - shift, code unsigned, shift = -min, scale = (max - min) / (2^bits - 1). Groups of 128
where the width has so many values, else of 96, 64 or 32, else the whole row; they stand one per row of a matrix
(N, G), and byte (r, i) holds rows r, r + R, ... of it, R = ceil(N / values per byte), lowest bits first.
Every product, sum and quotient is rounded in the weight's dtype, as PyTorch does.
Source: optimum-quanto 0.2.7 (`nn/qmodule.py`, `tensor/packed.py`, `tensor/optimizers`); equal to it by test, but for
rows of zeros in qfloat8, which it turns into NaN and which are zero here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shared.errors import ModelError
from shared.quant.microscaling import decode_e4m3, encode_e4m3
from shared.tensors import from_float32, to_float32
from shared.types import Packed, Scheme, Tensor

STEP = 32
LARGEST = {"quanto-qint8": 127.0, "quanto-qfloat8": 448.0}


@dataclass(frozen=True)
class QuantoQuantizer:
    """The codec of quanto-qint2, quanto-qint4, quanto-qint8 or quanto-qfloat8."""

    scheme: Scheme

    @property
    def by_rows(self) -> bool:
        """Return whether rows are packed each by itself: below 8 bits rows from all over share a byte."""
        return self.scheme.bits == 8

    def fits(self, shape: tuple[int, int]) -> bool:
        """Return whether a weight (out, in) has scales of its own per row; quanto stores single rows differently."""
        return shape[0] > 1

    def num_bytes(self, shape: tuple[int, int], *, scale_bytes: int) -> int:
        """Return the bytes of the arrays of a weight (out, in): codes, a scale and below 8 bits a shift per group."""
        rows, width = shape
        if self.scheme.bits == 8:
            return rows * width + rows * scale_bytes
        size = group_size(width)
        groups, per_byte = rows * width // size, 8 // self.scheme.bits
        return -(-groups // per_byte) * size + 2 * groups * scale_bytes

    def quantize(self, weight: Tensor) -> Packed:
        """Return codes and scales of a weight (O, I), with shifts below 8 bits."""
        rows, width = weight.shape
        if not self.fits((rows, width)):
            raise ModelError(f"quanto stores a weight of shape {(rows, width)} in another way", code="E314")
        arrays = self.eight_bits(weight) if self.scheme.bits == 8 else self.few_bits(weight)
        return Packed(self.scheme, arrays, (rows, width), weight.dtype)

    def eight_bits(self, weight: Tensor) -> dict[str, Tensor]:
        """Return the arrays of an 8-bit format."""
        values, dtype = to_float32(weight), weight.dtype
        largest = np.abs(values).max(axis=1, keepdims=True)
        scale = from_float32(largest / np.float32(LARGEST[self.scheme.name]), dtype)
        ratio = to_float32(from_float32(divide(values, to_float32(scale)), dtype))
        if self.scheme.name == "quanto-qfloat8":
            return {"weight": Tensor("F8_E4M3", encode_e4m3(ratio)), "scales": scale}
        return {"weight": Tensor("I8", np.clip(np.rint(ratio), -128, 127).astype(np.int8)), "scales": scale}

    def few_bits(self, weight: Tensor) -> dict[str, Tensor]:
        """Return the arrays of a format of 2 or 4 bits."""
        dtype, bits = weight.dtype, self.scheme.bits
        grouped = to_float32(weight).reshape(-1, group_size(weight.shape[1]))
        low, high = grouped.min(axis=1, keepdims=True), grouped.max(axis=1, keepdims=True)
        span = to_float32(from_float32(high - low, dtype))
        scale = from_float32(span / np.float32(2**bits - 1), dtype)
        shift = from_float32(-low, dtype)
        above = to_float32(from_float32(grouped + to_float32(shift), dtype))
        ratio = to_float32(from_float32(divide(above, to_float32(scale)), dtype))
        codes = np.clip(np.rint(ratio), 0, 2**bits - 1).astype(np.uint8)
        return {"weight": Tensor("U8", pack(codes, bits=bits)), "scales": scale, "shifts": shift}

    def dequantize(self, packed: Packed) -> Tensor:
        """Return the weight (O, I) in the scales' dtype: a product, then (below 8 bits) a difference, each rounded."""
        codes, scales = packed.arrays["weight"], packed.arrays["scales"]
        if self.scheme.bits == 8:
            values = decode_e4m3(codes.data.view(np.uint8)) if codes.dtype == "F8_E4M3" else codes.data
            return from_float32(values.astype(np.float32) * to_float32(scales), scales.dtype)
        unpacked = unpack(codes.data, bits=self.scheme.bits, rows=scales.shape[0]).astype(np.float32)
        product = to_float32(from_float32(unpacked * to_float32(scales), scales.dtype))
        return from_float32((product - to_float32(packed.arrays["shifts"])).reshape(packed.shape), scales.dtype)


def group_size(width: int) -> int:
    """Return how many values of a row share a scale.

    >>> group_size(512), group_size(192), group_size(100), group_size(130)
    (128, 96, 100, 130)
    """
    fitting = (size for size in range(128, 0, -STEP) if width > 128 and width % size == 0)
    return next(fitting, width)


def divide(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return the quotients, zero where the scale is."""
    return np.divide(values, scale, out=np.zeros_like(values), where=scale != 0)


def pack(codes: np.ndarray, *, bits: int) -> np.ndarray:
    """Return bytes (ceil(N * bits / 8), G) of codes (N, G) uint8.

    >>> pack(np.uint8([[1], [2], [3]]), bits=4)
    array([[49],
           [ 2]], dtype=uint8)
    """
    per_byte, num_rows = 8 // bits, codes.shape[0]
    height = -(-num_rows // per_byte)
    padded = np.zeros((per_byte * height, codes.shape[1]), dtype=np.uint8)
    padded[:num_rows] = codes
    parts = padded.reshape(per_byte, height, -1)
    packed = np.zeros_like(parts[0])
    for place, part in enumerate(parts):
        packed |= part << np.uint8(bits * place)
    return packed


def unpack(raw: np.ndarray, *, bits: int, rows: int) -> np.ndarray:
    """Return codes (rows, G) uint8 of bytes.

    >>> unpack(np.uint8([[49], [2]]), bits=4, rows=3).tolist()
    [[1], [2], [3]]
    """
    mask = np.uint8(2**bits - 1)
    return np.concatenate([raw >> np.uint8(bits * place) & mask for place in range(8 // bits)])[:rows]
