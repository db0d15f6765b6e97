"""Small floats under one 8-bit scale per group: mxfp4, nvfp4 and mxfp8 as MLX stores them.

An element is E2M1 (4 bits, two per byte, low nibble first) or E4M3 (8 bits). Its group of 32 shares a power of two,
E8M0 = 2^(byte - 127); nvfp4's group of 16 shares an E4M3 number. Every decoded value is exact in bfloat16.
Encoding computes in the weight's dtype, step by step, as MLX does. The mx formats' scale is the smallest power of two
from max / 6 (or 448) on, so that nothing saturates; OCP takes one that is up to two times smaller. A group whose
scale would be below 2^-127 takes that; MLX 0.32.4 lets the byte wrap around there.
Source: mlx `fp_quantize` (mlx/ops.cpp) and OCP Microscaling Formats v1.0, section 5; equal to MLX by test.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from shared.quant.affine import in_groups, pack, unpack
from shared.tensors import from_float32, to_float32
from shared.types import Packed, Scheme, Tensor

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)
LARGEST = {4: 6.0, 8: 448.0}  # of E2M1 and E4M3
BIAS_E8M0 = 127


@dataclass(frozen=True)
class MicroscalingQuantizer:
    """The codec of mxfp4, nvfp4 or mxfp8."""

    scheme: Scheme
    by_rows = True

    def fits(self, shape: tuple[int, int]) -> bool:
        """Return whether a weight (out, in) divides into whole groups."""
        return shape[1] % self.scheme.group_size == 0

    def num_bytes(self, shape: tuple[int, int], *, scale_bytes: int) -> int:
        """Return the bytes of the arrays of a weight (out, in): codes, and one byte per group."""
        elements = shape[0] * shape[1]
        return elements * self.scheme.bits // 8 + elements // self.scheme.group_size

    def quantize(self, weight: Tensor) -> Packed:
        """Return codes and scales of a weight (O, I)."""
        rows, width = weight.shape
        grouped = in_groups(weight, self.scheme.group_size)
        largest = np.abs(grouped).max(axis=-1) / np.float32(LARGEST[self.scheme.bits])
        bits, steps = self.choose_scales(to_float32(from_float32(largest, weight.dtype)), weight.dtype)
        scaled = np.divide(grouped, steps[..., None], out=np.zeros_like(grouped), where=steps[..., None] != 0)
        scaled = to_float32(from_float32(scaled, weight.dtype)).reshape(rows, width)
        codes = encode_e2m1(scaled) if self.scheme.bits == 4 else encode_e4m3(scaled)
        arrays = {"weight": Tensor("U32", pack(codes, bits=self.scheme.bits)), "scales": Tensor("U8", bits)}
        return Packed(self.scheme, arrays, (rows, width), "BF16")

    def choose_scales(self, ratio: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
        """Return scale bytes and the steps they stand for, of each group's largest magnitude / 6 (or 448)."""
        if self.scheme.group_size == 16:
            bits = encode_e4m3(ratio)
            return bits, decode_e4m3(bits)
        fraction, exponent = np.frexp(ratio)
        exponent = np.where(ratio == 0, 0, np.maximum(exponent - (fraction == 0.5), -BIAS_E8M0))
        return (exponent + BIAS_E8M0).astype(np.uint8), np.ldexp(np.float32(1), exponent)

    def dequantize(self, packed: Packed) -> Tensor:
        """Return the weight (O, I) in BF16, which holds every value exactly."""
        rows, width = packed.shape
        codes = unpack(packed.arrays["weight"].data, bits=self.scheme.bits)
        table = e2m1_table() if self.scheme.bits == 4 else e4m3_table()
        values = np.take(table, codes, mode="clip").reshape(rows, -1, self.scheme.group_size)
        steps = scale_table(self.scheme.group_size)[packed.arrays["scales"].data]
        with np.errstate(over="ignore", invalid="ignore"):  # scales of a foreign file may be infinite or NaN
            values *= steps[..., None]
        if self.scheme.bits == 8:
            return from_float32(values.reshape(rows, width), "BF16")  # 2^-136 is below its smallest
        upper = values.view("<u2").reshape(rows, width, 2)[..., 1]  # the lower halves are zero
        return Tensor("BF16", np.ascontiguousarray(upper))


