"""Adapters of a user's own: one formula for the arrays of MLX and torch alike, found by "package.module:NAME".

The formula is handed arrays in the activations' dtype and uses what both libraries' arrays share: operators, `@`,
indexing, and methods such as `sum`, `mean`, `swapaxes`, `reshape`. Gradients are the frameworks' own.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from shared import seeds
from shared.errors import CapabilityError, ConfigError
from shared.registry import import_own
from shared.types import AdapterSpec, Tensor

Array = Any
VARIABLE = "MLXLORA_OWN_ADAPTERS"  # names that the user trusts, with commas between
OWN = ".own_adapter."  # between a module and its tensors


@dataclass(frozen=True)
class Layer:
    """What an adapter knows of the linear layer that it adapts."""

    name: str
    out: int
    width: int  # of the input
    rank: int
    scale: float  # alpha / rank
    seed: int = 0

    def uniform(self, leaf: str, shape: tuple[int, ...], *, bound: float) -> np.ndarray:
        """Return float32 values from U(-bound, bound), the same wherever the run is."""
        return seeds.uniform(seed=self.seed, name=f"{self.name}{OWN}{leaf}", shape=shape, bound=bound)

    def normal(self, leaf: str, shape: tuple[int, ...]) -> np.ndarray:
        """Return float32 values from N(0, 1), the same wherever the run is."""
        return seeds.normal(seed=self.seed, name=f"{self.name}{OWN}{leaf}", shape=shape)


@dataclass(frozen=True)
class OwnAdapter:
    """An adapter of linear layers.

    start: first values of what is trained, by names without dots. output: the adapted output (..., out) of the input
    (..., width), from the base's output and what is trained.
    """

    start: Callable[[Layer], Mapping[str, np.ndarray]]
    output: Callable[[Array, Array, Mapping[str, Array], Layer], Array]


def is_own(kind: str) -> bool:
    """Return whether a kind of adapter is a user's own.

    >>> is_own("dora"), is_own("package.module:IA3")
    (False, True)
    """
    return ":" in kind


def check_named(kind: str, *, own: str) -> None:
    """Raise CapabilityError unless the user named this adapter, in a config (own) or in MLXLORA_OWN_ADAPTERS.

    A folder's word is not enough: what it names would be imported, and so its code run.
    """
    if kind not in (own, *os.environ.get(VARIABLE, "").split(",")):
        raise CapabilityError(
            f'the adapter is computed by code, "{kind}", which only its folder names',
            code="E403", expected="that you name it too, where you trust it", fix=f"{VARIABLE}={shlex.quote(kind)}",
        )  # fmt: skip


def find_own(kind: str) -> OwnAdapter:
    """Return a user's adapter; its module is imported, and so its code is run. Raises ConfigError."""
    return import_own(kind, OwnAdapter, key="adapter.type")


def layer_for(spec: AdapterSpec, name: str, shape: tuple[int, ...], *, seed: int = 0) -> Layer:
    """Return what an adapter is told of a module; shape: (out, in)."""
    return Layer(name, shape[0], shape[1], spec.rank_of(name), spec.scale_of(name), seed)


def own_values(
    spec: AdapterSpec, linears: Mapping[str, tuple[int, ...]], *, seed: int = 0
) -> dict[str, Tensor]:  # fmt: skip
    """Return the first values of a spec's modules, `<module>.own_adapter.<name>`; raises ConfigError for odd ones."""
    adapter, found = find_own(spec.kind), {}
    for module in spec.modules:
        for leaf, values in adapter.start(layer_for(spec, module, linears[module], seed=seed)).items():
            array = np.asarray(values, dtype=np.float32)
            if not leaf.isidentifier() or not np.isfinite(array).all():
                raise ConfigError(
                    f'adapter.type: {spec.kind} starts "{leaf}" of "{module}" with values that cannot be used',
                    code="E202", expected="a name without dots, finite values",
                )  # fmt: skip
            found[f"{module}{OWN}{leaf}"] = Tensor("F32", array)
    return found
