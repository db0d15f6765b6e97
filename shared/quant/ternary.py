"""Ternary weights: every value is -a, 0 or a, one a per group along the input.

In memory they are affine codes of 2 bits (code t + 1, scale a, bias -a), which every affine kernel decodes exactly:
2a - a, a - a and 0 - a round nowhere. On disk base 3 holds five trits in a byte, 1.6 bits per value. Here G is the
group size and the rules that choose a and t are, for a group w:

- exact (the default): least squares. Of the k largest magnitudes, k with the largest (sum |w|)^2 / k; a is their mean.
- absmean: a = mean |w|, t = round(w / a). Ma et al. 2024 (The Era of 1-bit LLMs), equation 1.
- twn: t = 0 up to 0.7 mean |w|, a is the mean of the others. Li and Liu 2016 (Ternary Weight Networks), equation 6.
- quantile: the third of smallest magnitude becomes zero, a is the mean of the others.
- sparsityN: the same with N percent.
- stochastic: a = max |w|, t is not zero with probability |w| / a, so that the expected value is w.

Whatever the rule, a group that holds -a, 0 and a alone is kept as it is: encoding a decoded weight changes no byte.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from shared.errors import ModelError
from shared.quant.affine import AffineQuantizer, in_groups, to_packed
from shared.seeds import generator
from shared.tensors import from_float32, to_float32
from shared.types import Packed, Scheme, Tensor

TWN_SHARE = np.float32(0.7)
TRITS = 5  # in a byte: 3^5 = 243
POWERS = np.array([1, 3, 9, 27, 81], dtype=np.uint8)


@dataclass(frozen=True)
class Ternary:
    """What a rule chose: trits -1, 0, 1 in the groups' shape, and one scale per group."""

    trits: np.ndarray  # (O, I/G, G) int8
    scale: np.ndarray  # (O, I/G) float32


@dataclass(frozen=True)
class TernaryQuantizer:
    """The ternary codec; the scheme's solver names the rule."""

    scheme: Scheme

    @property
    def by_rows(self) -> bool:
        """Return whether rows are packed each by itself: but for chance, which hangs on all values."""
        return self.scheme.solver != "stochastic"

    def fits(self, shape: tuple[int, int]) -> bool:
        """Return whether a weight (out, in) divides into whole groups."""
        return AffineQuantizer(self.scheme).fits(shape)

    def num_bytes(self, shape: tuple[int, int], *, scale_bytes: int) -> int:
        """Return the bytes of the arrays of a weight (out, in), those of affine codes."""
        return AffineQuantizer(self.scheme).num_bytes(shape, scale_bytes=scale_bytes)

    def quantize(self, weight: Tensor) -> Packed:
        """Return the affine arrays of a weight (O, I): codes t + 1, scales a and biases -a in the weight's dtype."""
        grouped = in_groups(weight, self.scheme.group_size)
        chosen = keep_ternary(grouped, choose(grouped, self.scheme.solver or "exact"))
        scale = to_float32(from_float32(chosen.scale, weight.dtype))
        return to_packed(self.scheme, chosen.trits + 1, scale, np.float32(0) - scale, dtype=weight.dtype)

    def dequantize(self, packed: Packed) -> Tensor:
        """Return the weight (O, I) in the scales' dtype."""
        return AffineQuantizer(self.scheme).dequantize(packed)


def choose(grouped: np.ndarray, rule: str) -> Ternary:
    """Return trits and scales of groups (O, I/G, G) float32 by a rule's name."""
    if rule.startswith("sparsity"):
        return keep_largest(grouped, zeros=round(grouped.shape[-1] * int(rule.removeprefix("sparsity")) / 100))
    return RULES[rule](grouped)


def by_least_squares(grouped: np.ndarray) -> Ternary:
    """Return the ternary weight of the smallest squared error."""
    magnitude = np.abs(grouped)
    descending = -np.sort(-magnitude, axis=-1)
    total = np.cumsum(descending, axis=-1, dtype=np.float64)
    count = np.arange(1, grouped.shape[-1] + 1)
    best = np.argmax(total**2 / count, axis=-1)[..., None]
    scale = np.take_along_axis(total / count, best, axis=-1)[..., 0].astype(np.float32)
    least = np.take_along_axis(descending, best, axis=-1)
    return Ternary(signs(grouped, (magnitude >= least) & (least > 0)), scale)