def encode_e2m1(values: np.ndarray) -> np.ndarray:
    """Return 4-bit codes of the nearest values; a midpoint goes towards zero, and zero has no sign.

    >>> encode_e2m1(np.float32([0, 0.25, -0.3, 5, 9, -9])).tolist()
    [0, 0, 9, 6, 7, 15]
    """
    magnitude, codes = np.abs(values), np.zeros(values.shape, dtype=np.uint8)
    for midpoint in (E2M1[:-1] + E2M1[1:]) / np.float32(2):  # a third of the time of a search
        codes += magnitude > midpoint
    return codes | np.where((values < 0) & (codes > 0), np.uint8(8), np.uint8(0))


def encode_e4m3(values: np.ndarray) -> np.ndarray:
    """Return E4M3 bytes of the nearest values, ties to even, saturating at 448.

    >>> encode_e4m3(np.float32([0, 1, -1, 448, 1000])).tolist()
    [0, 56, 184, 126, 126]
    """
    words = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    places = words >> np.uint32(15)
    places |= (words & np.uint32(0x7FFF)) != 0
    return np.take(e4m3_codes(), places, mode="clip")  # which saves a copy of the places


@cache
def e4m3_codes() -> np.ndarray:
    """Return the byte of every float32 by its upper 17 bits, the last also 1 where any lower one is.

    A midpoint of two E4M3 values has none of the lower 16 bits, so that these can only push a value over it.
    """
    words = np.arange(2**17, dtype=np.uint32) << np.uint32(15)
    sign, words = (words >> np.uint32(24)) & np.uint32(0x80), words & np.uint32(0x7FFFFFFF)
    rounded = (words + np.uint32(0x7FFFF) + ((words >> np.uint32(20)) & np.uint32(1))) >> np.uint32(20)
    small = words < np.float32(2**-6).view(np.uint32)  # subnormal: in steps of 2^-9
    steps = np.rint(np.where(small, words.view(np.float32), np.float32(0)) * np.float32(512)).astype(np.uint32)
    codes = np.where(small, steps, np.minimum(rounded - np.uint32((127 - 7) << 3), np.uint32(126)))
    return frozen((codes | sign).astype(np.uint8))


def decode_e4m3(codes: np.ndarray) -> np.ndarray:
    """Return the float32 values of E4M3 bytes."""
    return e4m3_table()[codes]


@cache
def e2m1_table() -> np.ndarray:
    """Return the values of the 16 codes, float32, read-only."""
    return frozen(np.concatenate([E2M1, -E2M1]))


@cache
def e4m3_table() -> np.ndarray:
    """Return the values of the 256 bytes, float32, read-only: no infinity, NaN at 127 and 255."""
    code = np.arange(128)
    exponent, fraction = code >> 3, (code & 7).astype(np.float32)
    normal = np.ldexp(1 + fraction / np.float32(8), exponent - 7)
    values = np.where(exponent == 0, np.ldexp(fraction / np.float32(8), -6), normal).astype(np.float32)
    values[127] = np.nan
    return frozen(np.concatenate([values, -values]))


@cache
def scale_table(group_size: int) -> np.ndarray:
    """Return the 256 scales of a format with groups of 16 (E4M3) or 32 (E8M0, 255 infinite), float32, read-only."""
    if group_size == 16:
        return e4m3_table()
    words = np.arange(256, dtype=np.uint32) << np.uint32(23)
    words[0] = 1 << 22  # 2^-127 is a subnormal number
    return frozen(words.view(np.float32))


def frozen(table: np.ndarray) -> np.ndarray:
    """Return a table that nobody can write to."""
    table.setflags(write=False)
    return table
