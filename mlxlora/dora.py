"""DoRA: y = m / |W + s B A| * (W x + s B A dropout(x)), rows scaled to learned magnitudes m.

Legend: B rows, T tokens, D input width, O output width, R rank; |.| is the norm of each of the O rows.
Source: Liu et al. 2024, section 4.1; the norm gets no gradient (section 4.3). Dropout is on the low-rank branch alone,
as in mlx-lm. |W + s B A|^2 = |W|^2 + 2 s (W A.T)B + s^2 B (A A.T) B, row by row: no matrix as large as W is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx import nn

from mlxlora.adapters import Dropout, find_owner
from mlxlora.lowrank import gradients_of, outputs_of
from mlxlora.quantized import base_arrays, product
from mlxlora.state import from_mlx, to_mlx
from shared.adapters.spec import row_squares
from shared.types import AdapterSpec, Tensor

LEAST_SQUARE = float(np.finfo(np.float32).tiny)


class DoRALinear(nn.Module):
    """A frozen linear layer with a low-rank product beside it, and a learned norm for each row of the sum."""

    trained_leaves = ("lora_A", "lora_B", "lora_magnitude_vector")

    def __init__(
        self, base: nn.Module, *, name: str, spec: AdapterSpec, dropout: Dropout, shape: tuple[int, int]
    ) -> None:
        super().__init__()
        self.base, self._name, self._scale, self._dropout = base, name, spec.scale_of(name), dropout
        rank = spec.rank_of(name)
        self.lora_A, self.lora_B = mx.zeros((rank, shape[1])), mx.zeros((shape[0], rank))
        squares = row_squares(from_mlx(frozen_weight(base)))
        self._squares = to_mlx(Tensor("F32", squares))
        self._start = Tensor("F32", np.sqrt(squares))
        self.lora_magnitude_vector = to_mlx(self._start)
        self._function = scaled_rows(self)

    def __call__(self, x_BTD: mx.array) -> mx.array:
        """Return m / |W + s B A| * (base(x) + s dropout(x) A.T B.T); the bias is left as it is."""
        y_BTO, _ = self._function(
            x_BTD, self.lora_A, self.lora_B, self.lora_magnitude_vector, *base_arrays(self.base)
        )  # fmt: skip
        bias = self.base.get("bias")
        return y_BTO if bias is None else y_BTO + bias


def scaled_rows(layer: DoRALinear) -> Callable[..., list[mx.array]]:
    """Return [y, norms] as a function of x, A, B, m and the base's arrays; of the inputs x alone is saved.

    With z = W x + s B A x and g = m / |W + s B A|: dz = g dy, dm = sum (dy * z) / |.|; the rest is LoRA's of dz.
    """

    @mx.custom_function
    def forward(x: mx.array, A: mx.array, B: mx.array, m_O: mx.array, *bases: mx.array) -> list[mx.array]:
        norms_O = row_norms(layer, x.dtype, A, B, bases)
        return [outputs_of([layer], x, [A, B, *bases])[0] * (m_O / norms_O).astype(x.dtype), norms_O]

    @forward.vjp
    def backward(primals: list[mx.array], grads: list[mx.array], outputs: list[mx.array]) -> list[mx.array]:
        (x, A, B, m_O, *bases), dy_BTO, norms_O = primals, grads[0], outputs[1]
        z_BTO = outputs_of([layer], x, [A, B, *bases])[0]
        dm_O = (dy_BTO * z_BTO).astype(mx.float32).reshape(-1, z_BTO.shape[-1]).sum(axis=0) / norms_O
        dz_BTO = dy_BTO * (m_O / norms_O).astype(x.dtype)
        dx, dA, dB, *rest = gradients_of([layer], x, [A, B, *bases], [dz_BTO])
        return [dx, dA, dB, dm_O, *rest]

    return cast(Callable[..., list[mx.array]], forward)


def row_norms(layer: Any, dtype: mx.Dtype, A: mx.array, B: mx.array, bases: Any) -> mx.array:
    """Return (O,) float32 norms of the rows of W + s B A, above 0: a row of zeros would make NaN of its magnitude."""
    across_OR = product(layer.base, list(bases), A.astype(dtype)).T.astype(mx.float32)  # W A.T
    change_OR = layer._scale * B
    twice_O = 2 * (across_OR * change_OR).sum(axis=1)
    squares_O = layer._squares + twice_O + ((change_OR @ (A @ A.T)) * change_OR).sum(axis=1)
    return mx.sqrt(mx.maximum(squares_O, LEAST_SQUARE))


def attach_dora(root: nn.Module, spec: AdapterSpec, dropout: Dropout, linears: Mapping[str, tuple[int, int]]) -> None:
    """Replace the spec's modules, in place, by DoRA layers over them."""
    for name in spec.modules:
        owner, leaf = find_owner(root, name)
        layer = DoRALinear(getattr(owner, leaf), name=name, spec=spec, dropout=dropout, shape=linears[name])
        setattr(owner, leaf, layer)


def frozen_weight(base: Any) -> mx.array:
    """Return the weight (O, D) of a frozen layer, decoded where it is quantized."""
    return base.decoded(mx.float32) if hasattr(base, "decoded") else base.weight


def magnitudes(root: nn.Module) -> dict[str, Tensor]:
    """Return the norms of the base's rows under the names of the magnitudes that start from them."""
    return {
        f"{name}.lora_magnitude_vector": module._start
        for name, module in root.named_modules()
        if "lora_magnitude_vector" in getattr(module, "trained_leaves", ())
    }
