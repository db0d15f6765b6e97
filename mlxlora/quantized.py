"""Quantized linear and embedding layers: packed bytes stay as they are, a decode lives for one matmul.

On a GPU with activations in the weight's dtype MLX's `quantized_matmul` runs where it knows the format; elsewhere the
weight is decoded for one matmul (on a CPU that is 11 to 21 times faster).
Legend: N rows of activations, I input width, O output width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from mlxlora.decoders import PRODUCTS, find_decoder
from mlxlora.elementwise import on_gpu
from mlxlora.state import TO_MLX, from_mlx, to_mlx
from shared.types import Packed, Stored, Tensor


def decode_packed(packed: Packed) -> Tensor:
    """Return the weight of a packed array through this backend's kernel."""
    arrays = {key: to_mlx(tensor) for key, tensor in packed.arrays.items()}
    return from_mlx(find_decoder(packed.scheme)(arrays, packed.stored))


def base_arrays(base: Any) -> list[mx.array]:
    """Return what holds a frozen layer's weight: itself, or its packed arrays."""
    return [base[key] for key in getattr(base, "_keys", ("weight",))]


def product(base: nn.Module, arrays: list[mx.array], x: mx.array) -> mx.array:
    """Return x @ W.T, W decoded for this one product."""
    if not isinstance(base, QuantizedLinear | QuantizedEmbedding):
        return x @ arrays[0].T
    return quantized_product(base, arrays, x, transpose=True)


def back_product(base: nn.Module, arrays: list[mx.array], grad: mx.array) -> mx.array:
    """Return grad @ W, W decoded for this one product."""
    if not isinstance(base, QuantizedLinear):
        return grad @ arrays[0]
    return quantized_product(base, arrays, grad, transpose=False)


def quantized_product(
    base: QuantizedLinear | QuantizedEmbedding, arrays: list[mx.array], x: mx.array, *, transpose: bool
) -> mx.array:
    """Return x @ W.T or x @ W by MLX's kernel where that is the faster way, else over a decoded weight."""
    stored, held = base._stored, dict(zip(base._keys, arrays, strict=True))
    if on_gpu() and stored.scheme.name in PRODUCTS and x.dtype == TO_MLX[stored.dtype]:
        return PRODUCTS[stored.scheme.name](held, stored, x, transpose=transpose)
    decoded = find_decoder(stored.scheme)(held, stored).astype(x.dtype)
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


def put_arrays(layer: Any, packed: Packed) -> None:
    """Give a layer the packed arrays, under their own names."""
    find_decoder(packed.scheme)
    layer._stored, layer._keys = packed.stored, tuple(packed.arrays)
    for key, tensor in packed.arrays.items():
        layer[key] = to_mlx(tensor)


class Decoding:
    """What layers over packed arrays have in common."""

    _stored: Stored
    _keys: tuple[str, ...]  # of the arrays

    @property
    def by_rows(self) -> bool:
        """Return whether some rows can be decoded alone."""
        return all(array.ndim and len(array) == self._stored.shape[0] for array in base_arrays(self))

    def decoded(self, dtype: mx.Dtype) -> mx.array:
        """Return the weight (O, I), of an embedding (V, D), in `dtype`, made anew."""
        return self.decode(base_arrays(self)).astype(dtype)

    def decode(self, arrays: Sequence[mx.array]) -> mx.array:
        """Return what `arrays` hold: the weight, or some rows of it where these are those rows of each."""
        held = dict(zip(self._keys, arrays, strict=True))
        number = len(arrays[0]) if self.by_rows else self._stored.shape[0]
        return find_decoder(self._stored.scheme)(held, replace(self._stored, shape=(number, self._stored.shape[1])))


class QuantizedLinear(Decoding, nn.Module):
    """A frozen linear layer over packed arrays."""

    def __init__(self, packed: Packed, bias: mx.array | None) -> None:
        super().__init__()
        self._matmul = frozen_product(self)
        put_arrays(self, packed)
        if bias is not None:
            self.bias = bias

    def __call__(self, x: mx.array) -> mx.array:
        """Return x @ W.T + bias."""
        y = self._matmul(x, *base_arrays(self))
        return y + self.bias if "bias" in self else y


class QuantizedEmbedding(Decoding, nn.Module):
    """An embedding over packed arrays: only the rows asked for are decoded, where the format has whole rows."""

    def __init__(self, packed: Packed, dtype: mx.Dtype) -> None:
        super().__init__()
        self._dtype = dtype
        put_arrays(self, packed)

    def __call__(self, tokens: mx.array) -> mx.array:
        """Return the rows of `tokens`."""
        flat, arrays = tokens.reshape(-1), base_arrays(self)
        rows = self.decode([array[flat] for array in arrays]) if self.by_rows else self.decode(arrays)[flat]
        return rows.reshape(*tokens.shape, -1).astype(self._dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        """Return x @ table.T, as mlx-lm's models call a tied head."""
        return x @ self.decoded(x.dtype).T


def input_gradient(packed: Packed, grad: np.ndarray) -> np.ndarray:
    """Return the gradient (N, I) of a layer's input for the float32 gradient (N, O) of its output."""
    layer, given = QuantizedLinear(packed, None), mx.array(grad)
    return np.array(mx.grad(lambda x: (layer(x) * given).sum())(mx.zeros((len(grad), packed.shape[1]))))
