"""Stacks of experts, quantized and adapted.

Quantized: packed bytes stay as they are, decoded for one product or multiplied by MLX's kernel. Adapted: a low-rank
product beside each expert, with gradients written by hand.
Legend: E experts, O output width, I input width, R rank, M rows of activations, one per token and chosen expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
from mlx import nn

from mlxlora.adapters import find_owner
from mlxlora.elementwise import on_gpu
from mlxlora.quantized import QuantizedLinear, base_arrays
from mlxlora.state import TO_MLX
from shared.convert.experts import pack_experts
from shared.errors import CapabilityError
from shared.experts import STACK, mlx_stack, num_experts
from shared.folder import ModelFolder
from shared.protocols import Quantizer
from shared.types import AdapterSpec, Packed


class QuantizedExperts(QuantizedLinear):
    """A frozen stack of E matrices (O, I) over packed arrays, called as mlx-lm calls its `SwitchLinear`."""

    def __init__(self, packed: Packed, number: int) -> None:
        super().__init__(packed, None)
        self._number = number
        self._products = {is_sorted: gathered_product(self, is_sorted) for is_sorted in (False, True)}

    def stack(self, dtype: mx.Dtype) -> mx.array:
        """Return the weights (E, O, I) in `dtype`, made anew."""
        return self.decoded(dtype).reshape(self._number, -1, self._stored.shape[1])

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """Return x @ W.T of the expert that `indices` chooses for every row."""
        if has_kernel(self, x.dtype):
            return experts_product(self, base_arrays(self), x, indices, is_sorted=sorted_indices)
        return self._products[sorted_indices](x, indices, *base_arrays(self))


def gathered_product(base: QuantizedExperts, is_sorted: bool) -> Any:
    """Return the product of chosen experts as a function of x, indices and `base_arrays`, decoded per direction."""

    @mx.custom_function
    def matmul(x: mx.array, indices: mx.array, *arrays: mx.array) -> mx.array:
        return gather(base.stack(x.dtype), x, indices)

    def gather(weights: mx.array, x: mx.array, indices: mx.array) -> mx.array:
        return mx.gather_mm(x, weights.swapaxes(-1, -2), rhs_indices=indices, sorted_indices=is_sorted)

    @matmul.vjp
    def backward(primals: tuple[mx.array, ...], cotangent: mx.array, _output: mx.array) -> tuple[mx.array, ...]:
        x, indices, *rest = primals
        weights = base.stack(x.dtype)
        _, (grad,) = mx.vjp(lambda rows: gather(weights, rows, indices), [x], [cotangent])
        return grad, *(mx.zeros_like(array) for array in (indices, *rest))

    return matmul


class LoRAExperts(nn.Module):
    """A frozen stack of experts with a trainable low-rank product beside each: A (E, R, I) and B (E, O, R), float32."""

    trained_leaves = ("lora_A", "lora_B")

    def __init__(self, base: nn.Module, *, name: str, spec: AdapterSpec, shape: tuple[int, int, int]) -> None:
        super().__init__()
        (number, out, width), rank = shape, spec.rank_of(name)
        self.base, self._scale = base, spec.scale_of(name)
        self.lora_A, self.lora_B = mx.zeros((number, rank, width)), mx.zeros((number, out, rank))
        self._products = {is_sorted: low_rank_experts(self, is_sorted) for is_sorted in (False, True)}

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """Return W x + scale * B A x of the expert that `indices` chooses for every row, as mlx-lm's `SwitchLinear`."""
        return self._products[sorted_indices](x, indices, self.lora_A, self.lora_B, *base_arrays(self.base))


def low_rank_experts(layer: LoRAExperts, is_sorted: bool) -> Any:
    """Return the layer's product as a function of x, indices, A, B and the base's arrays.

    Of the inputs x alone is saved. For the rows x of an expert e, with g = dy and u = scale * g B_e:
    dx = g W_e + u A_e,  dA_e = u.T x,  dB_e = scale * g.T (x A_e.T).
    """

    @mx.custom_function
    def forward(x: mx.array, indices: mx.array, A: mx.array, B: mx.array, *bases: mx.array) -> mx.array:
        low = gather(x, A.astype(x.dtype), indices, is_sorted=is_sorted)
        change = layer._scale * gather(low, B.astype(x.dtype), indices, is_sorted=is_sorted)
        return experts_product(layer.base, bases, x, indices, is_sorted=is_sorted) + change

    @forward.vjp
    def backward(primals: Sequence[mx.array], grad: mx.array, _output: mx.array) -> list[mx.array]:
        x, indices, A, B, *bases = primals
        wide, chosen_M = mx.broadcast_to(x, (*indices.shape, *x.shape[-2:])), indices.flatten()
        order_M = None if is_sorted else mx.argsort(chosen_M)
        rows = (array.reshape(-1, 1, array.shape[-1]) for array in (wide, grad))
        x_M1I, g_M1O = rows if order_M is None else (array[order_M] for array in rows)
        chosen_M = chosen_M if order_M is None else chosen_M[order_M]
        A, B, spans_E2 = A.astype(x.dtype), B.astype(x.dtype), spans(chosen_M, len(A))
        low_M1R = gather(x_M1I, A, chosen_M, is_sorted=True)
        u_M1R = layer._scale * gather(g_M1O, B, chosen_M, is_sorted=True, transpose=False)
        dx = experts_product(layer.base, bases, g_M1O, chosen_M, is_sorted=True, transpose=False)
        dx = dx + gather(u_M1R, A, chosen_M, is_sorted=True, transpose=False)
        dx = (dx if order_M is None else dx[mx.argsort(order_M)]).reshape(wide.shape)
        dA = mx.segmented_mm(u_M1R[:, 0].T, x_M1I[:, 0], spans_E2)
        dB = layer._scale * mx.segmented_mm(g_M1O[:, 0].T, low_M1R[:, 0], spans_E2)
        frozen = [mx.zeros_like(array) for array in (indices, *bases)]
        return [summed_to(dx, x.shape), frozen[0], dA.astype(mx.float32), dB.astype(mx.float32), *frozen[1:]]

    return forward


