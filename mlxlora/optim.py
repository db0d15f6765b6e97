"""Optimizers on flat float32 vectors, small tensors joined: MLX is lazy, so one update is one graph.

The formulae are those of shared/optimizers.py; here are the sums, clipping, the skip, and how moments are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx

from mlxlora.blockwise import decode, encode
from mlxlora.elementwise import long_sums
from shared.gradients import by_module
from shared.optimizers import FIRST_SCALE, Group, make_groups, next_scale
from shared.quant.blockwise import BLOCK
from shared.types import Method, MomentFormat, StepStats, Update

Arrays = dict[str, mx.array]
GROUP = 2**12 * BLOCK  # values that tensors are joined up to; larger tensors stay alone


@dataclass(frozen=True)
class PendingStats:
    """The numbers of an update, still in the making."""

    loss: mx.array
    grad_norm: mx.array
    applied: mx.array
    overflowed: mx.array
    norms: mx.array | None  # of each of `names`
    names: tuple[str, ...]

    def result(self) -> StepStats:
        """Return the numbers; waits for the device."""
        return StepStats(
            loss=float(self.loss),
            grad_norm=float(self.grad_norm),
            skipped=not bool(self.applied),
            overflowed=bool(self.overflowed),
            norms={} if self.norms is None else by_module(self.names, cast(list[float], self.norms.tolist())),
        )

    def arrays(self) -> list[mx.array]:
        """Return what is to be computed with the update: norms, whose gradients are then freed."""
        return [self.grad_norm] if self.norms is None else [self.grad_norm, self.norms]


class Optimizer:
    """What is kept of all trained tensors, by group, and float32 masters of those below float32."""

    def __init__(self, parameters: Mapping[str, mx.array], *, method: Method) -> None:
        self.dtypes = {name: parameter.dtype for name, parameter in parameters.items()}
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        self.groups = make_groups(shapes, method, limit=GROUP)
        self.moments = [make_moments(group, state=method.state) for group in self.groups]
        self.loss_scale: Arrays = {"value": mx.array(FIRST_SCALE), "since": mx.zeros(())} if method.scales_loss else {}
        self.master: Arrays = {
            name: parameter.astype(mx.float32)
            for name, parameter in parameters.items()
            if parameter.dtype != mx.float32
        }

    @property
    def scale(self) -> mx.array | None:
        """Return the number that the mean loss is multiplied by, None for none."""
        return self.loss_scale.get("value")

    def step(
        self, parameters: Arrays, grads: Arrays, update: Update, *, loss: mx.array, weight: float | mx.array,
        put: Callable[[Arrays], None],
    ) -> PendingStats:  # fmt: skip
        """Divide the summed gradients by `weight`, clip, update; `put` the next parameters, group by group.

        One group's old and new values are in memory together, no more: both dicts are emptied on the way. Returns
        numbers that need not be waited for: norms before clipping, and whether the loss scale alone was in the way. A
        non-finite gradient, or a loss that is not below its limit, leaves parameters and moments as they are.
        """
        joined, names = [join(group, grads) for group in self.groups], tuple(grads)
        norm = mx.sqrt(sum((sum_of_squares(grad) for grad in joined), start=mx.zeros(()))) / weight
        norms = norms_of(grads) / weight if update.by_module else None
        grads.clear()
        low = loss < update.max_loss * weight  # false for NaN and infinity too
        ok = mx.isfinite(norm) & low
        clip = mx.array(1.0)
        if update.max_grad_norm is not None:
            clip = mx.minimum(update.max_grad_norm / (norm + 1e-6), 1.0)
        divisor = weight / clip
        found = PendingStats(loss / weight, norm, ok, self.adapt_scale(ok, low), norms, names)
        mx.async_eval(found.arrays(), divisor)
        for number in range(len(self.groups)):
            values = self.step_group(number, parameters, joined.pop(0), update, divisor=divisor, ok=ok)
            mx.async_eval(self.moments[number], values)
            put(values)
        return found

    def step_group(
        self, number: int, parameters: Arrays, grad: mx.array, update: Update, *, divisor: mx.array, ok: mx.array
    ) -> Arrays:
        """Replace a group's moments and masters, and return its next parameters, all in the making."""
        group, held = self.groups[number], self.moments[number]
        old = join(group, {name: self.master.get(name, parameters.pop(name)) for name in group.shapes})
        go = advance_in_pieces if not group.rule.whole and group.size > GROUP else advance
        value, self.moments[number] = go(group, old, grad, held, group.numbers(update), divisor=divisor, ok=ok)
        values = split(group, value)
        self.master |= {name: value for name, value in values.items() if name in self.master}
        return {name: value.astype(self.dtypes[name]) for name, value in values.items()}

    def adapt_scale(self, ok: mx.array, low: mx.array) -> mx.array:
        """Change the loss scale as an update asks for; return whether it was too large."""
        if not self.loss_scale:
            return mx.array(False)
        scale, since = self.loss_scale["value"], self.loss_scale["since"]
        overflow = low & ~ok & (scale > 1)
        scale, since = next_scale(scale, since, ok.astype(mx.float32), overflow.astype(mx.float32))
        self.loss_scale = {"value": scale, "since": since}
        return overflow

    def arrays(self) -> list[Any]:
        """Return everything that is kept, to be evaluated."""
        return [self.moments, self.master, self.loss_scale]

    def tensors(self) -> Iterator[tuple[str, mx.array]]:
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
        yield from ((f"master.{name}", array) for name, array in self.master.items())
        yield from ((f"loss_scale.{name}", array) for name, array in self.loss_scale.items())

    def put(self, name: str, array: mx.array) -> None:
        """Replace one of `tensors` by its name there."""
        prefix, _, inner = name.partition(".")
        if prefix in ("master", "loss_scale"):
            (self.master if prefix == "master" else self.loss_scale)[inner] = array
            return
        number = next(n for n, group in enumerate(self.groups) if inner in group.shapes)
        group, held = self.groups[number], self.moments[number]
        span = group.spans[inner]
        if group.rule.whole:
            held[prefix][list(group.shapes).index(inner)] = array
        else:
            place = blocks_of(span) if prefix.endswith("absmax") else slice(span.start, span.start + array.size)
            held[prefix][place] = array.reshape(-1)


