"""What an adapter does to a base's weights, row by row, in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from shared.adapters.folder import Adapter
from shared.adapters.names import SAVED
from shared.adapters.own import is_own
from shared.adapters.spec import factor_shapes, is_embedding, is_saved
from shared.convert.source import Weight
from shared.errors import AdapterError, CapabilityError
from shared.experts import BLOCK, MIXTURES, expert_names, is_stack, mlx_stack
from shared.tensors import is_finite, to_float32
from shared.types import Tensor

# O rows of the weight, I its width, R rank
ROUNDING = 1e-6  # a magnitude this near to its row's norm is that norm, summed in float32


@dataclass(frozen=True)
class Change:
    """The change of one weight: W + scale * B A; with DoRA's magnitudes m / |W + scale B A| times that, row by row."""

    A: np.ndarray  # (R, I) float32
    B: np.ndarray  # (O, R) float32
    scale: float
    magnitude: np.ndarray | None = None  # (O,) float32

    def is_nothing(self) -> bool:
        """Return whether the weight surely stays as it is, bit for bit."""
        return self.magnitude is None and (self.scale == 0 or not (self.A.any() and self.B.any()))

    def apply(self, weight: np.ndarray, rows: slice) -> np.ndarray:
        """Return these rows of the changed weight, float64; weight: the same rows of the base, (rows, I)."""
        base = np.asarray(weight, dtype=np.float64)
        product = self.scale * (self.B[rows].astype(np.float64) @ self.A.astype(np.float64))
        changed = np.where(product == 0, base, base + product)  # a sum would turn -0 into 0
        if self.magnitude is None:
            return changed
        norms = np.linalg.norm(changed, axis=1)
        gain = self.magnitude[rows] / np.where(norms == 0, 1.0, norms)
        gain[np.abs(gain - 1) <= ROUNDING] = 1  # a magnitude that was never moved
        return changed * gain[:, None]


@dataclass(frozen=True)
class Replacement:
    """Values that stand in the place of a weight: of a module that was trained whole."""

    values: np.ndarray  # float32, in the weight's shape

    def is_nothing(self) -> bool:
        """Return whether the weight surely stays as it is; only the weight could say."""
        return False

    def apply(self, weight: np.ndarray, rows: slice) -> np.ndarray:
        """Return these rows in float64."""
        return self.values[rows].astype(np.float64)


AnyChange = Change | Replacement


def find_changes(
    adapter: Adapter, weights: Mapping[str, Weight], config: Mapping[str, Any]
) -> dict[str, AnyChange]:  # fmt: skip
    """Return the change of every weight that an adapter touches, by the weight's name; config: of the base.

    Raises AdapterError where the adapter does not fit the base or holds NaN or infinity.
    """
    spec = adapter.spec
    if is_own(spec.kind):
        raise CapabilityError(
            f"{spec.kind} is a user's own adapter: nobody knows what it does to a weight", code="E405",
            expected="LoRA, rsLoRA or DoRA", fix="use it beside the base: --adapter",
        )  # fmt: skip
    touched = [*(name for name in spec.modules if not is_stack(name)), *spec.saved]
    missing = [module for module in touched if f"{module}.weight" not in weights]
    if missing:
        raise AdapterError(
            f'the adapter does not fit this base: it has no layer "{missing[0]}" '
            f"({len(missing)} of {len(touched)} modules are missing)",
            fix="use the base that the adapter was trained on",
        )
    changes: dict[str, AnyChange] = {}
    for name in filter(is_saved, adapter.tensors):
        plain = name.replace(SAVED, "")
        shape = weights[plain].shape if plain in weights else ()
        changes[plain] = Replacement(read_leaf(adapter.tensors, name, shape=shape))
    for module in spec.modules:
        own = changes_of_experts if is_stack(module) else changes_of_matrix
        changes |= own(adapter, module, weights, config)
    return changes


def changes_of_matrix(
    adapter: Adapter, module: str, weights: Mapping[str, Weight], _config: Mapping[str, Any]
) -> dict[str, AnyChange]:  # fmt: skip
    """Return the change of a module's weight, a matrix."""
    spec, shape = adapter.spec, weights[f"{module}.weight"].shape
    if len(shape) != 2:
        raise AdapterError(f'"{module}" has a weight of shape {shape}', expected="a matrix (out, in)")
    is_turned = is_embedding(module)  # its weight (V, D) is that of a linear layer, turned
    leaves = factor_shapes(module, shape[::-1] if is_turned else shape, rank=spec.rank_of(module))
    if spec.kind == "dora":
        leaves[f"{module}.lora_magnitude_vector"] = (shape[0],)
    A, B, *magnitude = (read_leaf(adapter.tensors, name, shape=size) for name, size in leaves.items())
    A, B = (B.T, A.T) if is_turned else (A, B)
    return {f"{module}.weight": Change(A, B, spec.scale_of(module), *magnitude)}


def changes_of_experts(
    adapter: Adapter, module: str, weights: Mapping[str, Weight], config: Mapping[str, Any]
) -> dict[str, AnyChange]:  # fmt: skip
    """Return the changes of a stack's weights, expert by expert; raises CapabilityError where these are one."""
    layer, _, leaf = module.partition(f".{BLOCK}.experts.")
    names = expert_names(config, layer, leaf) if config.get("model_type") in MIXTURES else []
    missing = next((name for name in names if name not in weights), None)
    if not names or (missing and mlx_stack(config["model_type"], f"{module}.weight") not in weights):
        raise AdapterError(
            f'the adapter does not fit this base: it has no experts "{module}"',
            fix="use the base that the adapter was trained on",
        )
    if missing:
        raise CapabilityError(
            f'the adapter changes experts ("{module}"), which this base stores as quantized stacks', code="E405",
            fix="fuse it into the model that the base was quantized from",
        )  # fmt: skip
    shape = (len(names), *weights[names[0]].shape)
    A, B = (
        read_leaf(adapter.tensors, name, shape=size)
        for name, size in factor_shapes(module, shape, rank=adapter.spec.rank_of(module)).items()
    )
    return {name: Change(A[n], B[n], adapter.spec.scale_of(module)) for n, name in enumerate(names)}


def read_leaf(tensors: Mapping[str, Tensor], name: str, *, shape: tuple[int, ...]) -> np.ndarray:
    """Return a tensor of an adapter as float32; raises AdapterError unless it is there, fits and is finite."""
    found = tensors.get(name)
    if found is None or found.shape != shape:
        state = "is missing" if found is None else f"has shape {found.shape}"
        raise AdapterError(
            f'adapter tensor "{name}" {state}', expected=f"{shape} for this base",
            fix="use the base that the adapter was trained on",
        )  # fmt: skip
    if not is_finite(found):
        raise AdapterError(
            f'adapter tensor "{name}" holds NaN or infinity', code="E311", fix="train or copy the adapter again"
        )
    return to_float32(found)
