"""Adapters of a user's own: y = output(x, base(x), trained), replacing linear modules in place."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from shared.adapters.own import OWN, Layer, OwnAdapter, find_own, layer_for, own_values
from shared.types import AdapterSpec, Tensor
from torch_backend.adapters import Dropout
from torch_backend.state import to_torch


class OwnLinear(nn.Module):
    """A frozen linear layer, and what a user's formula makes of its output."""

    def __init__(
        self, base: nn.Module, *, adapter: OwnAdapter, layer: Layer, dropout: Dropout, values: Mapping[str, Tensor]
    ) -> None:
        super().__init__()
        self.base, self.adapter, self.layer, self.dropout = base, adapter, layer, dropout
        device = next(iter([*base.parameters(), *base.buffers()])).device
        self.own_adapter = nn.ParameterDict(
            {leaf: nn.Parameter(to_torch(value).to(device)) for leaf, value in values.items()}
        )
        self.trained_leaves = tuple(f"own_adapter.{leaf}" for leaf in values)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Return the adapted output, in the input's dtype."""
        trained = {leaf: value.to(x_BTD.dtype) for leaf, value in self.own_adapter.items()}
        y_BTO = self.adapter.output(self.dropout(x_BTD, self.layer.name), self.base(x_BTD), trained, self.layer)
        return y_BTO.to(x_BTD.dtype)


def attach_own(root: nn.Module, spec: AdapterSpec, dropout: Dropout, linears: Mapping[str, tuple[int, int]]) -> None:
    """Replace the spec's modules, in place, by a user's layers over them."""
    adapter, values = find_own(spec.kind), own_values(spec, linears)
    for name in spec.modules:
        parent, _, leaf = name.rpartition(".")
        owner = root.get_submodule(parent)
        own = {key.removeprefix(name + OWN): value for key, value in values.items() if key.startswith(name + OWN)}
        layer = layer_for(spec, name, linears[name])
        setattr(owner, leaf, OwnLinear(getattr(owner, leaf), adapter=adapter, layer=layer, dropout=dropout, values=own))
