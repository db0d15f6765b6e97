"""Optimizers on one flat float32 vector: a handful of operations per update, whatever the number of tensors.

The formulae are those of shared/optimizers.py; here are clipping, the skip, how moments are kept, and torch's own fused
kernels where it has one of the same meaning.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from shared.gradients import by_module
from shared.optimizers import FIRST_SCALE, Group, make_groups, next_scale
from shared.quant.blockwise import BLOCK
from shared.types import Method, MomentFormat, StepStats, Update
from torch_backend.blockwise import decode, encode

Tensors = dict[str, torch.Tensor]
PIECE = 2**12 * BLOCK  # values that are updated at a time where there is no kernel: 4 MiB for each moment


@dataclass(frozen=True)
class Scales:
    """0-dimensional float32 tensors on the device, made before anything is replaced."""

    divisor: torch.Tensor  # of the summed gradient: total weight / clipping factor
    skip: torch.Tensor  # 1 where nothing may change, else 0
    step: torch.Tensor  # of the bias correction; infinity for none


@dataclass(frozen=True)
class PendingStats:
    """The numbers of an update, still on the device."""

    loss: torch.Tensor
    grad_norm: torch.Tensor
    applied: torch.Tensor
    overflowed: torch.Tensor
    norms: torch.Tensor | None  # of each of `names`
    names: tuple[str, ...]

    def result(self) -> StepStats:
        """Return the numbers; waits for the device."""
        return StepStats(
            loss=float(self.loss),
            grad_norm=float(self.grad_norm),
            skipped=not bool(self.applied),
            overflowed=bool(self.overflowed),
            norms={} if self.norms is None else by_module(self.names, self.norms.tolist()),
        )


class Optimizer:
    """What is kept, and the float32 values, of all trained tensors, laid end to end, group by group.

    float32 parameters become views of the flat vector; others are copied from it after each update.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, method: Method) -> None:
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        self.groups = make_groups(shapes, method, limit=math.inf)
        self.parameters = {name: parameters[name] for group in self.groups for name in group.shapes}
        self.sizes = [span.stop - span.start for group in self.groups for span in group.spans.values()]
        device, total = next(iter(self.parameters.values())).device, sum(self.sizes)
        self.value, self.grad = (torch.zeros(total, device=device) for _ in range(2))
        self.moments = [make_moments(group, state=method.state, device=device) for group in self.groups]
        scale = {"value": torch.tensor(FIRST_SCALE, device=device), "since": torch.zeros((), device=device)}
        self.loss_scale = scale if method.scales_loss else {}
        self.in_8bit = method.state == "8bit"
        self.pull()
        for parameter, view in zip(self.parameters.values(), self.views(self.value), strict=True):
            if parameter.dtype == torch.float32:
                parameter.data = view

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Return the pieces of a flat vector in the parameters' shapes."""
        pieces = zip(flat.split(self.sizes), self.parameters.values(), strict=True)
        return [piece[: parameter.numel()].view(parameter.shape) for piece, parameter in pieces]

    def pull(self) -> None:
        """Take the parameters' values into the flat vector."""
        for parameter, view in zip(self.parameters.values(), self.views(self.value), strict=True):
            view.copy_(parameter.detach())

    @property
    def scale(self) -> torch.Tensor | None:
        """Return the number that the mean loss is multiplied by, None for none."""
        return self.loss_scale.get("value")

    def step(self, update: Update, *, loss: torch.Tensor, weight: float | torch.Tensor) -> PendingStats:
        """Divide the summed gradients by `weight`, clip, update.

        The numbers it returns need not be waited for: norms before clipping, and whether the loss scale alone was in
        the way. A non-finite gradient, or a loss that is not below its limit, changes nothing. Where memory runs out
        nothing has changed, but for the gradients.
        """
        norm = self.grad.norm() / weight
        norms = self.norms() / weight if update.by_module else None
        low = loss < update.max_loss * weight  # false for NaN and infinity too
        ok = torch.isfinite(norm) & low
        clip = torch.ones_like(norm)
        if update.max_grad_norm is not None:
            clip = torch.clamp(update.max_grad_norm / (norm + 1e-6), max=1.0)
        step = float(update.step) if update.bias_correction else math.inf
        scales = Scales(divisor=weight / clip, skip=(~ok).float(), step=torch.full_like(norm, step))
        values, grads = (flat.split([group.size for group in self.groups]) for flat in (self.value, self.grad))
        parts = list(zip(self.groups, values, grads, self.moments, strict=True))
        news = [
            None if self.is_fused(group) else step_apart(group, value, grad, held, group.numbers(update), scales)
            for group, value, grad, held in parts
        ]
        for number, (group, value, grad, held) in enumerate(parts):  # from here on no memory is asked for
            if (new := news[number]) is None:
                FUSED[group.name](value, grad, held, group.numbers(update), scales)
            else:
                value.copy_(grad)
                self.moments[number] = new
        self.grad.zero_()
        self.push()
        overflowed = self.adapt_scale(ok, low)
        return PendingStats(loss / weight, norm, ok, overflowed, norms, tuple(self.parameters))

    def norms(self) -> torch.Tensor:
        """Return the norm of every tensor's summed gradient."""
        return torch.stack(list(torch.ops.aten._foreach_norm.Scalar(self.views(self.grad))))

    def adapt_scale(self, ok: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        """Change the loss scale as an update asks for; return whether it was too large."""
        if not self.loss_scale:
            return torch.zeros_like(ok)
        scale, since = self.loss_scale["value"], self.loss_scale["since"]
        overflow = low & ~ok & (scale > 1)
        scale, since = next_scale(scale, since, ok.float(), overflow.float())
        self.loss_scale = {"value": scale, "since": since}
        return overflow

    def is_fused(self, group: Group) -> bool:
        """Return whether one kernel updates a group where it stands."""
        return group.name in FUSED and not self.in_8bit

    def push(self) -> None:
        """Write the values into the parameters that are not views."""
        for parameter, view in zip(self.parameters.values(), self.views(self.value), strict=True):
            if parameter.dtype != torch.float32:
                parameter.data.copy_(view)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield `m.<name>` and the like, and `master.<name>` for parameters below float32; in 8 bits also scales.

        For float16 also `loss_scale.value` and `loss_scale.since`.
        """
        for group, held in zip(self.groups, self.moments, strict=True):
            for prefix, array in held.items():
                if prefix.endswith("absmax"):
                    pieces = {name: array[blocks_of(span)] for name, span in group.spans.items()}
                else:
                    pieces = split(group, array)
                yield from ((f"{prefix}.{name}", piece) for name, piece in pieces.items())
        for (name, parameter), view in zip(self.parameters.items(), self.views(self.value), strict=True):
            if parameter.dtype != torch.float32:
                yield f"master.{name}", view
        yield from ((f"loss_scale.{name}", value) for name, value in self.loss_scale.items())


def split(group: Group, joined: torch.Tensor) -> Tensors:
    """Return the pieces of a vector in the tensors' shapes, or those of a stack."""
    if group.rule.whole:
        return {name: joined[place] for place, name in enumerate(group.shapes)}
    places = zip(group.shapes.items(), group.spans.values(), strict=True)
    return {name: joined[span][: math.prod(shape)].view(shape) for (name, shape), span in places}


def blocks_of(span: slice) -> slice:
    """Return the blocks of a span of values."""
    return slice(span.start // BLOCK, span.stop // BLOCK)


def make_moments(group: Group, *, state: MomentFormat, device: torch.device) -> Tensors:
    """Return zero moments of a group: m and the like, or their codes with m_absmax and the like."""
    zeros = {name: torch.zeros(shape, device=device) for name, shape in group.keeps.items()}
    return zeros if state == "float32" else coded(zeros)


def coded(moments: Tensors) -> Tensors:
    """Return the codes of float32 moments, and their scales."""
    codes = {}
    for name, flat in moments.items():
        codes[name], codes[f"{name}_absmax"] = encode(flat, signed=name == "m")
    return codes


def unpack(held: Tensors) -> Tensors:
    """Return a group's moments in float32."""
    return {
        name: decode(array, held[f"{name}_absmax"], signed=name == "m") if f"{name}_absmax" in held else array
        for name, array in held.items()
        if not name.endswith("absmax")
    }


def step_apart(
    group: Group, value: torch.Tensor, grad: torch.Tensor, held: Tensors, numbers: Update, scales: Scales
) -> Tensors:
    """Update piece by piece: next values wait in the gradient, what is kept next, which is returned, beside the old."""
    news = {name: torch.empty_like(array) for name, array in held.items()}
    for span in pieces_of(group):
        places = {name: blocks_of(span) if name.endswith("absmax") else span for name in held}
        olds = {name: array if group.rule.whole else array[places[name]] for name, array in held.items()}
        old, slope = (stacked(group, flat[span]) for flat in (value, grad))
        new, kept = next_values(group, old, slope, unpack(olds), numbers, scales)
        slope.copy_(new)
        for name, array in (kept if kept.keys() == held.keys() else coded(kept)).items():
            place = ... if group.rule.whole else places[name]
            news[name][place] = torch.where(scales.skip > 0, olds[name], array)
    return news


def pieces_of(group: Group) -> Iterator[slice]:
    """Yield the spans of a group that are updated at a time: whole tensors together, others by PIECE."""
    length = group.size if group.rule.whole else PIECE
    for start in range(0, group.size, length):
        yield slice(start, min(start + length, group.size))


def stacked(group: Group, flat: torch.Tensor) -> torch.Tensor:
    """Return a view of the flat vector as its rule sees it."""
    if not group.rule.whole:
        return flat
    return flat.view(len(group.shapes), -1)[:, : math.prod(group.stack[1:])].view(group.stack)


def next_values(
    group: Group, value: torch.Tensor, grad: torch.Tensor, kept: Tensors, numbers: Update, scales: Scales
) -> tuple[torch.Tensor, Tensors]:
    """Return the next values and what is kept next, by torch's kernel where there is one; values stay where skipped."""
    if group.name in FUSED:
        value = value.clone()
        FUSED[group.name](value, grad, kept, numbers, scales)
        return value, kept
    new, kept = group.rule.step(value, grad / scales.divisor, kept, numbers)
    return torch.where(scales.skip > 0, value, new), kept


def fused_adamw(p: torch.Tensor, g: torch.Tensor, kept: Tensors, n: Update, scales: Scales) -> None:
    """Update values and moments in place, in one pass without further memory: torch.optim.AdamW's fused kernel."""
    fused_adam(p, g, kept, n, scales, kernel=torch.ops.aten._fused_adamw_.default)


def fused_adam(p: torch.Tensor, g: torch.Tensor, kept: Tensors, n: Update, scales: Scales, *, kernel=None) -> None:
    """Do the same by torch.optim.Adam's."""
    (kernel or torch.ops.aten._fused_adam_.default)(
        [p], [g], [kept["m"]], [kept["v"]], [], [scales.step], amsgrad=False, maximize=False,
        grad_scale=scales.divisor, found_inf=scales.skip,
        lr=n.lr, beta1=n.beta1, beta2=n.beta2, eps=n.eps, weight_decay=n.weight_decay,
    )  # fmt: skip


def fused_sgd(p: torch.Tensor, g: torch.Tensor, kept: Tensors, n: Update, scales: Scales) -> None:
    """Do the same by torch.optim.SGD's."""
    torch.ops.aten._fused_sgd_.default(
        [p], [g], list(kept.values()), weight_decay=n.weight_decay, momentum=n.momentum if kept else 0.0, lr=n.lr,
        dampening=0.0, nesterov=n.nesterov, maximize=False, is_first_step=False,
        grad_scale=scales.divisor, found_inf=scales.skip,
    )  # fmt: skip


FUSED = {"adamw": fused_adamw, "adam": fused_adam, "sgd": fused_sgd, "plain_sgd": fused_sgd}
