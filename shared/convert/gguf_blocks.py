"""Rows of weights as GGUF stores them: floats, q8_0, and 4-bit affine groups of 32 taken over code by code.

A block of q4_0 is a float16 scale d and 16 bytes, of q4_1 a scale d, a minimum m and 16 bytes; byte j holds code j in
its low half and code j + 16 in its high half. w = d * (q - 8), and w = d * q + m. Source: llama.cpp, ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from shared.convert.weights import cast
from shared.errors import CapabilityError
from shared.quant.affine import unpack
from shared.tensors import to_float32
from shared.types import Packed, Tensor

BLOCK = 32
FLOAT_KINDS = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / BLOCK, "q4_0": 18 / BLOCK, "q4_1": 20 / BLOCK}


def encode(values: Tensor, kind: str) -> np.ndarray:
    """Return rows (O, I) as the bytes of a float kind or of q8_0; raises CapabilityError beyond float16's range."""
    if kind in FLOAT_KINDS:
        same = values.dtype == FLOAT_KINDS[kind]
        return np.ascontiguousarray((values if same else cast(to_float32(values), FLOAT_KINDS[kind])).data)
    from gguf import GGMLQuantizationType, quants

    return quants.quantize(np.ascontiguousarray(to_float32(values)), GGMLQuantizationType.Q8_0)


def exact_kind(packed: Packed) -> str | None:
    """Return "q4_0" or "q4_1" where the codes, scales and biases of a packed weight fit one exactly, else None."""
    scheme = packed.scheme
    if (scheme.name, scheme.bits, scheme.group_size) != ("affine", 4, BLOCK):
        return None
    scales, biases = (to_float32(packed.arrays[key]) for key in ("scales", "biases"))
    with np.errstate(over="ignore"):
        fits = [np.array_equal(values.astype(np.float16).astype(np.float32), values) for values in (scales, biases)]
    if np.array_equal(biases, -8 * scales) and fits[0]:
        return "q4_0"
    return "q4_1" if all(fits) else None


def encode_affine(packed: Packed, kind: str) -> np.ndarray:
    """Return a packed weight (O, I), for which `exact_kind` is `kind` or q4_0, as bytes (O, I / 32 * block)."""
    if exact_kind(packed) not in (kind, "q4_0"):
        raise CapabilityError(f"the scales of a weight do not fit {kind} exactly", code="E405", fix="use --weights f16")
    rows, width = packed.shape
    codes = unpack(packed.arrays["weight"].data, bits=4).reshape(rows, width // BLOCK, 2, BLOCK // 2)
    halves = [to_float32(packed.arrays["scales"])]
    if kind == "q4_1":
        halves.append(to_float32(packed.arrays["biases"]))
    heads = np.stack(halves, axis=-1).astype("<f2").view(np.uint8)
    body = codes[:, :, 0] | codes[:, :, 1] << np.uint8(4)
    return np.concatenate([heads, body], axis=-1).reshape(rows, -1)
