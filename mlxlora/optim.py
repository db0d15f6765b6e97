"""AdamW on flat float32 vectors, small tensors joined: MLX is lazy, so one update is one graph.

Source: Loshchilov and Hutter 2019 (AdamW), algorithm 2, with Adam's bias correction (Kingma and Ba 2015).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx

from mlxlora.blockwise import decode, encode
from shared.quant.blockwise import BLOCK, num_blocks
from shared.types import MomentFormat, Update

Arrays = dict[str, mx.array]
NORM_WIDTH = 512  # values that are summed in one go
GROUP = 2**12 * BLOCK  # values that tensors are joined up to; larger tensors stay alone


@dataclass(frozen=True)
class Scales:
    """Numbers of one update as 0-dimensional arrays; of a skipped one those that change nothing."""

    ok: mx.array
    divisor: mx.array  # of the summed gradient: total weight / clipping factor
    beta1: mx.array
    beta2: mx.array
    new1: mx.array  # 1 - beta1, share of the gradient
    new2: mx.array
    rate: mx.array  # learning rate over the bias correction of the first moment
    decay: mx.array  # share of a matrix that weight decay leaves
    fix2: mx.array  # square root of the second moment's bias correction
    eps: mx.array


@dataclass(frozen=True)
class Group:
    """Tensors laid end to end, matrices or others, each beginning at a multiple of 256; what lies between is zero."""

    shapes: Mapping[str, tuple[int, ...]]
    decayed: bool

    @cached_property
    def spans(self) -> dict[str, slice]:
        """Return where each tensor lies, up to its last whole block."""
        spans, at = {}, 0
        for name, shape in self.shapes.items():
            spans[name] = slice(at, at + num_blocks(math.prod(shape)) * BLOCK)
            at = spans[name].stop
        return spans

    def join(self, arrays: Mapping[str, mx.array]) -> mx.array:
        """Return the group's tensors as one float32 vector."""
        pieces = []
        for name, span in self.spans.items():
            flat = arrays[name].astype(mx.float32).reshape(-1)
            gap = span.stop - span.start - flat.size
            pieces += [flat, mx.zeros(gap)] if gap else [flat]
        return mx.concatenate(pieces) if len(pieces) > 1 else pieces[0]

    def split(self, flat: mx.array) -> Arrays:
        """Return the pieces of a vector in the tensors' shapes."""
        pieces = mx.split(flat, [span.start for span in list(self.spans.values())[1:]])
        pairs = zip(self.shapes.items(), pieces, strict=True)
        return {name: piece[: math.prod(shape)].reshape(shape) for (name, shape), piece in pairs}


class AdamW:
    """Moments of all trained tensors by group, and float32 masters of those below float32."""

    def __init__(self, parameters: Mapping[str, mx.array], *, state: MomentFormat) -> None:
        self.dtypes = {name: parameter.dtype for name, parameter in parameters.items()}
        self.groups = make_groups(parameters)
        self.moments = [make_moments(group, state=state) for group in self.groups]
        self.master: Arrays = {
            name: parameter.astype(mx.float32)
            for name, parameter in parameters.items()
            if parameter.dtype != mx.float32
        }

    def step(
        self, parameters: Arrays, grads: Mapping[str, mx.array], update: Update, *, loss: mx.array, weight: float
    ) -> tuple[Arrays, mx.array, mx.array]:
        """Divide the summed gradients by `weight`, clip, update.

        Returns the next parameters, the norm before clipping, and whether the update was applied: a non-finite loss or
        gradient leaves parameters and moments as they are, without a host synchronisation.
        """
        joined = [group.join(grads) for group in self.groups]
        norm = mx.sqrt(sum((sum_of_squares(grad) for grad in joined), start=mx.zeros(()))) / weight
        ok = mx.isfinite(norm) & mx.isfinite(loss)
        clip = mx.array(1.0)
        if update.max_grad_norm is not None:
            clip = mx.minimum(update.max_grad_norm / (norm + 1e-6), 1.0)
        scales, olds = make_scales(update, ok=ok, divisor=weight / clip), {**parameters, **self.master}
        for number, (group, grad) in enumerate(zip(self.groups, joined, strict=True)):
            held = self.moments[number]
            value, m, v = adamw(group.join(olds), grad, *unpack(held), scales, decay=group.decayed)
            self.moments[number] = pack(m, v, held, ok=ok)
            for name, array in group.split(value).items():
                parameters[name] = array.astype(self.dtypes[name])
                if name in self.master:
                    self.master[name] = array
        return parameters, norm, ok

    def arrays(self) -> list[Any]:
        """Return everything that is kept, to be evaluated."""
        return [self.moments, self.master]

    def tensors(self) -> Iterator[tuple[str, mx.array]]:
        """Yield `m.<name>`, `v.<name>`, and `master.<name>` for parameters below float32; in 8 bits also scales."""
        for group, held in zip(self.groups, self.moments, strict=True):
            for prefix, flat in held.items():
                if prefix.endswith("absmax"):
                    pieces = {name: flat[blocks_of(span)] for name, span in group.spans.items()}
                else:
                    pieces = group.split(flat)
                yield from ((f"{prefix}.{name}", piece) for name, piece in pieces.items())
        yield from ((f"master.{name}", array) for name, array in self.master.items())

    def put(self, name: str, array: mx.array) -> None:
        """Replace one of `tensors` by its name there."""
        prefix, _, inner = name.partition(".")
        if prefix == "master":
            self.master[inner] = array
            return
        number = next(n for n, group in enumerate(self.groups) if inner in group.shapes)
        span, held = self.groups[number].spans[inner], self.moments[number]
        place = blocks_of(span) if prefix.endswith("absmax") else slice(span.start, span.start + array.size)
        held[prefix][place] = array.reshape(-1)


