"""Quantized stacks of experts: packed bytes stay as they are, decoded for one product or multiplied by MLX's kernel.

Legend: E experts, O output width, I input width.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlxlora.elementwise import on_gpu
from mlxlora.quantized import QuantizedLinear, base_arrays
from mlxlora.state import TO_MLX
from shared.convert.experts import pack_experts
from shared.errors import CapabilityError
from shared.experts import STACK, num_experts
from shared.folder import ModelFolder
from shared.protocols import Quantizer
from shared.types import Packed


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
        scheme = self._stored.scheme
        if scheme.name != "affine" or not on_gpu() or x.dtype != TO_MLX[self._stored.dtype]:
            return self._products[sorted_indices](x, indices, *base_arrays(self))
        arrays = (self[key].reshape(self._number, -1, self[key].shape[-1]) for key in self._keys)
        return mx.gather_qmm(
            x, *arrays, rhs_indices=indices, transpose=True, group_size=scheme.group_size, bits=scheme.bits,
            sorted_indices=sorted_indices,
        )  # fmt: skip


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
