"""nf4 and fp4 as bitsandbytes stores them: 16 values on [-1, 1], and per block of 64 the largest magnitude, float32.

Blocks run through the weight row by row, without regard to where a row ends; the last one may be short. A byte holds
two codes, the first in its upper half. Double quantization stores absmax in 8 bits (`blockwise.py`) about their mean.
Sources: Dettmers et al. 2023 (QLoRA), section 3; bitsandbytes 0.50.2, `functional.quantize_4bit`. Equal to it bit for
bit, by test, with two exceptions, both in double quantization on a CPU: its sum behind the mean runs in an order that
depends on the machine, and its 8-bit encoder is the coarse one that `blockwise.py` tells of.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np

from shared.quant import blockwise
from shared.tensors import from_float32, to_float32
from shared.types import Packed, Scheme, Tensor

CODES = {
    "nf4": np.array(
        [
            -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
            -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
            0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
        ],
        np.float32,
    ),
    "fp4": np.array([0, 1 / 16, 8, 12, 4, 6, 2, 3, 0, -1 / 16, -8, -12, -4, -6, -2, -3], np.float32) / np.float32(12),
}  # fmt: skip
LEAST_ABSMAX = np.float32(1e-38)


@dataclass(frozen=True)
class FourBitQuantizer:
    """The codec of nf4 and fp4, with or without double quantization."""

    scheme: Scheme

    def fits(self, shape: tuple[int, int]) -> bool:
        """Return whether a weight (out, in) can be stored so: always, blocks do not care for rows."""
        return shape[0] > 0 and shape[1] > 0

    def num_bytes(self, shape: tuple[int, int], *, scale_bytes: int) -> int:
        """Return the bytes of the arrays of a weight (out, in), whatever its dtype.

        >>> FourBitQuantizer(Scheme("nf4", 4, 64)).num_bytes((64, 128), scale_bytes=2)
        4608
        """
        elements = shape[0] * shape[1]
        blocks = -(-elements // self.scheme.group_size)
        scales = blocks + 4 * (blockwise.num_blocks(blocks) + 256 + 1) if self.scheme.double else 4 * blocks
        return -(-elements // 2) + scales

    def quantize(self, weight: Tensor) -> Packed:
        """Return codes and scales of a weight (O, I): the nearest code, on a midpoint the lower one."""
        rows, width = weight.shape
        scaled, absmax = scale_blocks(to_float32(weight).reshape(-1), block=self.scheme.group_size)
        midpoints, order = search_table(self.scheme.name)
        scaled = np.append(
            scaled, np.zeros(scaled.size % 2, dtype=np.float32)
        )  # a byte is filled up with a zero's code
        codes = order[np.searchsorted(midpoints, scaled, side="left")]
        arrays = {"weight": Tensor("U8", ((codes[0::2] << 4) | codes[1::2])[:, None])}
        scales = compress(absmax) if self.scheme.double else {"absmax": Tensor("F32", absmax)}
        return Packed(self.scheme, arrays | scales, (rows, width), weight.dtype)

    def dequantize(self, packed: Packed) -> Tensor:
        """Return the weight (O, I): code * absmax in float32, then rounded to the packed dtype."""
        size, block = packed.shape[0] * packed.shape[1], packed.scheme.group_size
        pairs = pair_table(packed.scheme.name)
        values = pairs[packed.arrays["weight"].data.reshape(-1)].reshape(-1)[:size]
        absmax = expand(packed.arrays) if packed.scheme.double else packed.arrays["absmax"].data
        whole = size // block * block
        product = np.empty(size, dtype=np.float32)
        np.multiply(
            values[:whole].reshape(-1, block), absmax[: whole // block, None], out=product[:whole].reshape(-1, block)
        )
        product[whole:] = values[whole:] * absmax[-1]
        return from_float32(product.reshape(packed.shape), packed.dtype)


def scale_blocks(flat: np.ndarray, *, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Return float32 values scaled to [-1, 1] by blocks, and absmax per block.

    A whole block is multiplied by 1 / absmax, a short one divided by absmax, as in bitsandbytes.
    """
    whole = flat.size // block * block
    rows, rest = flat[:whole].reshape(-1, block), flat[whole:]
    absmax = np.abs(rows).max(axis=1)
    scaled = rows * (np.float32(1) / np.maximum(absmax, LEAST_ABSMAX))[:, None]
    if rest.size:
        last = np.maximum(np.abs(rest).max(keepdims=True), LEAST_ABSMAX)
        absmax, scaled = np.append(absmax, last), np.append(scaled, rest / last)
    return scaled.reshape(-1).clip(-1, 1), absmax


@cache
def search_table(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the 15 midpoints between a format's values, ascending, and the code of each of the 16."""
    order = np.argsort(CODES[name], kind="stable").astype(np.uint8)
    ascending = CODES[name][order]
    return (ascending[:-1] + ascending[1:]) / np.float32(2), order


@cache
def pair_table(name: str) -> np.ndarray:
    """Return (256, 2) float32: the two values that a byte holds.

    >>> pair_table("nf4")[0x7F].tolist()
    [0.0, 1.0]
    """
    byte = np.arange(256)
    table = np.stack([CODES[name][byte >> 4], CODES[name][byte & 15]], axis=1)
    table.setflags(write=False)
    return table


def compress(absmax: np.ndarray) -> dict[str, Tensor]:
    """Return absmax in 8 bits about its mean: absmax (U8), nested_absmax per 256 of them, nested_offset.

    The map of the 8 bits goes with them: bitsandbytes decodes by the map of a folder, and versions of it may differ in
    a last bit.
    """
    offset = np.float32(absmax.mean(dtype=np.float64))
    nested = blockwise.encode(absmax - offset, signed=True)
    return {
        "absmax": Tensor("U8", nested.codes),
        "nested_absmax": Tensor("F32", nested.absmax),
        "nested_quant_map": Tensor("F32", blockwise.make_tables(signed=True).code),
        "nested_offset": Tensor("F32", np.array(offset)),
    }


def expand(arrays: Mapping[str, Tensor]) -> np.ndarray:
    """Return the float32 absmax of double-quantized ones: a product, then a sum, each rounded."""
    codes, nested = arrays["absmax"].data, arrays["nested_absmax"].data
    scales = np.repeat(nested, blockwise.BLOCK)[: codes.size]
    return arrays["nested_quant_map"].data[codes] * scales + arrays["nested_offset"].data
