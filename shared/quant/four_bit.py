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
from shared.tensors import NUMPY, from_float32, to_float32
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
CHUNK = 2**18  # values at a time: they stay in a core's cache; whole blocks of any size


@dataclass(frozen=True)
class FourBitQuantizer:
    """The codec of nf4 and fp4, with or without double quantization."""

    scheme: Scheme
    by_rows = False  # blocks run through the whole weight

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
        values, block = weight.data.reshape(-1), self.scheme.group_size
        raw, absmax = np.empty(-(-values.size // 2), dtype=np.uint8), []
        for at in range(0, values.size, CHUNK):
            piece = to_float32(Tensor(weight.dtype, values[at : at + CHUNK]))
            scaled, largest = scale_blocks(piece, block=block)
            codes = encode(np.append(scaled, np.zeros(scaled.size % 2, dtype=np.float32)), self.scheme.name)
            raw[at // 2 : (at + CHUNK) // 2] = (codes[0::2] << 4) | codes[1::2]
            absmax.append(largest)
        found = np.concatenate(absmax)
        scales = compress(found) if self.scheme.double else {"absmax": Tensor("F32", found)}
        return Packed(self.scheme, {"weight": Tensor("U8", raw[:, None])} | scales, shape_of(weight), weight.dtype)

    def dequantize(self, packed: Packed) -> Tensor:
        """Return the weight (O, I): code * absmax in float32, then rounded to the packed dtype."""
        block, raw = packed.scheme.group_size, packed.arrays["weight"].data.reshape(-1)
        absmax = expand(packed.arrays) if packed.scheme.double else packed.arrays["absmax"].data
        pairs = pair_table(packed.scheme.name).view(np.uint64).reshape(-1)
        out = np.empty(2 * raw.size, dtype=NUMPY[packed.dtype])  # an odd last value has a neighbour
        for at in range(0, out.size, CHUNK):
            part = out[at : at + CHUNK]
            values = part if packed.dtype == "F32" else np.empty(part.size, dtype=np.float32)
            # twice as fast as pairs[...]
            np.take(pairs, raw[at // 2 : (at + CHUNK) // 2], out=values.view(np.uint64), mode="clip")
            whole = part.size // block * block
            values[:whole].reshape(-1, block)[:] *= absmax[at // block : (at + whole) // block, None]
            values[whole:] *= absmax[-1]
            if values is not part:
                part[:] = from_float32(values, packed.dtype).data
        return Tensor(packed.dtype, out[: packed.shape[0] * packed.shape[1]].reshape(packed.shape))


def shape_of(weight: Tensor) -> tuple[int, int]:
    """Return the (O, I) of a weight."""
    rows, width = weight.shape
    return rows, width


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


def encode(scaled: np.ndarray, name: str) -> np.ndarray:
    """Return the code of every float32 value on [-1, 1].

    Values with the same upper 16 bits have one midpoint among them at most, so that two look-ups replace a search.
    """
    table = search_table(name)
    places = table.starts[scaled.view(np.uint32) >> np.uint32(16)]
    places += scaled > table.midpoints[places]
    return table.order[places]


@dataclass(frozen=True)
class SearchTable:
    """How the nearest code of a value is found: its place among the ascending values, then that place's code."""

    midpoints: np.ndarray  # (16,) float32: between neighbours, ascending; behind them infinity
    starts: np.ndarray  # (65536,) uint8: midpoints below the least value with these upper 16 bits
    order: np.ndarray  # (16,) uint8: the code of each place


@cache
def search_table(name: str) -> SearchTable:
    """Return the table of nf4 or fp4."""
    order = np.argsort(CODES[name], kind="stable").astype(np.uint8)
    ascending = CODES[name][order]
    midpoints = (ascending[:-1] + ascending[1:]) / np.float32(2)
    edges = np.arange(2**16, dtype=np.uint32) << np.uint32(16)
    ends = np.stack([edges, edges | np.uint32(0xFFFF)]).view(np.float32)
    lower = np.where(np.isnan(ends).any(axis=0), np.float32(0), ends.min(axis=0))
    starts = np.searchsorted(midpoints, lower, side="left").astype(np.uint8)
    return SearchTable(np.append(midpoints, np.float32(np.inf)), starts, order)


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
