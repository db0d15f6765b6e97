"""Affine-quantized linear and embedding layers: packed bytes stay as they are, a decode lives for one matmul.

On a GPU with activations in the scales' dtype MLX's `quantized_matmul` runs; elsewhere the weight is decoded
for one matmul (on a CPU that is 11 to 21 times faster).
Legend: N rows of activations, I input width, O output width, G groups.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx import nn

from mlxlora.elementwise import on_gpu
from mlxlora.state import from_mlx, to_mlx
from shared.types import Packed, Scheme, Tensor


def decode(weight: mx.array, scales: mx.array, biases: mx.array, scheme: Scheme) -> mx.array:
    """Return the weight (O, I) in the scales' dtype."""
    return mx.dequantize(weight, scales, biases, group_size=scheme.group_size, bits=scheme.bits)


def decode_packed(packed: Packed) -> Tensor:
    """Return the weight of a packed array through this backend's kernel."""
    arrays = {key: to_mlx(tensor) for key, tensor in packed.arrays.items()}
    return from_mlx(decode(arrays["weight"], arrays["scales"], arrays["biases"], packed.scheme))


def base_arrays(base: nn.Module) -> list[mx.array]:
    """Return what holds a frozen layer's weight: itself, or codes, scales and biases."""
    return [base[key] for key in ("weight", "scales", "biases") if key in base]


def product(base: nn.Module, arrays: list[mx.array], x: mx.array) -> mx.array:
    """Return x @ W.T, W decoded for this one product."""
    if len(arrays) == 1:
        return x @ arrays[0].T
    return quantized_product(base, arrays, x, transpose=True)


def back_product(base: nn.Module, arrays: list[mx.array], grad: mx.array) -> mx.array:
    """Return grad @ W, W decoded for this one product."""
    if len(arrays) == 1:
        return grad @ arrays[0]
    return quantized_product(base, arrays, grad, transpose=False)


def quantized_product(base: Any, arrays: list[mx.array], x: mx.array, *, transpose: bool) -> mx.array:
    """Return x @ W.T or x @ W by MLX's kernel where that is the faster way, else over a decoded weight."""
    weight, scales, biases = arrays
    scheme: Scheme = base._scheme
    if on_gpu() and x.dtype == scales.dtype:
        return mx.quantized_matmul(
            x, weight, scales, biases, transpose=transpose, group_size=scheme.group_size, bits=scheme.bits
        )
    decoded = decode(weight, scales, biases, scheme).astype(x.dtype)
    return x @ (decoded.T if transpose else decoded)


def frozen_product(base: Any) -> Any:
    """Return x @ W.T as a function of x and `base_arrays`, W decoded once per direction."""

    @mx.custom_function
    def matmul(x: mx.array, *arrays: mx.array) -> mx.array:
        return product(base, list(arrays), x)

    @matmul.vjp
    def backward(primals: tuple[mx.array, ...], cotangent: mx.array, _output: mx.array) -> tuple[mx.array, ...]:
        arrays = primals[1:]
        return back_product(base, list(arrays), cotangent), *(mx.zeros_like(array) for array in arrays)

    return matmul


class QuantizedLinear(nn.Module):
    """A frozen linear layer over packed codes."""

    weight: mx.array  # (O, I*bits/32) uint32
    scales: mx.array  # (O, G)
    biases: mx.array  # (O, G)

    def __init__(self, packed: Packed, bias: mx.array | None) -> None:
        super().__init__()
        self._scheme, self._matmul = packed.scheme, frozen_product(self)
        self._shape = packed.shape
        for key, tensor in packed.arrays.items():
            self[key] = to_mlx(tensor)
        if bias is not None:
            self.bias = bias

    def decoded(self, dtype: mx.Dtype) -> mx.array:
        """Return the weight (O, I) in `dtype`, made anew."""
        return decode(self.weight, self.scales, self.biases, self._scheme).astype(dtype)

    def __call__(self, x: mx.array) -> mx.array:
        """Return x @ W.T + bias."""
        y = self._matmul(x, *base_arrays(self))
        return y + self.bias if "bias" in self else y


class QuantizedEmbedding(nn.Module):
    """An embedding over packed codes: only the rows asked for are decoded."""

    weight: mx.array  # (V, D*bits/32) uint32
    scales: mx.array  # (V, G)
    biases: mx.array  # (V, G)

    def __init__(self, packed: Packed, dtype: mx.Dtype) -> None:
        super().__init__()
        self._scheme, self._dtype = packed.scheme, dtype
        self._shape = packed.shape
        for key, tensor in packed.arrays.items():
            self[key] = to_mlx(tensor)

    def decoded(self, dtype: mx.Dtype) -> mx.array:
        """Return the table (V, D) in `dtype`, made anew."""
        return decode(self.weight, self.scales, self.biases, self._scheme).astype(dtype)

    def __call__(self, tokens: mx.array) -> mx.array:
        """Return the rows of `tokens`."""
        rows = decode(self.weight[tokens], self.scales[tokens], self.biases[tokens], self._scheme)
        return rows.astype(self._dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        """Return x @ table.T, as mlx-lm's models call a tied head."""
        return x @ self.decoded(x.dtype).T
