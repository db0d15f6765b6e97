"""Stacks of experts, quantized and adapted.

Quantized: packed bytes stay as they are, each expert is decoded for one product. Adapted: a low-rank product beside
each expert, with gradients written by hand.
Legend: N rows of activations, E experts, K of them per row, M = N K, T of one expert, I width of an expert (or of what
is read), O of the output, D model, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from shared.convert.experts import pack_experts
from shared.errors import CapabilityError
from shared.experts import STACKED, num_experts
from shared.folder import ModelFolder
from shared.protocols import Quantizer
from shared.types import AdapterSpec, Packed, Stored
from torch_backend.decoders import find_decoder
from torch_backend.gated import gated, gated_gradients, is_gated
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
        for name in STACKED:
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


class LoRAExperts(nn.Module):
    """The frozen experts of a layer with trainable low-rank products beside them, called as transformers calls its own.

    A (E, R, I) and B (E, O, R) of each of `STACKED`, float32; R is 0 where nothing is adapted.
    """

    def __init__(self, base: Any, *, block: str, spec: AdapterSpec, shapes: Mapping[str, tuple[int, int, int]]) -> None:
        super().__init__()
        check_unit(base, block)
        self.base, self.number = base, shapes[f"{block}.gate_proj"][0]
        for leaf in STACKED:
            self.add_module(leaf, ExpertsPair(base, leaf, name=f"{block}.{leaf}", spec=spec, shapes=shapes))

    @torch.compiler.disable  # how many rows an expert gets is known when it runs: each count would be compiled anew
    def forward(self, x_ND: torch.Tensor, chosen_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
        """Return (N, D): the weighted sum of the chosen experts' outputs."""
        route = find_route(chosen_NK, self.number)
        gate_MI, up_MI = low_rank_experts(x_ND, None, [self.gate_proj, self.up_proj], route)
        (y_MD,) = low_rank_experts(gate_MI, up_MI, [self.down_proj], route)
        y_NKD = torch.zeros_like(y_MD).index_copy(0, route.order_M, y_MD).view(*chosen_NK.shape, -1)
        return (y_NKD * weights_NK[..., None]).sum(dim=1).to(x_ND.dtype)


