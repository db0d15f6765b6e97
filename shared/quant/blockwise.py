"""Optimizer moments in 8 bits: one byte per value and one float32 scale per block of 256 values.

code[i] * absmax of the block stands for a value; `code` is the dynamic map of Dettmers et al. 2022 (8-bit Optimizers
via Block-wise Quantization, section 2), signed for the first moment, unsigned for the second. Blocks start at the first
element of a tensor and the last one may be short. This file is the specification; tests compare it with bitsandbytes.

A value becomes the nearest code of value * (1 / absmax), in float32; on a midpoint the lower one. bitsandbytes computes
the same with three exceptions: its CPU kernel looks codes up on a grid of 65,536 equal steps, too coarse near zero
(zero itself becomes 1.6e-5 in the unsigned map); its CUDA kernel rounds 1 / absmax its own way and some midpoints up;
and a block whose absmax is below the smallest normal float32 is zero here.

Of one code we read another value: 0 of the unsigned map counts as its smallest, 3.25e-7 of absmax. A second moment of
zero beside a first moment that is not (gradients below 4e-4 of the largest) would have Adam divide by eps alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

BLOCK = 256
TINY = np.float32(np.finfo(np.float32).tiny)
EXPONENTS = 7


@dataclass(frozen=True)
class Blockwise:
    """Codes in the tensor's shape, and the largest magnitude of each block."""

    codes: np.ndarray  # uint8
    absmax: np.ndarray  # (blocks,) float32


@dataclass(frozen=True)
class Tables:
    """One map: its 256 values, the 255 midpoints, and where to start looking by a float32's upper 16 bits."""

    code: np.ndarray  # (256,) float32, ascending: what values are rounded to
    decoded: np.ndarray  # (256,) float32: what codes are read as; unsigned 0 as the value above it
    midpoints: np.ndarray  # (255,) float32
    starts: np.ndarray  # (65536,) uint8


@cache
def make_tables(*, signed: bool) -> Tables:
    """Return the tables of the signed or the unsigned map.

    code = starts[upper] + (value > midpoints[starts[upper]]): values with the same upper 16 bits (sign, exponent, 7
    bits of fraction) have one midpoint among them at most. So two look-ups replace a search through 255 midpoints.

    >>> make_tables(signed=True).code[[0, 127, 255]].tolist()
    [-0.992968738079071, 0.0, 1.0]
    """
    code = dynamic_map(signed=signed)
    midpoints = (code[:-1] + code[1:]) / np.float32(2)
    edges = np.arange(2**16, dtype=np.uint32) << np.uint32(16)
    ends = np.stack([edges, edges | np.uint32(0xFFFF)]).view(np.float32)
    lower = np.where(np.isnan(ends).any(axis=0), np.float32(0), ends.min(axis=0))
    starts = np.searchsorted(midpoints, lower, side="left").clip(max=BLOCK - 2).astype(np.uint8)
    decoded = code if signed else np.concatenate([code[1:2], code[1:]])
    for table in (code, decoded, midpoints, starts):
        table.setflags(write=False)
    return Tables(code, decoded, midpoints, starts)


def dynamic_map(*, signed: bool) -> np.ndarray:
    """Return the 256 values, ascending: 0, 1, and per decade of 1e-7 to 1 the middles of 2^e equal intervals of it.

    e grows from 0 to 6 with the decade (1 to 7 in the unsigned map); in the signed map each value has its negative.
    """
    values = [np.array([0, 1], dtype=np.float32)]
    for exponent in range(EXPONENTS):
        edges = linspace(np.float32(0.1), np.float32(1), 2 ** (exponent + (not signed)) + 1)
        middles = (edges[:-1] + edges[1:]) / np.float32(2)
        scaled = np.float32(10.0 ** (exponent - EXPONENTS + 1)) * middles
        values += [scaled, -scaled] if signed else [scaled]
    return np.sort(np.concatenate(values))


def linspace(start: np.float32, stop: np.float32, count: int) -> np.ndarray:
    """Return `count` float32 values as torch.linspace has them: from both ends, each rounded once."""
    step, place = np.float64((stop - start) / np.float32(count - 1)), np.arange(count)
    from_stop = stop - step * (count - 1 - place)
    return np.where(place < count // 2, start + step * place, from_stop).astype(np.float32)


def num_blocks(size: int) -> int:
    """Return how many blocks hold `size` values.

    >>> num_blocks(256), num_blocks(257)
    (1, 2)
    """
    return -(-size // BLOCK)


def encode(values: np.ndarray, *, signed: bool) -> Blockwise:
    """Return codes and scales of a finite tensor of any shape.

    >>> encode(np.float32([0.0, 0.5, -2.0]), signed=True)
    Blockwise(codes=array([127, 201,   0], dtype=uint8), absmax=array([2.], dtype=float32))
    """
    flat = np.zeros(num_blocks(values.size) * BLOCK, dtype=np.float32)
    flat[: values.size] = values.reshape(-1)
    rows = flat.reshape(-1, BLOCK)
    absmax = np.abs(rows).max(axis=1)
    absmax = np.where(absmax < TINY, np.float32(0), absmax)
    inverse = np.divide(np.float32(1), absmax, out=np.zeros_like(absmax), where=absmax > 0)
    scaled = (rows * inverse[:, None]).reshape(-1)[: values.size]
    codes = np.searchsorted(make_tables(signed=signed).midpoints, scaled, side="left").astype(np.uint8)
    return Blockwise(codes.reshape(values.shape), absmax)


def decode(packed: Blockwise, *, signed: bool) -> np.ndarray:
    """Return the float32 values that codes and scales stand for.

    >>> decode(encode(np.float32([0.0, 0.5, 2.0]), signed=False), signed=False).tolist()
    [6.500000608866685e-07, 0.5023437142372131, 2.0]
    """
    scale = np.repeat(packed.absmax, BLOCK)[: packed.codes.size].reshape(packed.codes.shape)
    return make_tables(signed=signed).decoded[packed.codes] * scale
