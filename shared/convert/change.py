"""What an adapter does to a base's weights, row by row, in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from shared.adapters.folder import Adapter
from shared.adapters.names import SAVED
from shared.adapters.own import is_own
from shared.adapters.spec import is_embedding, is_saved
from shared.convert.source import Weight
from shared.errors import AdapterError, CapabilityError
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


def find_changes(adapter: Adapter, weights: Mapping[str, Weight]) -> dict[str, AnyChange]:
    """Return the change of every weight that an adapter touches, by the weight's name.

    Raises AdapterError where the adapter does not fit the base or holds NaN or infinity.
    """
    spec = adapter.spec
    if is_own(spec.kind):
        raise CapabilityError(
            f"{spec.kind} is a user's own adapter: nobody knows what it does to a weight", code="E405",
            expected="LoRA, rsLoRA or DoRA", fix="use it beside the base: --adapter",
        )  # fmt: skip
    touched = [*spec.modules, *spec.saved]
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
        shape = weights[f"{module}.weight"].shape
        if len(shape) != 2:
            raise AdapterError(f'"{module}" has a weight of shape {shape}', expected="a matrix (out, in)")
        rank = spec.rank_of(module)
        if is_embedding(module):  # its weight (V, D) is that of a linear layer, turned
            size = {"lora_embedding_A": (rank, shape[0]), "lora_embedding_B": (shape[1], rank)}
            A, B = (read_leaf(adapter.tensors, f"{module}.{leaf}", shape=found) for leaf, found in size.items())
            changes[f"{module}.weight"] = Change(B.T, A.T, spec.scale_of(module))
            continue
        leaves: dict[str, tuple[int, ...]] = {"lora_A": (rank, shape[1]), "lora_B": (shape[0], rank)}
        if spec.kind == "dora":
            leaves["lora_magnitude_vector"] = (shape[0],)
        A, B, *magnitude = (read_leaf(adapter.tensors, f"{module}.{leaf}", shape=size) for leaf, size in leaves.items())
        changes[f"{module}.weight"] = Change(A, B, spec.scale_of(module), *magnitude)
    return changes


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
