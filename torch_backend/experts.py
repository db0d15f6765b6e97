"""Quantized stacks of experts: packed bytes stay as they are, each expert is decoded for one product.

Legend: N rows of activations, E experts, K of them per row, I width of an expert, D model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from shared.convert.experts import pack_experts
from shared.experts import num_experts
from shared.folder import ModelFolder
from shared.protocols import Quantizer
from shared.types import Packed, Stored
from torch_backend.decoders import find_decoder
from torch_backend.quantized import QuantizedLinear


class ExpertStack(QuantizedLinear):
    """E frozen matrices over packed arrays, one below the other."""

    def __init__(self, packed: Packed, number: int) -> None:
        super().__init__(packed, None)
        self.height = packed.shape[0] // number

    def expert(self, number: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight of one expert in `dtype`, made anew."""
        rows = slice(number * self.height, (number + 1) * self.height)
        arrays = {key: getattr(self, key)[rows] for key in self.keys}
        stored = Stored(self.stored.scheme, (self.height, self.stored.shape[1]), self.stored.dtype)
        return find_decoder(stored.scheme)(arrays, stored).to(dtype)


class _ExpertMatmul(torch.autograd.Function):
    """x @ W.T with an expert's W decoded once per direction and never kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, stack: ExpertStack, number: int) -> torch.Tensor:
        ctx.stack, ctx.number, ctx.dtype = stack, number, x.dtype
        return x @ stack.expert(number, x.dtype).T

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grads[0] @ ctx.stack.expert(ctx.number, ctx.dtype), None, None


class QuantizedExperts(nn.Module):
    """The experts of a layer, called as transformers calls its own."""

    def __init__(self, stacks: Mapping[str, Packed], *, number: int, activation: nn.Module) -> None:
        super().__init__()
        self.number, self.act_fn = number, activation
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(self, name, ExpertStack(stacks[name], number))

    def forward(self, x_ND: torch.Tensor, chosen_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
        """Return (N, D): the weighted sum of the chosen experts' outputs."""
        total_ND = torch.zeros_like(x_ND)
        for number in chosen_NK.unique().tolist():
            rows, places = torch.where(chosen_NK == number)
            x = x_ND[rows]
            gate, up = (_ExpertMatmul.apply(x, stack, number) for stack in (self.gate_proj, self.up_proj))
            y = _ExpertMatmul.apply(self.act_fn(gate) * up, self.down_proj, number)
            total_ND = total_ND.index_add(0, rows, (y * weights_NK[rows, places, None]).to(total_ND.dtype))
        return total_ND


def quantize_experts(zoo: nn.Module, folder: ModelFolder, quantizer: Quantizer) -> list[str]:
    """Quantize the experts of every layer from the stored tensors; return the names of those left out."""
    left: list[str] = []
    for name, module in list(zoo.named_modules()):
        if not (name.endswith(".experts") and hasattr(module, "gate_up_proj")):
            continue
        stacks = pack_experts(folder, quantizer, ".".join(name.split(".")[:3]))
        if stacks is None:
            left.append(name)
            continue
        owner: Any = zoo.get_submodule(name.rpartition(".")[0])
        owner.experts = QuantizedExperts(stacks, number=num_experts(folder.config), activation=owner.experts.act_fn)
    return left
