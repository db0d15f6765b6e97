"""Adapters of a user's own: y = output(x, base(x), trained), replacing linear modules in place."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
from mlx import nn

from mlxlora.adapters import Dropout, find_owner
from mlxlora.state import to_mlx
from shared.adapters.own import OWN, Layer, OwnAdapter, find_own, layer_for, own_values
from shared.types import AdapterSpec, Tensor


class OwnLinear(nn.Module):
    """A frozen linear layer, and what a user's formula makes of its output."""

    trained_leaves = ()

    def __init__(
        self, base: nn.Module, *, adapter: OwnAdapter, layer: Layer, dropout: Dropout, values: Mapping[str, Tensor]
    ) -> None:
        super().__init__()
        self.base, self._adapter, self._layer, self._dropout = base, adapter, layer, dropout
        self.own_adapter = nn.Module()
        for leaf, value in values.items():
            self.own_adapter[leaf] = to_mlx(value)

    def __call__(self, x_BTD: mx.array) -> mx.array:
        """Return the adapted output, in the input's dtype."""
        trained = {leaf: value.astype(x_BTD.dtype) for leaf, value in self.own_adapter.items()}
        y_BTO = self._adapter.output(self._dropout(x_BTD, self._layer.name), self.base(x_BTD), trained, self._layer)
        return y_BTO.astype(x_BTD.dtype)


def attach_own(root: nn.Module, spec: AdapterSpec, dropout: Dropout, linears: Mapping[str, tuple[int, int]]) -> None:
    """Replace the spec's modules, in place, by a user's layers over them."""
    adapter, values = find_own(spec.kind), own_values(spec, linears)
    for name in spec.modules:
        owner, leaf = find_owner(root, name)
        own = {key.removeprefix(name + OWN): value for key, value in values.items() if key.startswith(name + OWN)}
        layer = layer_for(spec, name, linears[name])
        setattr(owner, leaf, OwnLinear(getattr(owner, leaf), adapter=adapter, layer=layer, dropout=dropout, values=own))