def gather(
    x: mx.array, weights_EOI: mx.array, indices: mx.array, *, is_sorted: bool, transpose: bool = True
) -> mx.array:
    """Return x @ W.T, or x @ W, of the expert that `indices` chooses for every row."""
    weights = weights_EOI.swapaxes(-1, -2) if transpose else weights_EOI
    return mx.gather_mm(x, weights, rhs_indices=indices, sorted_indices=is_sorted)


def experts_product(
    base: Any, arrays: Sequence[mx.array], x: mx.array, indices: mx.array, *, is_sorted: bool, transpose: bool = True
) -> mx.array:
    """Return x @ W.T, or x @ W, with frozen experts: by MLX's kernel, or decoded for this once."""
    if not isinstance(base, QuantizedExperts):
        return gather(x, arrays[0], indices, is_sorted=is_sorted, transpose=transpose)
    if not has_kernel(base, x.dtype):
        return gather(x, base.stack(x.dtype), indices, is_sorted=is_sorted, transpose=transpose)
    scheme, stacks = base._stored.scheme, (array.reshape(base._number, -1, array.shape[-1]) for array in arrays)
    return mx.gather_qmm(
        x, *stacks, rhs_indices=indices, transpose=transpose, group_size=scheme.group_size, bits=scheme.bits,
        sorted_indices=is_sorted,
    )  # fmt: skip


def has_kernel(base: QuantizedExperts, dtype: mx.Dtype) -> bool:
    """Return whether MLX multiplies quantized experts as they are, faster than decoded."""
    return base._stored.scheme.name == "affine" and on_gpu() and dtype == TO_MLX[base._stored.dtype]


def spans(chosen_M: mx.array, number: int) -> mx.array:
    """Return (E, 2) uint32: first row of every expert among sorted rows, and the one behind its last."""
    numbers_E1 = mx.arange(number, dtype=chosen_M.dtype)[:, None]
    bounds = [(chosen_M < numbers_E1).sum(axis=1), (chosen_M <= numbers_E1).sum(axis=1)]
    return mx.stack(bounds, axis=1).astype(mx.uint32)


def summed_to(x: mx.array, shape: tuple[int, ...]) -> mx.array:
    """Return x summed over the axes along which an array of `shape` was spread."""
    axes = [axis for axis, (size, own) in enumerate(zip(x.shape, shape, strict=True)) if size != own]
    return x.sum(axis=axes, keepdims=True) if axes else x


def attach_experts(root: nn.Module, spec: AdapterSpec, stacks: Mapping[str, tuple[int, int, int]], family: str) -> None:
    """Replace the spec's stacks of experts, in place, by LoRA layers over them."""
    for name in (one for one in spec.modules if one in stacks):
        owner, leaf = find_owner(root, mlx_stack(family, name))
        setattr(owner, leaf, LoRAExperts(owner[leaf], name=name, spec=spec, shape=stacks[name]))


def quantize_experts(zoo: Any, folder: ModelFolder, quantizer: Quantizer) -> list[str]:
    """Quantize the experts of every layer from the stored tensors; return the names of those left out."""
    left: list[str] = []
    for name, module in list(zoo.named_modules()):
        if not name.endswith(STACK.rstrip(".")):
            continue
        stacks = pack_experts(folder, quantizer, ".".join(name.split(".")[:3]))
        left += [name] if stacks is None else []
        for leaf, packed in (stacks or {}).items():
            module[leaf] = QuantizedExperts(packed, num_experts(folder.config))
    return left


def check_experts(folder: ModelFolder, dtype: str) -> None:
    """Raise CapabilityError for experts in a dtype that MLX multiplies on a GPU only (0.32)."""
    if num_experts(folder.config) > 1 and dtype != "float32" and not on_gpu():
        raise CapabilityError(
            f"MLX on a CPU computes experts ({folder.family}) in float32 only, not in {dtype}",
            fix="train.dtype: float32, or the torch backend",
        )
