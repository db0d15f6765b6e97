"""LoRA: y = base(x) + (alpha/r) * dropout(x) A.T B.T, replacing linear modules in place.

Legend: B rows, T tokens, D input width, O output width, R rank. A is (R, D), B is (O, R), both float32 and
cast to the activations' dtype where they are used (`lowrank.py`). Source: Hu et al. 2021, section 4.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from shared import seeds
from shared.adapters.spec import shared_inputs
from shared.types import AdapterSpec
from torch_backend.lowrank import Readers
from torch_backend.state import send


class Dropout:
    """The dropout of all adapter layers: masks are a hash of (seed, step, layer, row, token, feature).

    `begin` is called before a micro-batch's forward pass; outside of training nothing is dropped.
    """

    def __init__(self, *, p: float) -> None:
        self.p = p
        self.token_BT: torch.Tensor | None = None
        self.columns: dict[str, torch.Tensor] = {}

    @property
    def active(self) -> bool:
        """Return whether anything is dropped now."""
        return self.p > 0.0 and self.token_BT is not None

    def begin(self, *, seed: int, step: int, places: tuple[np.ndarray, np.ndarray], device: torch.device | str) -> None:
        """Prepare the masks of one micro-batch; places: `Batch.places`."""
        if self.p == 0.0:
            return
        keys = seeds.token_keys(seed=seed, step=step, slots_BT=places[0], times_BT=places[1])
        self.token_BT = send(torch.from_numpy(keys.view(np.int32)), device)

    def end(self) -> None:
        """Stop dropping."""
        self.token_BT = None

    def mask(self, name: str, *, width: int) -> torch.Tensor:
        """Return (B, T, D) bool, true where a feature of the layer `name` is kept."""
        assert self.token_BT is not None
        if name not in self.columns:
            words = seeds.column_keys(name=name, width=width).view(np.int32)
            self.columns[name] = torch.from_numpy(words.copy()).to(self.token_BT.device)
        hash_BTD = mix32(self.token_BT[:, :, None] ^ self.columns[name])
        return shift_right(hash_BTD, 32 - seeds.KEEP_BITS) >= seeds.keep_threshold(self.p)

    def __call__(self, x_BTD: torch.Tensor, name: str) -> torch.Tensor:
        """Return x with features dropped and the rest scaled by 1 / (1 - p)."""
        if not self.active:
            return x_BTD
        scaled = self.mask(name, width=x_BTD.shape[-1]).to(x_BTD.dtype) * (1 / (1 - self.p))
        return x_BTD * scaled


def shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the unsigned right shift of int32 words."""
    return (x >> bits) & (2 ** (32 - bits) - 1)


def mix32(x: torch.Tensor) -> torch.Tensor:
    """Return `shared.seeds.mix32` of int32 words, which wrap as uint32 words do."""
    x = (x ^ shift_right(x, 16)) * seeds.MIX_A
    x = (x ^ shift_right(x, 15)) * (seeds.MIX_B - 2**32)
    return x ^ shift_right(x, 16)


class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable low-rank product beside it."""

    trained_leaves = ("lora_A", "lora_B")

    def __init__(
        self, base: nn.Module, *, name: str, spec: AdapterSpec, dropout: Dropout, shape: tuple[int, int]
    ) -> None:
        super().__init__()
        self.base, self.name, self.scale, self.dropout = base, name, spec.scale_of(name), dropout
        rank, (self.out_features, self.in_features) = spec.rank_of(name), shape
        device = next(iter([*base.parameters(), *base.buffers()])).device
        self.lora_A = nn.Parameter(torch.zeros(rank, self.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=device))
        self.readers = Readers([self])

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Return base(x) + scale * dropout(x) A.T B.T."""
        return self.readers.output_of(self, x_BTD)

    def after_gate(self, gate_BTD: torch.Tensor, up_BTD: torch.Tensor) -> torch.Tensor:
        """Return the output for silu(gate) * up, which is not kept."""
        return self.readers.output_of(self, gate_BTD, up_BTD)

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the base's (O, D) weight, decoded where it is quantized."""
        base: Any = self.base
        return base.decoded(dtype) if hasattr(base, "decoded") else base.weight


def attach_lora(root: nn.Module, spec: AdapterSpec, dropout: Dropout, linears: Mapping[str, tuple[int, int]]) -> None:
    """Replace the spec's modules, in place, by LoRA layers over them."""
    layers: dict[str, LoRALinear] = {}
    for name in spec.modules:
        parent, _, leaf = name.rpartition(".")
        owner = root.get_submodule(parent)
        layers[name] = LoRALinear(getattr(owner, leaf), name=name, spec=spec, dropout=dropout, shape=linears[name])
        setattr(owner, leaf, layers[name])
    for names in shared_inputs(spec) if dropout.p == 0.0 else ():
        readers = Readers([layers[name] for name in names])
        for layer in readers.layers:
            layer.readers = readers


def adapter_parameters(root: nn.Module) -> Mapping[str, nn.Parameter]:
    """Return the trainable tensors as `<module>.lora_A` and the like, in module order."""
    return {
        f"{name}.{leaf}": module.get_parameter(leaf)
        for name, module in root.named_modules()
        for leaf in getattr(module, "trained_leaves", ())
    }
