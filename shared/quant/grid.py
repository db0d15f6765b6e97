"""A weight written again on the grid that another has: the same scales and offsets, the nearest codes.

`nearest` proposes codes by the format's formula; a code of the other stays where the proposed one decodes no nearer, so
that decoded values give back the codes they came from, whatever decoding rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from shared.quant import affine, bitnet, four_bit, quanto
from shared.quant.microscaling import e2m1_table, encode_e4m3, scale_table
from shared.quant.row_int8 import STEP
from shared.registry import find_quantizer
from shared.tensors import to_float32
from shared.types import Packed, Tensor

# O rows of a weight, I its width


@dataclass(frozen=True)
class Grid:
    """How a format's codes are read, written and chosen."""

    codes: Callable[[Packed], np.ndarray]  # -> (O, I)
    pack: Callable[[np.ndarray, Packed], np.ndarray]  # codes (O, I) -> the words of the array "weight"
    nearest: Callable[[np.ndarray, Packed], np.ndarray]  # weight (O, I) float32 -> codes (O, I)


def requantize(weight: np.ndarray, *, like: Packed) -> Packed:
    """Return a weight (O, I) float32 on the grid of `like`, for a format that `has_grid`."""
    grid, quantizer = GRIDS[like.scheme.name], find_quantizer(like.scheme)
    old, new = grid.codes(like), grid.nearest(weight, like)
    written = with_codes(grid, new, like)
    before, after = (np.abs(to_float32(quantizer.dequantize(packed)) - weight) for packed in (like, written))
    return with_codes(grid, np.where(after < before, new, old), like)


def has_grid(name: str) -> bool:
    """Return whether a format's grid can be kept."""
    return name in GRIDS


def with_codes(grid: Grid, codes: np.ndarray, like: Packed) -> Packed:
    """Return a packed weight with other codes."""
    held = like.arrays["weight"]
    words = np.ascontiguousarray(grid.pack(codes, like)).reshape(held.shape)
    return replace(like, arrays={**like.arrays, "weight": Tensor(held.dtype, words)})


