"""Ternary weights as transformers stores BitNet's: one scale per matrix, four rows of trits in a byte.

Byte (r, i) holds the codes t + 1 of rows r, r + R, r + 2R and r + 3R, R = O/4, lowest bits first. `weight_scale` is
one number s. The layer class of the config says what it means: W = t * s for `autobitlinear` (here "bitnet"), W = t / s
for `bitlinear` ("bitnet-inverse"), which folders bring and nobody has to write: 1 / (1 / s) is not always s.
Source: transformers `integrations/bitnet.py`; equal to its `pack_weights` and `unpack_weights` by test.

BitNet's own layers also round activations to 8 bits. We do not: only what the weights stand for is read.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shared.errors import ModelError
from shared.tensors import from_float32, to_float32
from shared.types import Packed, Scheme, Tensor

PER_BYTE = 4
LEAST_MEAN = np.float32(1e-5)


@dataclass(frozen=True)
class BitnetQuantizer:
    """The codec of "bitnet" and "bitnet-inverse"."""

    scheme: Scheme
    by_rows = False  # one scale, and rows from all over share a byte

    def fits(self, shape: tuple[int, int]) -> bool:
        """Return whether the rows of a weight (out, in) fill whole bytes."""
        return shape[0] % PER_BYTE == 0

    def num_bytes(self, shape: tuple[int, int], *, scale_bytes: int) -> int:
        """Return the bytes of the arrays of a weight (out, in): four trits a byte, and one scale."""
        return shape[0] * shape[1] // PER_BYTE + scale_bytes

    def quantize(self, weight: Tensor) -> Packed:
        """Return packed trits and the scale of a weight (O, I): the absmean rule over the whole matrix.

        A matrix that holds -a, 0 and a alone keeps its own a, so that a decoded weight is encoded without loss.
        """
        rows, width = weight.shape
        if not self.fits((rows, width)):
            raise ModelError(f"a weight of {rows} rows does not divide into fours", code="E314")
        values = to_float32(weight)
        scale = choose_scale(values)
        trits = np.clip(np.rint(values / scale), -1, 1).astype(np.int8)
        arrays = {
            "weight": Tensor("U8", pack((trits + 1).astype(np.uint8))),
            "weight_scale": from_float32(self.turn(scale).reshape(1), weight.dtype),
        }
        return Packed(self.scheme, arrays, (rows, width), weight.dtype)

    def dequantize(self, packed: Packed) -> Tensor:
        """Return the weight (O, I) in the scale's dtype, rounded once."""
        stored = packed.arrays["weight_scale"]
        scale = to_float32(stored).reshape(())
        trits = unpack(packed.arrays["weight"].data).astype(np.float32) - np.float32(1)
        return from_float32(trits / scale if self.is_inverse else trits * scale, stored.dtype)

    @property
    def is_inverse(self) -> bool:
        """Return whether the stored number divides."""
        return self.scheme.name == "bitnet-inverse"

    def turn(self, scale: np.float32) -> np.float32:
        """Return the stored number of a scale."""
        return np.float32(1) / scale if self.is_inverse else scale


def choose_scale(values: np.ndarray) -> np.float32:
    """Return a: the mean magnitude of a matrix, or that of its only magnitude."""
    magnitude = np.abs(values)
    largest = magnitude.max()
    if largest > 0 and ((magnitude == 0) | (magnitude == largest)).all():
        return np.float32(largest)
    return np.maximum(np.float32(magnitude.mean(dtype=np.float64)), LEAST_MEAN)


def pack(codes: np.ndarray) -> np.ndarray:
    """Return bytes (O/4, I) of codes (O, I) uint8 in 0, 1, 2.

    >>> pack(np.uint8([[1], [2], [0], [2]]))
    array([[137]], dtype=uint8)
    """
    rows, width = codes.shape
    quarters = codes.reshape(PER_BYTE, rows // PER_BYTE, width)
    return quarters[0] | quarters[1] << np.uint8(2) | quarters[2] << np.uint8(4) | quarters[3] << np.uint8(6)


def unpack(raw: np.ndarray) -> np.ndarray:
    """Return codes (O, I) uint8 of bytes (O/4, I).

    >>> unpack(np.uint8([[137]])).tolist()
    [[1], [2], [0], [2]]
    """
    return np.concatenate([raw >> np.uint8(2 * n) & np.uint8(3) for n in range(PER_BYTE)])
