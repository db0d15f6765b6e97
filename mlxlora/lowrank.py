"""The low-rank products beside frozen layers, with gradients written by hand: the input is kept, nothing else.

Legend: B rows, T tokens, N = B*T, D input width, O output width, R rank, K the sum of the readers' ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import mlx.core as mx
import numpy as np

from mlxlora.elementwise import on_gpu, sigmoid
from mlxlora.gated import gated, gated_gradients
from mlxlora.quantized import back_product, base_arrays, product

Layers = Sequence[Any]  # LoRALinear layers of adapters.py


class Readers:
    """Layers that read the same input, such as q, k and v: the one called first computes the outputs of all.

    Their A are multiplied as one matrix, and the input is saved once.
    """

    def __init__(self, layers: Layers) -> None:
        self.layers = layers
        self.function, self.after_gate = low_rank(layers), low_rank_after_gate(layers)
        self.x: mx.array | None = None
        self.waiting: dict[str, mx.array] = {}

    def output_of(self, layer: Any, x_BTD: mx.array, up_BTD: mx.array | None = None) -> mx.array:
        """Return the layer's output for x, computed now or when one of the others was asked.

        With `up` the layers read silu(x) * up.
        """
        if self.x is not x_BTD or layer._name not in self.waiting:
            factors = [factor for reader in self.layers for factor in (reader.lora_A, reader.lora_B)]
            bases = [array for reader in self.layers for array in base_arrays(reader.base)]
            read = (x_BTD,) if up_BTD is None else (x_BTD, up_BTD)
            outputs = (self.function if up_BTD is None else self.after_gate)(*read, *factors, *bases)
            self.waiting = {reader._name: y for reader, y in zip(self.layers, outputs, strict=True)}
            self.x = x_BTD
        output = self.waiting.pop(layer._name)
        if not self.waiting:
            self.x = None
        bias = layer.base.get("bias")
        return output if bias is None else output + bias


def low_rank(layers: Layers) -> Callable[..., list[mx.array]]:
    """Return y_i = x W_i.T + scale * dropout(x) A_i.T B_i.T of all readers i, as a function of x, factors and bases.

    Of the inputs x alone is saved. With g_i = dy_i and u_i = scale * g_i B_i:
    dx = sum g_i W_i + u_i A_i,  dA_i = u_i.T x,  dB_i = scale * g_i.T (x A_i.T).
    """

    @mx.custom_function
    def forward(x: mx.array, *arrays: mx.array) -> list[mx.array]:
        return outputs_of(layers, x, arrays)

    @forward.vjp
    def backward(primals: list[mx.array], grads: list[mx.array], _outputs: list[mx.array]) -> list[mx.array]:
        return gradients_of(layers, primals[0], primals[1:], grads)

    return cast(Callable[..., list[mx.array]], forward)


def low_rank_after_gate(layers: Layers) -> Callable[..., list[mx.array]]:
    """Return `low_rank` of x = silu(gate) * up as a function of gate, up, factors and bases: x is made again."""

    @mx.custom_function
    def forward(gate: mx.array, up: mx.array, *arrays: mx.array) -> list[mx.array]:
        return outputs_of(layers, gated(gate, up), arrays)

    @forward.vjp
    def backward(primals: list[mx.array], grads: list[mx.array], _outputs: list[mx.array]) -> list[mx.array]:
        gate, up, *arrays = primals
        share = sigmoid(gate)
        dx, *others = gradients_of(layers, gate * share * up, arrays, grads)
        return [*gated_gradients(gate, up, dx, share), *others]

    return cast(Callable[..., list[mx.array]], forward)


def outputs_of(layers: Layers, x: mx.array, arrays: Sequence[mx.array]) -> list[mx.array]:
    """Return every reader's output, without the base's bias."""
    factors, bases = arrays[: 2 * len(layers)], arrays[2 * len(layers) :]
    A_KD = layers[0]._scale * stack(factors[0::2], x.dtype)
    low = split(layers, narrow(flat(read(layers, x)), A_KD.T).reshape(*x.shape[:-1], -1), axis=-1)
    return [
        mx.addmm(product(base, packed, x), low_R, B.astype(x.dtype).T)
        for (base, packed), low_R, B in zip(bases_of(layers, bases), low, factors[1::2], strict=True)
    ]


def gradients_of(layers: Layers, x: mx.array, arrays: Sequence[mx.array], grads: Sequence[mx.array]) -> list[mx.array]:
    """Return the gradients of x, of all factors, and zeros for the bases."""
    factors, bases = arrays[: 2 * len(layers)], arrays[2 * len(layers) :]
    scale, seen_ND = layers[0]._scale, flat(read(layers, x))
    A_KD = scale * stack(factors[0::2], x.dtype)
    low = split(layers, narrow(seen_ND, A_KD.T), axis=-1)
    pieces = [narrow(flat(grad), B.astype(x.dtype)).T for grad, B in zip(grads, factors[1::2], strict=True)]
    u_KN = stack(pieces, x.dtype)
    dx = read(layers, (u_KN.T @ A_KD).reshape(x.shape))
    for (base, packed), grad in zip(bases_of(layers, bases), grads, strict=True):
        dx = dx + back_product(base, packed, grad)
    dA = split(layers, scale * (u_KN @ seen_ND), axis=0)
    dB = [narrow(flat(grad).T, low_NR) for grad, low_NR in zip(grads, low, strict=True)]
    pairs = [d.astype(mx.float32) for pair in zip(dA, dB, strict=True) for d in pair]
    return [dx, *pairs, *(mx.zeros_like(array) for array in bases)]


def narrow(left_MI: mx.array, right_IR: mx.array) -> mx.array:
    """Return left @ right where right has few columns; on a CPU as the transpose of a product of few rows.

    That is the same sums, three to ten times faster there for some 8 columns (benchmarks/LOG.md).
    """
    return left_MI @ right_IR if on_gpu() else (right_IR.T @ left_MI.T).T


def read(layers: Layers, x: mx.array) -> mx.array:
    """Return what A reads: x, or x with features dropped (then a layer has no fellow readers)."""
    return layers[0]._dropout(x, layers[0]._name)


def bases_of(layers: Layers, arrays: Sequence[mx.array]) -> Iterator[tuple[Any, list[mx.array]]]:
    """Yield every reader's frozen layer with its own arrays."""
    rest = list(arrays)
    for layer in layers:
        number = len(base_arrays(layer.base))
        yield layer.base, rest[:number]
        rest = rest[number:]


def split(layers: Layers, x: mx.array, *, axis: int) -> list[mx.array]:
    """Return the pieces of an axis K that belong to each reader's rank."""
    return list(mx.split(x, np.cumsum([len(layer.lora_A) for layer in layers])[:-1].tolist(), axis=axis))


def stack(factors: Sequence[mx.array], dtype: mx.Dtype) -> mx.array:
    """Return the A of all readers as one (K, D) matrix."""
    return (factors[0] if len(factors) == 1 else mx.concatenate(list(factors))).astype(dtype)


def flat(x: mx.array) -> mx.array:
    """Return (N, D) of (B, T, D)."""
    return x.reshape(-1, x.shape[-1])
