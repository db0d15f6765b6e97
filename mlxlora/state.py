"""Tensors across the line: NumPy words with a dtype name <-> MLX, bfloat16 as its 16-bit words."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from shared.types import Tensor

TO_MLX = {
    "F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "I64": mx.int64, "I32": mx.int32, "I16": mx.int16,
    "I8": mx.int8, "U32": mx.uint32, "U16": mx.uint16, "U8": mx.uint8, "BOOL": mx.bool_,
}  # fmt: skip
FROM_MLX = {dtype: name for name, dtype in TO_MLX.items()}


def to_mlx(tensor: Tensor) -> mx.array:
    """Return an MLX array with its own memory."""
    data = np.array(tensor.data)
    if tensor.dtype == "BF16":
        return mx.array(data).view(mx.bfloat16)
    return mx.array(data)


def from_mlx(value: mx.array) -> Tensor:
    """Return the words of an MLX array as NumPy, copied to the host."""
    if value.dtype == mx.bfloat16:
        return Tensor("BF16", np.array(value.view(mx.uint16)))
    return Tensor(FROM_MLX[value.dtype], np.array(value))


def mlx_dtype(name: str) -> mx.Dtype:
    """Return the MLX dtype called "float32", "bfloat16" or "float16"."""
    return {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}[name]