def make_groups(parameters: Mapping[str, mx.array]) -> list[Group]:
    """Return the tensors in groups of at most GROUP values, matrices first."""
    groups: list[Group] = []
    for decayed in (True, False):
        shapes: dict[str, tuple[int, ...]] = {}
        for name, parameter in parameters.items():
            if (parameter.ndim >= 2) != decayed:
                continue
            if shapes and parameter.size + sum(math.prod(shape) for shape in shapes.values()) > GROUP:
                groups.append(Group(shapes, decayed))
                shapes = {}
            shapes[name] = tuple(parameter.shape)
        groups += [Group(shapes, decayed)] if shapes else []
    return groups


def blocks_of(span: slice) -> slice:
    """Return the blocks of a span of values."""
    return slice(span.start // BLOCK, span.stop // BLOCK)


def make_moments(group: Group, *, state: MomentFormat) -> Arrays:
    """Return zero moments of a group: m and v, or their codes with m_absmax and v_absmax."""
    size = max(span.stop for span in group.spans.values())
    if state == "float32":
        return {"m": mx.zeros(size), "v": mx.zeros(size)}
    (m, m_absmax), (v, v_absmax) = encode(mx.zeros(size), signed=True), encode(mx.zeros(size), signed=False)
    return {"m": m, "v": v, "m_absmax": m_absmax, "v_absmax": v_absmax}


def unpack(held: Arrays) -> tuple[mx.array, mx.array]:
    """Return both moments in float32."""
    if "m_absmax" not in held:
        return held["m"], held["v"]
    return decode(held["m"], held["m_absmax"], signed=True), decode(held["v"], held["v_absmax"], signed=False)


def pack(m: mx.array, v: mx.array, held: Arrays, *, ok: mx.array) -> Arrays:
    """Return both moments as they were held; codes of a skipped update stay: coding twice changes them."""
    if "m_absmax" not in held:
        return {"m": m, "v": v}
    (m, m_absmax), (v, v_absmax) = encode(m, signed=True), encode(v, signed=False)
    news = {"m": m, "v": v, "m_absmax": m_absmax, "v_absmax": v_absmax}
    return {name: mx.where(ok, new, held[name]) for name, new in news.items()}


def make_scales(update: Update, *, ok: mx.array, divisor: mx.array) -> Scales:
    """Return the numbers of an update, or those that change nothing."""
    fix1 = 1 - update.beta1**update.step if update.bias_correction else 1.0
    fix2 = math.sqrt(1 - update.beta2**update.step) if update.bias_correction else 1.0
    return Scales(
        ok=ok,
        divisor=divisor,
        beta1=mx.where(ok, update.beta1, 1.0),
        beta2=mx.where(ok, update.beta2, 1.0),
        rate=mx.where(ok, update.lr / fix1, 0.0),
        decay=mx.where(ok, 1 - update.lr * update.weight_decay, 1.0),
        new1=mx.array(1 - update.beta1),
        new2=mx.array(1 - update.beta2),
        fix2=mx.array(fix2),
        eps=mx.array(update.eps),
    )


def sum_of_squares(x: mx.array) -> mx.array:
    """Return the sum of squares, in two stages: MLX's CPU adds one after the other, 4e-5 off at a million values."""
    flat = mx.square(x.reshape(-1))
    whole = flat.size // NORM_WIDTH * NORM_WIDTH
    return flat[:whole].reshape(-1, NORM_WIDTH).sum(axis=1).sum() + flat[whole:].sum()


def adamw(
    p: mx.array, g: mx.array, m: mx.array, v: mx.array, scales: Scales, *, decay: bool
) -> tuple[mx.array, mx.array, mx.array]:
    """Return the next (value, first moment, second moment) of float32 vectors; `g` is the summed gradient."""
    g = mx.where(scales.ok, g / scales.divisor, 0.0)
    m = scales.beta1 * m + scales.new1 * g
    v = scales.beta2 * v + scales.new2 * mx.square(g)
    if decay:
        p = p * scales.decay
    return p - scales.rate * m / (mx.sqrt(v) / scales.fix2 + scales.eps), m, v
