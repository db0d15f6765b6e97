"""Modules that are trained whole beside an adapter, as PEFT's modules_to_save: a float32 copy takes the base's place.

The base's own module stays, frozen. The copy is cast to the activations' dtype where it is used.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx import nn

from mlxlora.adapters import find_owner
from mlxlora.quantized import QuantizedEmbedding, QuantizedLinear
from shared.types import AdapterSpec

LEAVES = ("weight", "bias")


class Whole(nn.Module):
    """A frozen module and the copy of it that is trained and used."""

    trained_leaves = ("modules_to_save.weight", "modules_to_save.bias")

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.modules_to_save = base, float_copy(base)

    def __call__(self, x: mx.array) -> mx.array:
        """Return what the base computes of x, with the trained values."""
        copy, base = self.modules_to_save, self.base
        dtype = x.dtype if mx.issubdtype(x.dtype, mx.floating) else getattr(base, "_dtype", base["weight"].dtype)
        return with_values(copy, {leaf: copy[leaf].astype(dtype) for leaf in LEAVES if leaf in copy})(x)


def float_copy(base: Any) -> Any:
    """Return a module with float32 values, the decoded ones where the base is quantized."""
    kind = {QuantizedLinear: nn.Linear, QuantizedEmbedding: nn.Embedding}.get(type(base))
    if kind is None:
        return with_values(base, {leaf: base[leaf].astype(mx.float32) for leaf in LEAVES if leaf in base})
    copy = kind(1, 1, bias=False) if kind is nn.Linear else kind(1, 1)
    copy.weight = base.decoded(mx.float32)
    if "bias" in base:
        copy.bias = base.bias.astype(mx.float32)
    return copy


def with_values(module: Any, values: dict[str, mx.array]) -> Any:
    """Return a module of the same class and settings with other values; the first is not touched."""
    kind: Any = type(module)
    other = kind.__new__(kind)
    other.__dict__.update(module.__dict__)
    other.__dict__["_no_grad"] = set()
    dict.update(other, module)
    dict.update(other, values)
    return other


def find_norms(root: Any) -> dict[str, int]:
    """Return the width of every module that holds a vector of weights."""
    return {name: module.weight.size for name, module in root.named_modules() if is_norm(module)}


def is_norm(module: Any) -> bool:
    """Return whether a module holds a vector of weights, and at most a bias beside it."""
    return "weight" in module and set(module) <= {"weight", "bias"} and module.weight.ndim == 1


def attach_whole(root: nn.Module, spec: AdapterSpec, *, head: Any) -> Any:
    """Put trained copies over the spec's whole modules, in place; return the head's, None where it stays.

    head: the module of the base that is the head, the embedding where both are one.
    """
    found = None
    for name in spec.saved:
        owner, leaf = find_owner(root, name)
        base = owner.get(leaf, head)
        layer = Whole(base)
        setattr(owner, leaf, layer)
        if base is head and (spec.tied or name == "lm_head"):
            found = layer.modules_to_save
    return found