def by_mean(grouped: np.ndarray) -> Ternary:
    """Return BitNet's choice, per group: the mean magnitude as scale, the nearest of -1, 0 and 1."""
    scale = mean_magnitude(grouped)
    ratio = np.divide(grouped, scale[..., None], out=np.zeros_like(grouped), where=scale[..., None] > 0)
    return Ternary(np.clip(np.rint(ratio), -1, 1).astype(np.int8), scale)


def by_threshold(grouped: np.ndarray) -> Ternary:
    """Return the choice of Ternary Weight Networks, per group."""
    kept = np.abs(grouped) > TWN_SHARE * mean_magnitude(grouped)[..., None]
    return Ternary(signs(grouped, kept), mean_of(grouped, kept))


def by_thirds(grouped: np.ndarray) -> Ternary:
    """Return a choice that gives a third of each group to zero."""
    return keep_largest(grouped, zeros=round(grouped.shape[-1] / 3))


def keep_largest(grouped: np.ndarray, *, zeros: int) -> Ternary:
    """Return a choice where the `zeros` smallest magnitudes of each group are zero; of equal ones the first."""
    order = np.argsort(np.abs(grouped), axis=-1, kind="stable")
    kept = np.ones(grouped.shape, dtype=bool)
    np.put_along_axis(kept, order[..., :zeros], False, axis=-1)
    return Ternary(signs(grouped, kept), mean_of(grouped, kept))


def by_chance(grouped: np.ndarray) -> Ternary:
    """Return an unbiased choice: a function of the values alone, equal on every machine."""
    magnitude = np.abs(grouped)
    scale = magnitude.max(axis=-1)
    digest = hashlib.blake2b(np.ascontiguousarray(grouped).tobytes(), digest_size=8).hexdigest()
    unit = generator("ternary", digest).random(grouped.shape, dtype=np.float32)
    return Ternary(signs(grouped, unit * scale[..., None] < magnitude), scale)


RULES: dict[str, Callable[[np.ndarray], Ternary]] = {
    "exact": by_least_squares, "absmean": by_mean, "twn": by_threshold, "quantile": by_thirds, "stochastic": by_chance,
}  # fmt: skip


def keep_ternary(grouped: np.ndarray, chosen: Ternary) -> Ternary:
    """Return the choice, but for groups that are ternary already their own trits and scale."""
    magnitude = np.abs(grouped)
    largest = magnitude.max(axis=-1)
    already = ((magnitude == 0) | (magnitude == largest[..., None])).all(axis=-1)
    trits = np.where(already[..., None], np.sign(grouped).astype(np.int8), chosen.trits)
    return Ternary(trits, np.where(already, largest, chosen.scale))


def signs(grouped: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Return the signs of the values that are kept, int8, zero for the others."""
    return np.where(kept, np.sign(grouped), 0).astype(np.int8)


def mean_magnitude(grouped: np.ndarray) -> np.ndarray:
    """Return the mean magnitude of each group, float32, summed in float64."""
    return np.abs(grouped).mean(axis=-1, dtype=np.float64).astype(np.float32)


def mean_of(grouped: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Return the mean magnitude of what is kept of each group, float32, zero where nothing is."""
    total = np.where(kept, np.abs(grouped), 0).sum(axis=-1, dtype=np.float64)
    return (total / np.maximum(kept.sum(axis=-1), 1)).astype(np.float32)


def pack_base3(codes: np.ndarray) -> np.ndarray:
    """Return bytes (O, ceil(I/5)) uint8 of codes 0, 1, 2 (O, I): five to a byte, the first as its lowest digit.

    >>> pack_base3(np.uint8([[0, 1, 2, 0, 1, 2]]))
    array([[102,   2]], dtype=uint8)
    """
    rows, width = codes.shape
    padded = np.zeros((rows, -(-width // TRITS) * TRITS), dtype=np.uint8)
    padded[:, :width] = codes
    return (padded.reshape(rows, -1, TRITS) * POWERS).sum(axis=-1, dtype=np.uint8)


def unpack_base3(raw: np.ndarray, *, width: int) -> np.ndarray:
    """Return codes (O, width) uint8; raises ModelError for bytes that stand for no five trits.

    >>> unpack_base3(np.uint8([[102, 2]]), width=6)
    array([[0, 1, 2, 0, 1, 2]], dtype=uint8)
    """
    rows, count = raw.shape
    if count != -(-width // TRITS) or (raw >= 3**TRITS).any():
        raise ModelError(
            f"{raw.shape} bytes do not hold {width} base-3 digits a row", code="E308", fix="quantize the model again"
        )
    return (raw[..., None] // POWERS % 3).reshape(rows, count * TRITS)[:, :width]
