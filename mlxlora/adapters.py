"""LoRA: y = base(x) + (alpha/r) * dropout(x) A.T B.T, replacing linear modules in place.

Legend: B rows, T tokens, D input width, O output width, R rank. A is (R, D), B is (O, R), both float32 and
cast to the activations' dtype where they are used (`lowrank.py`). Source: Hu et al. 2021, section 4.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from mlxlora.lowrank import Readers
from shared import seeds
from shared.adapters.spec import shared_inputs
from shared.types import AdapterSpec


class Dropout:
    """The dropout of all adapter layers: masks are a hash of (seed, step, layer, row, token, feature).

    `begin` is called before a micro-batch's forward pass; outside of training nothing is dropped.
    """

    def __init__(self, *, p: float) -> None:
        self.p = p
        self.token_BT: mx.array | None = None
        self.columns: dict[str, mx.array] = {}

    @property
    def active(self) -> bool:
        """Return whether anything is dropped now."""
        return self.p > 0.0 and self.token_BT is not None

    def begin(self, *, seed: int, step: int, places: tuple[np.ndarray, np.ndarray]) -> None:
        """Prepare the masks of one micro-batch; places: `Batch.places`."""
        if self.p == 0.0:
            return
        self.token_BT = mx.array(seeds.token_keys(seed=seed, step=step, slots_BT=places[0], times_BT=places[1]))

    def end(self) -> None:
        """Stop dropping."""
        self.token_BT = None

    def mask(self, name: str, *, width: int) -> mx.array:
        """Return (B, T, D) bool, true where a feature of the layer `name` is kept."""
        assert self.token_BT is not None
        if name not in self.columns:
            self.columns[name] = mx.array(seeds.column_keys(name=name, width=width))
        hash_BTD = mix32(self.token_BT[:, :, None] ^ self.columns[name])
        return (hash_BTD >> (32 - seeds.KEEP_BITS)) >= seeds.keep_threshold(self.p)

    def __call__(self, x_BTD: mx.array, name: str) -> mx.array:
        """Return x with features dropped and the rest scaled by 1 / (1 - p)."""
        if not self.active:
            return x_BTD
        scaled = self.mask(name, width=x_BTD.shape[-1]).astype(x_BTD.dtype) * (1 / (1 - self.p))
        return x_BTD * scaled


def mix32(x: mx.array) -> mx.array:
    """Return `shared.seeds.mix32` of uint32 words."""
    x = (x ^ (x >> 16)) * mx.array(seeds.MIX_A, dtype=mx.uint32)
    x = (x ^ (x >> 15)) * mx.array(seeds.MIX_B, dtype=mx.uint32)
    return x ^ (x >> 16)


class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable low-rank product beside it."""

    trained_leaves = ("lora_A", "lora_B")

    def __init__(
        self, base: nn.Module, *, name: str, spec: AdapterSpec, dropout: Dropout, shape: tuple[int, int]
    ) -> None:
        super().__init__()
        self.base, self._name, self._scale, self._dropout = base, name, spec.scale_of(name), dropout
        rank = spec.rank_of(name)
        self.lora_A, self.lora_B = mx.zeros((rank, shape[1])), mx.zeros((shape[0], rank))
        self._readers = Readers([self])

    def __call__(self, x_BTD: mx.array) -> mx.array:
        """Return base(x) + scale * dropout(x) A.T B.T."""
        return self._readers.output_of(self, x_BTD)

    def after_gate(self, gate_BTD: mx.array, up_BTD: mx.array) -> mx.array:
        """Return the output for silu(gate) * up, which is not kept."""
        return self._readers.output_of(self, gate_BTD, up_BTD)


def attach_lora(root: nn.Module, spec: AdapterSpec, dropout: Dropout, linears: Mapping[str, tuple[int, int]]) -> None:
    """Replace the spec's modules, in place, by LoRA layers over them."""
    layers: dict[str, LoRALinear] = {}
    for name in spec.modules:
        owner, leaf = find_owner(root, name)
        layers[name] = LoRALinear(getattr(owner, leaf), name=name, spec=spec, dropout=dropout, shape=linears[name])
        setattr(owner, leaf, layers[name])
    for names in shared_inputs(spec) if dropout.p == 0.0 else ():
        readers = Readers([layers[name] for name in names])
        for layer in readers.layers:
            layer._readers = readers


def find_owner(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that holds the module `name`, and its name there."""
    *path, leaf = name.split(".")
    owner = root
    for part in path:
        owner = owner[int(part)] if part.isdigit() else getattr(owner, part)
    return owner, leaf


def adapter_modules(root: nn.Module) -> Mapping[str, Any]:
    """Return the adapter layers by canonical name, in module order; `trained_leaves` of each says what it learns."""
    return {name: module for name, module in root.named_modules() if hasattr(module, "trained_leaves")}
