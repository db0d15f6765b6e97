"""Half-quadratic quantization: a solver for affine codes that minimises |error|^0.7 instead of keeping the edges.

From the min-max grid on, in turns: the codes, and the zero point that a shrunken error asks for, while the mean error
of the whole matrix falls. HQQ writes w = (code - zero) * scale; as affine that is scale and bias = -zero * scale.
Source: Badri and Shaji 2023 (Half-Quadratic Quantization of Large Machine Learning Models), and hqq 0.2.8
`optimize_weights_proximal_legacy`, its default. Sums run in another order there, so that about one code in 10,000
differs by one step; the error of the result does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shared.quant.affine import AffineQuantizer, in_groups, to_packed
from shared.types import Packed, Scheme, Tensor

NORM, BETA, ROUNDS = np.float32(0.7), 10.0, 20  # the library's own
MOST_SCALE, LEAST_SPAN = np.float32(2e4), np.float32(1e-4)


@dataclass(frozen=True)
class Grid:
    """A grid of HQQ per group: code = round(w * scale + zero)."""

    scale: np.ndarray  # (groups, 1) float32
    zero: np.ndarray  # (groups, 1) float32


@dataclass(frozen=True)
class HQQuantizer:
    """The affine codec with HQQ as its solver."""

    scheme: Scheme
    by_rows = False  # it minimises the error of the whole matrix

    def fits(self, shape: tuple[int, int]) -> bool:
        """Return whether a weight (out, in) divides into whole groups."""
        return AffineQuantizer(self.scheme).fits(shape)

    def num_bytes(self, shape: tuple[int, int], *, scale_bytes: int) -> int:
        """Return the bytes of the arrays of a weight (out, in), as affine."""
        return AffineQuantizer(self.scheme).num_bytes(shape, scale_bytes=scale_bytes)

    def quantize(self, weight: Tensor) -> Packed:
        """Return affine codes, scales and biases of a weight (O, I)."""
        rows, top = weight.shape[0], 2**self.scheme.bits - 1
        grouped = in_groups(weight, self.scheme.group_size).reshape(-1, self.scheme.group_size)
        grid = solve(grouped, top=top)
        scale = np.float32(1) / grid.scale
        bias = (-grid.zero * scale).reshape(rows, -1)
        codes = round_codes(grouped, grid, top=top)
        return to_packed(self.scheme, codes, scale.reshape(rows, -1), bias, dtype=weight.dtype)

    def dequantize(self, packed: Packed) -> Tensor:
        """Return the weight (O, I), as affine."""
        return AffineQuantizer(self.scheme).dequantize(packed)


def solve(grouped: np.ndarray, *, top: int) -> Grid:
    """Return the grid of groups (groups, G) float32 with codes 0 to `top`."""
    low, high = grouped.min(axis=1, keepdims=True), grouped.max(axis=1, keepdims=True)
    span = high - low
    scale = np.divide(np.float32(top), span, out=np.ones_like(span), where=span > LEAST_SPAN)
    scale = np.minimum(scale, MOST_SCALE)
    grid, best = Grid(scale, -low * scale), np.inf
    for _ in range(ROUNDS):
        codes = round_codes(grouped, grid, top=top)
        decoded = (codes - grid.zero) / grid.scale
        wanted = grouped - shrink(grouped - decoded, BETA)
        error = np.abs(grouped - decoded).mean(dtype=np.float64)
        grid = Grid(scale, (codes - wanted * scale).mean(axis=1, keepdims=True, dtype=np.float32))
        if error >= best:
            break
        best = error
    return grid


def round_codes(grouped: np.ndarray, grid: Grid, *, top: int) -> np.ndarray:
    """Return the nearest codes, float32."""
    return np.clip(np.rint(grouped * grid.scale + grid.zero), 0, top)


def shrink(error: np.ndarray, beta: float) -> np.ndarray:
    """Return sign(e) max(|e| - |e|^(p - 1) / beta, 0): the paper's equation 5."""
    magnitude = np.abs(error)
    power = np.power(magnitude, NORM - np.float32(1), out=np.full_like(magnitude, np.inf), where=magnitude > 0)
    return np.sign(error) * np.maximum(magnitude - power * np.float32(1 / beta), np.float32(0))
