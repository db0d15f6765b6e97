"""int8 as bitsandbytes' LLM.int8 stores weights: a row's largest magnitude is 127, every value the nearest step.

The weight is rounded to float16 first, as bitsandbytes does, whatever its dtype. Source: Dettmers et al. 2022
(LLM.int8), section 3.1; bitsandbytes 0.50.2, `functional.int8_vectorwise_quant`. Equal to it bit for bit, by test.
Where bitsandbytes also rounds activations to 8 bits, we do not: the weight is decoded, as its own backward pass does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shared.errors import ModelError
from shared.tensors import from_float32, to_float32
from shared.types import Packed, Scheme, Tensor

STEP = np.float32(7.874015718698502e-3)  # 1 / 127, as its decoder has it

LARGEST = np.float32(np.finfo(np.float16).max)


@dataclass(frozen=True)
class RowInt8Quantizer:
    """The codec of int8: weight (O, I) I8 and SCB (O,) F32, the largest magnitude of each row."""

    scheme: Scheme
    by_rows = True

    def fits(self, shape: tuple[int, int]) -> bool:
        """Return whether a weight (out, in) can be stored so."""
        return shape[0] > 0 and shape[1] > 0

    def num_bytes(self, shape: tuple[int, int], *, scale_bytes: int) -> int:
        """Return the bytes of the arrays of a weight (out, in), whatever its dtype.

        >>> RowInt8Quantizer(Scheme("int8", 8, 0)).num_bytes((64, 128), scale_bytes=2)
        8448
        """
        return shape[0] * shape[1] + 4 * shape[0]

    def quantize(self, weight: Tensor) -> Packed:
        """Return codes and row scales of a weight (O, I); raises ModelError for what float16 cannot hold."""
        given = to_float32(weight)
        if not np.abs(given).max() <= LARGEST:
            raise ModelError(
                "a weight is too large for int8, which rounds to float16 first", code="E314", fix="use affine-8bit-g64"
            )
        values = to_float32(from_float32(given, "F16"))
        absmax = np.abs(values).max(axis=1)
        factor = np.divide(np.float32(1), absmax, out=np.zeros_like(absmax), where=absmax > 0) * np.float32(127)
        arrays = {
            "weight": Tensor("I8", np.rint(values * factor[:, None]).astype(np.int8)),
            "SCB": Tensor("F32", absmax),
        }
        return Packed(self.scheme, arrays, (weight.shape[0], weight.shape[1]), "F32")

    def dequantize(self, packed: Packed) -> Tensor:
        """Return the float32 weight (O, I): code * absmax, then / 127, each rounded."""
        codes, absmax = packed.arrays["weight"].data, packed.arrays["SCB"].data
        return Tensor("F32", codes.astype(np.float32) * absmax[:, None] * STEP)