class ExpertsPair(nn.Module):
    """What is trained of one of the experts' projections, and where its frozen weights are."""

    def __init__(
        self, base: Any, leaf: str, *, name: str, spec: AdapterSpec, shapes: Mapping[str, tuple[int, int, int]]
    ) -> None:
        super().__init__()
        self.frozen, self.leaf, self.scale = (base,), leaf, spec.scale_of(name)  # a tuple: no module of this one
        (number, self.out, width), rank = shapes[name], spec.rank_of(name) if name in spec.modules else 0
        self.trained_leaves = ("lora_A", "lora_B") if rank else ()
        device = next(iter([*base.parameters(), *base.buffers()])).device
        A, B = (torch.zeros(size, device=device) for size in ((number, rank, width), (number, self.out, rank)))
        if rank:
            self.lora_A, self.lora_B = nn.Parameter(A), nn.Parameter(B)
        else:
            self.lora_A, self.lora_B = nn.Buffer(A, persistent=False), nn.Buffer(B, persistent=False)

    def expert(self, number: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the frozen weight (O, I) of one expert, decoded where it is quantized."""
        (base,) = self.frozen
        if isinstance(base, QuantizedExperts):
            return getattr(base, self.leaf).expert(number, dtype)
        if self.leaf == "down_proj":
            return base.down_proj[number]
        return (
            base.gate_up_proj[number, : self.out] if self.leaf == "gate_proj" else base.gate_up_proj[number, self.out :]
        )


def check_unit(base: Any, block: str) -> None:
    """Raise CapabilityError for experts with another unit than silu(gate) * up, which mlx-lm's all have."""
    if not is_gated(base):
        raise CapabilityError(
            f'adapters of experts with {type(base.act_fn).__name__} ("{block}") are not known here', expected="silu",
            fix='take "experts" out of adapter.targets',
        )  # fmt: skip


@dataclass(frozen=True)
class Route:
    """Which rows each expert gets, M of them sorted by expert; spans: expert, first row, the one behind the last."""

    order_M: torch.Tensor  # place in (N, K), flat
    rows_M: torch.Tensor  # row of x
    spans: tuple[tuple[int, int, int], ...]


def find_route(chosen_NK: torch.Tensor, number: int) -> Route:
    """Return the rows of every expert."""
    chosen_M = chosen_NK.flatten()
    order_M = chosen_M.argsort(stable=True)
    ends = torch.bincount(chosen_M, minlength=number).cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    spans = tuple((e, start, end) for e, (start, end) in enumerate(zip(starts, ends, strict=True)) if end > start)
    return Route(order_M, order_M // chosen_NK.shape[1], spans)


def low_rank_experts(
    x: torch.Tensor, up: torch.Tensor | None, pairs: Sequence[Any], route: Route
) -> tuple[torch.Tensor, ...]:
    """Return (M, O) of every pair: of rows of x (N, I), or with `up` of silu(x) * up, which are (M, I) already."""
    return _LowRankExperts.apply(
        x, up, pairs, route, *(factor for pair in pairs for factor in (pair.lora_A, pair.lora_B))
    )


class _LowRankExperts(torch.autograd.Function):
    """y = x W_e.T + scale * x A_e.T B_e.T for the rows of every expert e; of the inputs x, or gate and up, are saved.

    With g = dy and u = scale * g B_e: dx = g W_e + u A_e,  dA_e = u.T x,  dB_e = scale * g.T (x A_e.T).
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, up: Any, pairs: Sequence[Any], route: Route, *factors: torch.Tensor) -> Any:
        ctx.pairs, ctx.route = pairs, route
        ctx.save_for_backward(x, up, *factors)
        outputs = tuple(x.new_empty(len(route.rows_M), pair.out) for pair in pairs)
        for number, start, end in route.spans:
            x_TI = rows_of(x, up, route, slice(start, end))
            for pair, y_MO, A, B in zip(pairs, outputs, factors[0::2], factors[1::2], strict=True):
                y_TO = torch.mm(x_TI, pair.expert(number, x.dtype).T, out=y_MO[start:end])
                y_TO.addmm_(x_TI @ A[number].to(x.dtype).T, B[number].to(x.dtype).T, alpha=pair.scale)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (x, up, *factors), pairs, route = ctx.saved_tensors, ctx.pairs, ctx.route
        dx, dup = torch.zeros_like(x), None if up is None else torch.zeros_like(up)
        changes = [torch.zeros_like(factor) for factor in factors]
        for number, start, end in route.spans:
            at = slice(start, end)
            x_TI = rows_of(x, up, route, at)
            dx_TI = torch.zeros_like(x_TI)
            for place, (pair, grad) in enumerate(zip(pairs, grads, strict=True)):
                A, B = (factor[number].to(x.dtype) for factor in factors[2 * place : 2 * place + 2])
                g_TO = grad[at]
                u_TR = (g_TO @ B).mul_(pair.scale)
                changes[2 * place][number] = u_TR.T @ x_TI
                changes[2 * place + 1][number] = (g_TO.T @ (x_TI @ A.T)).mul_(pair.scale)
                dx_TI.addmm_(g_TO, pair.expert(number, x.dtype)).addmm_(u_TR, A)
            if up is None or dup is None:
                dx.index_add_(0, route.rows_M[at], dx_TI)
            else:
                dx[at], dup[at] = gated_gradients(x[at], up[at], dx_TI, functional.silu(x[at]))
        return dx, dup, None, None, *changes


def rows_of(x: torch.Tensor, up: torch.Tensor | None, route: Route, at: slice) -> torch.Tensor:
    """Return the rows (T, I) that one expert reads."""
    return x.index_select(0, route.rows_M[at]) if up is None else gated(x[at], up[at])


def attach_experts(root: nn.Module, spec: AdapterSpec, stacks: Mapping[str, tuple[int, int, int]]) -> None:
    """Put LoRA layers over the experts of every layer that the spec adapts, in place."""
    for block in dict.fromkeys(name.rpartition(".")[0] for name in spec.modules if name in stacks):
        owner: Any = root.get_submodule(block.rpartition(".")[0])
        owner.experts = LoRAExperts(owner.experts, block=block, spec=spec, shapes=stacks)


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
