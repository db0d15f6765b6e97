"""Affine-quantized linear and embedding layers: packed bytes stay as they are, a decode lives for one matmul.

On a GPU with activations in the scales' dtype MLX's `quantized_matmul` runs; elsewhere the weight is decoded
for one matmul (on a CPU that is 11 to 21 times faster).
Legend: N rows of activations, I input width, O output width, G groups.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx import nn

from mlxlora.state import from_mlx, to_mlx
from shared.types import Packed, Scheme, Tensor


def decode(weight: mx.array, scales: mx.array, biases: mx.array, scheme: Scheme) -> mx.array:
    """Return the weight (O, I) in the scales' dtype."""
    return mx.dequantize(weight, scales, biases, group_size=scheme.group_size, bits=scheme.bits)


def decode_packed(packed: Packed) -> Tensor:
    """Return the weight of a packed array through this backend's kernel."""
    arrays = {key: to_mlx(tensor) for key, tensor in packed.arrays.items()}
    return from_mlx(decode(arrays["weight"], arrays["scales"], arrays["biases"], packed.scheme))


def decoded_matmul(scheme: Scheme) -> Any:
    """Return x @ W.T as a function of (x, weight, scales, biases) that decodes W once per direction."""

    @mx.custom_function
    def matmul(x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
        return x @ decode(weight, scales, biases, scheme).astype(x.dtype).T

    @matmul.vjp
    def backward(primals: tuple[mx.array, ...], cotangent: mx.array, _output: mx.array) -> tuple[mx.array, ...]:
        x, weight, scales, biases = primals
        dx = cotangent @ decode(weight, scales, biases, scheme).astype(x.dtype)
        return dx, mx.zeros_like(weight), mx.zeros_like(scales), mx.zeros_like(biases)

    return matmul


class QuantizedLinear(nn.Module):
    """A frozen linear layer over packed codes."""

    weight: mx.array  # (O, I*bits/32) uint32
    scales: mx.array  # (O, G)
    biases: mx.array  # (O, G)

    def __init__(self, packed: Packed, bias: mx.array | None) -> None:
        super().__init__()
        self._scheme, self._matmul = packed.scheme, decoded_matmul(packed.scheme)
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
        if mx.default_device().type == mx.DeviceType.gpu and x.dtype == self.scales.dtype:
            y = mx.quantized_matmul(
                x, self.weight, self.scales, self.biases, transpose=True,
                group_size=self._scheme.group_size, bits=self._scheme.bits,
            )  # fmt: skip
        else:
            y = self._matmul(x, self.weight, self.scales, self.biases)
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