def join(group: Group, arrays: Mapping[str, mx.array]) -> mx.array:
    """Return the group's tensors as one float32 vector, or as a stack."""
    if group.rule.whole:
        return mx.stack([arrays[name].astype(mx.float32) for name in group.shapes])
    pieces = []
    for name, span in group.spans.items():
        flat = arrays[name].astype(mx.float32).reshape(-1)
        gap = span.stop - span.start - flat.size
        pieces += [flat, mx.zeros(gap)] if gap else [flat]
    return mx.concatenate(pieces) if len(pieces) > 1 else pieces[0]


def split(group: Group, joined: mx.array) -> Arrays:
    """Return the pieces of a vector in the tensors' shapes, or those of a stack."""
    if group.rule.whole:
        return {name: joined[place] for place, name in enumerate(group.shapes)}
    pieces = mx.split(joined, [span.start for span in list(group.spans.values())[1:]])
    pairs = zip(group.shapes.items(), pieces, strict=True)
    return {name: piece[: math.prod(shape)].reshape(shape) for (name, shape), piece in pairs}


def blocks_of(span: slice) -> slice:
    """Return the blocks of a span of values."""
    return slice(span.start // BLOCK, span.stop // BLOCK)


def make_moments(group: Group, *, state: MomentFormat) -> Arrays:
    """Return zero moments of a group: m and the like, or their codes with m_absmax and the like."""
    zeros = {name: mx.zeros(shape) for name, shape in group.keeps.items()}
    return zeros if state == "float32" else coded(zeros)


def coded(moments: Arrays) -> Arrays:
    """Return the codes of float32 moments, and their scales."""
    codes = {}
    for name, flat in moments.items():
        codes[name], codes[f"{name}_absmax"] = encode(flat, signed=name == "m")
    return codes


def unpack(held: Arrays) -> Arrays:
    """Return a group's moments in float32."""
    return {
        name: decode(array, held[f"{name}_absmax"], signed=name == "m") if f"{name}_absmax" in held else array
        for name, array in held.items()
        if not name.endswith("absmax")
    }


def pack(moments: Arrays, held: Arrays, *, ok: mx.array) -> Arrays:
    """Return moments as they were held; those of a skipped update stay."""
    news = moments if moments.keys() == held.keys() else coded(moments)
    return {name: mx.where(ok, new, held[name]) for name, new in news.items()}


def advance(
    group: Group, old: mx.array, grad: mx.array, held: Arrays, numbers: Update, *, divisor: mx.array, ok: mx.array
) -> tuple[mx.array, Arrays]:
    """Return the next values and moments of a group, in the making; those of a skipped update stay."""
    value, kept = group.rule.step(old, grad / divisor, unpack(held), numbers)
    return mx.where(ok, value, old), pack(kept, held, ok=ok)


def advance_in_pieces(
    group: Group, old: mx.array, grad: mx.array, held: Arrays, numbers: Update, *, divisor: mx.array, ok: mx.array
) -> tuple[mx.array, Arrays]:
    """Do the same piece by piece, moments in place: MLX keeps some ten intermediates, here of a piece's size."""
    values = mx.zeros(group.size)
    for start in range(0, group.size, GROUP):
        span = slice(start, min(start + GROUP, group.size))
        places = {name: blocks_of(span) if name.endswith("absmax") else span for name in held}
        olds = {name: array[places[name]] for name, array in held.items()}
        values[span], news = advance(group, old[span], grad[span], olds, numbers, divisor=divisor, ok=ok)
        del olds
        mx.eval(news)  # so that nothing but `held` has the old moments, and they are written over
        for name, array in news.items():
            held[name][places[name]] = array
        mx.eval(values, held)
    return values, held


def sum_of_squares(x: mx.array) -> mx.array:
    """Return the sum of squares."""
    return long_sums(mx.square(x.reshape(-1)))


def norms_of(grads: Mapping[str, mx.array]) -> mx.array:
    """Return the norm of every tensor's summed gradient."""
    return mx.sqrt(mx.stack([sum_of_squares(grad.astype(mx.float32)) for grad in grads.values()]))