def divided(weight: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Return weight / steps, zero where a step is zero."""
    return np.divide(weight, steps, out=np.zeros_like(weight), where=steps != 0)


def at_value(scaled: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Return the code of the nearest value of a table, uint8."""
    order = np.argsort(table, kind="stable").astype(np.uint8)
    ascending = table[order]
    return order[np.searchsorted((ascending[:-1] + ascending[1:]) / np.float32(2), scaled)]


def affine_nearest(weight: np.ndarray, like: Packed) -> np.ndarray:
    """Return affine codes; what holds ternary values alone keeps to three of the four codes of 2 bits."""
    group, bits = like.scheme.group_size, like.scheme.bits
    scales, biases = (to_float32(like.arrays[key])[..., None] for key in ("scales", "biases"))
    above = weight.reshape(len(weight), -1, group) - biases
    codes = np.rint(divided(above, np.broadcast_to(scales, above.shape)))
    ternary = bits == 2 and np.array_equal(biases, -scales) and int(AFFINE.codes(like).max(initial=0)) < 3
    return np.clip(codes, 0, 2 if ternary else 2**bits - 1).astype(np.uint8).reshape(weight.shape)


def four_bit_codes(packed: Packed) -> np.ndarray:
    """Return the codes of nf4 or fp4, two to a byte, the first in the upper half."""
    raw = packed.arrays["weight"].data.reshape(-1)
    flat = np.stack([raw >> 4, raw & 15], axis=1).reshape(-1)
    return flat[: packed.shape[0] * packed.shape[1]].reshape(packed.shape)


def pack_four_bit(codes: np.ndarray, like: Packed) -> np.ndarray:
    """Return the bytes of nf4 or fp4; half a byte that is left over stays as it is."""
    flat = codes.reshape(-1).astype(np.uint8)
    if flat.size % 2:
        flat = np.append(flat, like.arrays["weight"].data.reshape(-1)[-1] & np.uint8(15))
    return (flat[0::2] << 4) | flat[1::2]


def four_bit_nearest(weight: np.ndarray, like: Packed) -> np.ndarray:
    """Return nf4 or fp4 codes with the absmax of each block kept."""
    absmax = four_bit.expand(like.arrays) if like.scheme.double else like.arrays["absmax"].data
    steps = np.repeat(absmax.reshape(-1), like.scheme.group_size)[: weight.size].reshape(weight.shape)
    return at_value(divided(weight, steps.astype(np.float32)), four_bit.CODES[like.scheme.name])


def int8_nearest(weight: np.ndarray, like: Packed) -> np.ndarray:
    """Return int8 codes with each row's absmax kept."""
    steps = np.broadcast_to(like.arrays["SCB"].data.reshape(-1, 1) * STEP, weight.shape)
    return np.clip(np.rint(divided(weight, steps)), -127, 127).astype(np.int8)


def micro_nearest(weight: np.ndarray, like: Packed) -> np.ndarray:
    """Return mxfp4, nvfp4 or mxfp8 codes with the scale of each group kept."""
    scales = scale_table(like.scheme.group_size)[like.arrays["scales"].data]
    scaled = divided(weight, np.repeat(scales, like.scheme.group_size, axis=1))
    return encode_e4m3(scaled) if like.scheme.bits == 8 else at_value(scaled, e2m1_table())


def quanto_codes(packed: Packed) -> np.ndarray:
    """Return quanto's codes."""
    if packed.scheme.bits == 8:
        return packed.arrays["weight"].data
    rows = packed.arrays["scales"].shape[0]
    return quanto.unpack(packed.arrays["weight"].data, bits=packed.scheme.bits, rows=rows).reshape(packed.shape)


def pack_quanto(codes: np.ndarray, like: Packed) -> np.ndarray:
    """Return quanto's words."""
    if like.scheme.bits == 8:
        return codes.astype(like.arrays["weight"].data.dtype)
    return quanto.pack(codes.astype(np.uint8).reshape(like.arrays["scales"].shape[0], -1), bits=like.scheme.bits)


def quanto_nearest(weight: np.ndarray, like: Packed) -> np.ndarray:
    """Return quanto's codes with scales and shifts kept."""
    scales = to_float32(like.arrays["scales"])
    if like.scheme.bits == 8:
        scaled = divided(weight, np.broadcast_to(scales, weight.shape))
        if like.arrays["weight"].dtype == "F8_E4M3":
            return encode_e4m3(scaled)
        return np.clip(np.rint(scaled), -128, 127).astype(np.int8)
    grouped = weight.reshape(len(scales), -1) + to_float32(like.arrays["shifts"])
    codes = np.rint(divided(grouped, np.broadcast_to(scales, grouped.shape)))
    return np.clip(codes, 0, 2**like.scheme.bits - 1).astype(np.uint8).reshape(weight.shape)


def bitnet_nearest(weight: np.ndarray, like: Packed) -> np.ndarray:
    """Return BitNet's codes with the matrix's one scale kept."""
    stored = np.float32(to_float32(like.arrays["weight_scale"]).reshape(()))
    scale = np.float32(1) / stored if like.scheme.name == "bitnet-inverse" else stored
    trits = np.clip(np.rint(weight / scale), -1, 1) if scale else np.zeros_like(weight)
    return (trits + 1).astype(np.uint8)


AFFINE = Grid(
    codes=lambda packed: affine.unpack(packed.arrays["weight"].data, bits=packed.scheme.bits),
    pack=lambda codes, like: affine.pack(codes.astype(np.uint8), bits=like.scheme.bits),
    nearest=affine_nearest,
)
MICRO = Grid(AFFINE.codes, AFFINE.pack, micro_nearest)
FOUR_BIT = Grid(four_bit_codes, pack_four_bit, four_bit_nearest)
QUANTO = Grid(quanto_codes, pack_quanto, quanto_nearest)
BITNET = Grid(
    codes=lambda packed: bitnet.unpack(packed.arrays["weight"].data),
    pack=lambda codes, like: bitnet.pack(codes.astype(np.uint8)),
    nearest=bitnet_nearest,
)
INT8 = Grid(
    codes=lambda packed: packed.arrays["weight"].data,
    pack=lambda codes, like: codes.astype(np.int8),
    nearest=int8_nearest,
)
GRIDS: dict[str, Grid] = {
    **dict.fromkeys(("affine", "ternary"), AFFINE),
    **dict.fromkeys(("mxfp4", "nvfp4", "mxfp8"), MICRO),
    **dict.fromkeys(("nf4", "fp4"), FOUR_BIT),
    **dict.fromkeys(("quanto-qint2", "quanto-qint4", "quanto-qint8", "quanto-qfloat8"), QUANTO),
    **dict.fromkeys(("bitnet", "bitnet-inverse"), BITNET),
    "int8": INT8,
}
