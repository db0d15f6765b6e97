"""Modules that are trained whole beside an adapter, as PEFT's modules_to_save: a float32 copy takes the base's place.

The base's own module stays, frozen. The copy is cast to the activations' dtype where it is used.
"""

from __future__ import annotations

import copy as copying
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from shared.types import AdapterSpec
from torch_backend.quantized import QuantizedEmbedding, QuantizedLinear

LEAVES = ("weight", "bias")


class Whole(nn.Module):
    """A frozen module and the copy of it that is trained and used."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.modules_to_save = base, float_copy(base)
        self.trained_leaves = tuple(f"modules_to_save.{leaf}" for leaf, _ in self.modules_to_save.named_parameters())
        self.scale = base.scale if isinstance(base, QuantizedEmbedding) else 1.0  # its copy knows of none

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the base computes of x, with the trained values."""
        base: Any = self.base
        dtype = x.dtype if x.is_floating_point() else getattr(base, "dtype", None) or base.weight.dtype
        values = {leaf: value.to(dtype) for leaf, value in self.modules_to_save.named_parameters()}
        y = functional_call(self.modules_to_save, values, (x,))
        return y if self.scale == 1.0 else y * self.scale


def float_copy(base: Any) -> nn.Module:
    """Return a module with float32 values, the decoded ones where the base is quantized."""
    if not isinstance(base, QuantizedLinear | QuantizedEmbedding):
        return copying.deepcopy(base).float()
    weight = base.decoded(torch.float32)
    if isinstance(base, QuantizedEmbedding):
        return nn.Embedding.from_pretrained(weight, freeze=False)
    copy = nn.Linear(1, 1, bias=base.bias is not None)
    copy.weight = nn.Parameter(weight)
    if base.bias is not None:
        copy.bias = nn.Parameter(base.bias.detach().float().clone())
    return copy


def find_norms(root: Any) -> dict[str, int]:
    """Return the width of every module that holds a vector of weights."""
    return {name: int(module.weight.numel()) for name, module in root.named_modules() if is_norm(module)}


def is_norm(module: Any) -> bool:
    """Return whether a module holds a vector of weights, and at most a bias beside it."""
    held = {name: value for name, value in module._parameters.items() if value is not None}
    return not module._modules and "weight" in held and set(held) <= {"weight", "bias"} and held["weight"].dim() == 1


def attach_whole(root: nn.Module, spec: AdapterSpec, *, head: Any) -> Any:
    """Put trained copies over the spec's whole modules, in place; return the head's, None where it stays.

    head: the module of the base that is the head.
    """
    found = None
    for name in spec.saved:
        parent, _, leaf = name.rpartition(".")
        owner = root.get_submodule(parent)
        base = getattr(owner, leaf)
        layer = Whole(base)
        setattr(owner, leaf, layer)
        if base is head or (spec.tied and isinstance(base, nn.Embedding | QuantizedEmbedding)):
            found = layer.modules_to_save
    return found
