"""Optimizers: each one formula for the arrays of NumPy, MLX and torch alike, and what it keeps between updates.

A rule is handed float32 arrays: the value, its gradient (divided and clipped) and what it keeps, and returns the next
value and what it keeps next; it changes nothing in place. Whole tensors of one shape are handed over as one stack
(n, *shape), others laid end to end, so that a rule is called a few times whatever the number of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.adapters.spec import layer_of
from shared.errors import ConfigError
from shared.quant.blockwise import BLOCK, num_blocks
from shared.registry import import_own
from shared.types import Method, Update

if TYPE_CHECKING:
    from shared.config import RunConfig  # pydantic, which a plain script on a GPU server may lack

Array = Any
Shape = tuple[int, ...]
Kept = dict[str, Array]  # by prefix: m, v, ...
STACK = 2**12 * BLOCK  # values of a stack; larger tensors stay alone
ADAFACTOR_DECAY, ADAFACTOR_EPS, ADAFACTOR_CLIP = 0.8, 1e-30, 1.0  # Shazeer and Stern 2018, algorithm 4
NEWTON_SCHULZ, NEWTON_SCHULZ_STEPS, NEWTON_SCHULZ_EPS = (3.4445, -4.7750, 2.0315), 5, 1e-7  # Jordan et al. 2024
MUON_SCALE = 0.2  # root mean square of an AdamW update; Liu et al. 2025, section 2.2

FIRST_SCALE, SCALE_GROWS_AFTER = 2.0**16, 2000  # loss scale of float16, and updates; as torch.amp.GradScaler has them


@dataclass(frozen=True)
class Rule:
    """One optimizer."""

    step: Callable[[Array, Array, Kept, Update], tuple[Array, Kept]]  # value, gradient, kept, numbers
    keeps: Callable[[Shape], Mapping[str, Shape]]  # shape of a tensor -> shapes of what is kept for it
    whole: bool = False  # sees stacks of whole tensors
    coded: bool = False  # what it keeps may be coded in 8 bits: m with a sign, v without


@dataclass(frozen=True)
class Group:
    """Tensors that are updated together: each begins at a multiple of 256, what lies between is zero."""

    rule: Rule
    name: str  # of the rule
    shapes: Mapping[str, Shape]
    decayed: bool  # two or more dimensions
    rate: float  # of the learning rate

    @cached_property
    def spans(self) -> dict[str, slice]:
        """Return where each tensor lies, up to its last whole block."""
        spans, at = {}, 0
        for name, shape in self.shapes.items():
            spans[name] = slice(at, at + num_blocks(math.prod(shape)) * BLOCK)
            at = spans[name].stop
        return spans

    @property
    def size(self) -> int:
        """Return the number of values, with those between the tensors."""
        return max(span.stop for span in self.spans.values())

    @property
    def stack(self) -> Shape:
        """Return (n, *shape) of tensors of one shape."""
        return (len(self.shapes), *next(iter(self.shapes.values())))

    @property
    def keeps(self) -> dict[str, Shape]:
        """Return the shapes of what is kept for all tensors together."""
        kept = self.rule.keeps(self.stack[1:])
        return {
            prefix: (len(self.shapes), *shape) if self.rule.whole else (self.size,) for prefix, shape in kept.items()
        }

    def numbers(self, update: Update) -> Update:
        """Return an update's numbers for these tensors."""
        decay = update.weight_decay if self.decayed else 0.0
        return replace(update, lr=update.lr * self.rate, weight_decay=decay)


def method_of(config: RunConfig) -> Method:
    """Return the optimizer that a config names; raises ConfigError where there is none, or none in 8 bits."""
    chosen = config.optimizer
    name = "plain_sgd" if chosen.name == "sgd" and chosen.momentum == 0 else chosen.name
    coded = find_rule(name).coded
    if chosen.state == "8bit" and not coded:
        raise ConfigError(
            f"optimizer.state: 8bit with optimizer.name: {name}, whose state has no code in 8 bits",
            code="E204",
            fix="optimizer.state: float32, or one of adamw, adam, sgd and lion",
        )
    return Method(name, chosen.state, chosen.lora_plus_ratio, scales_loss=config.train.dtype == "float16")


def rule_name(method: Method, name: str, shape: Shape) -> str:
    """Return the rule of a tensor: Muon is for the matrices inside the decoder layers, the rest has AdamW."""
    if method.name == "muon" and (len(shape) < 2 or layer_of(name) is None):
        return "adamw"
    return method.name


def make_groups(shapes: Mapping[str, Shape], method: Method, *, limit: float) -> list[Group]:
    """Return the tensors in groups, matrices first; those that are laid end to end up to `limit` values each."""
    kinds: dict[tuple[Any, ...], list[str]] = {}
    for name, shape in shapes.items():
        rule = rule_name(method, name, shape)
        rate = method.lora_plus_ratio if name.endswith(("lora_B", "lora_embedding_B")) else 1.0
        kind = (rule, len(shape) >= 2, rate, shape if find_rule(rule).whole else None)
        kinds.setdefault(kind, []).append(name)
    groups: list[Group] = []
    for (rule, decayed, rate, stacked), names in sorted(kinds.items(), key=lambda item: not item[0][1]):
        found, most = find_rule(rule), limit if stacked is None else STACK
        some: dict[str, Shape] = {}
        for name in names:
            if some and sum(map(math.prod, [*some.values(), shapes[name]])) > most:
                groups.append(Group(found, rule, some, decayed, rate))
                some = {}
            some[name] = shapes[name]
        groups.append(Group(found, rule, some, decayed, rate))
    return groups


def num_bytes(shapes: Mapping[str, Shape], method: Method) -> int:
    """Return the bytes of what is kept in float32 between updates."""
    rules = ((find_rule(rule_name(method, name, shape)), shape) for name, shape in shapes.items())
    return sum(4 * math.prod(kept) for rule, shape in rules for kept in rule.keeps(shape).values())


def next_scale(scale: Array, since: Array, ok: Array, overflow: Array) -> tuple[Array, Array]:
    """Return the next loss scale, and the updates since it changed; ok and overflow: this update's, as 0 or 1.

    It is halved by an overflow and doubled after 2000 updates without. Source: Micikevicius et al. 2018, section 3.2.
    """
    since = (since + ok) * (1 - overflow)
    grows = (since >= SCALE_GROWS_AFTER) * 1.0
    return scale * (1 + grows) * (1 - 0.5 * overflow), since * (1 - grows)


def adamw(p: Array, g: Array, kept: Kept, n: Update) -> tuple[Array, Kept]:
    """Step by m / sqrt(v), bias corrected, behind decoupled decay. Source: Loshchilov and Hutter 2019, algorithm 2."""
    return adam(decayed(p, n), g, kept, replace(n, weight_decay=0.0))


def adam(p: Array, g: Array, kept: Kept, n: Update) -> tuple[Array, Kept]:
    """Step by m / sqrt(v), bias corrected, decay in the gradient. Source: Kingma and Ba 2015, algorithm 1."""
    g = with_decay(p, g, n)
    m = n.beta1 * kept["m"] + (1 - n.beta1) * g
    v = n.beta2 * kept["v"] + (1 - n.beta2) * (g * g)
    fix1 = 1 - n.beta1**n.step if n.bias_correction else 1.0
    fix2 = math.sqrt(1 - n.beta2**n.step) if n.bias_correction else 1.0
    return p - n.lr / fix1 * m / (sqrt(v) / fix2 + n.eps), {"m": m, "v": v}


def sgd(p: Array, g: Array, kept: Kept, n: Update) -> tuple[Array, Kept]:
    """Step by the momentum, undamped, or one gradient ahead of it. Source: Sutskever et al. 2013, as torch has it."""
    g = with_decay(p, g, n)
    m = n.momentum * kept["m"] + g
    return p - n.lr * (g + n.momentum * m if n.nesterov else m), {"m": m}


def plain_sgd(p: Array, g: Array, kept: Kept, n: Update) -> tuple[Array, Kept]:
    """Step down the gradient; nothing is kept."""
    return p - n.lr * with_decay(p, g, n), {}


def lion(p: Array, g: Array, kept: Kept, n: Update) -> tuple[Array, Kept]:
    """Step by a sign, behind decoupled decay. Source: Chen et al. 2023, algorithm 2."""
    ahead = n.beta1 * kept["m"] + (1 - n.beta1) * g
    sign = (ahead > 0) * 1.0 - (ahead < 0) * 1.0
    return decayed(p, n) - n.lr * sign, {"m": n.beta2 * kept["m"] + (1 - n.beta2) * g}


def adadelta(p: Array, g: Array, kept: Kept, n: Update) -> tuple[Array, Kept]:
    """Step by sqrt(u / v) of the gradient, beta2 being rho, decay in the gradient. Source: Zeiler 2012, algorithm 1."""
    g = with_decay(p, g, n)
    v = n.beta2 * kept["v"] + (1 - n.beta2) * (g * g)
    step = sqrt(kept["u"] + n.eps) / sqrt(v + n.eps) * g
    return p - n.lr * step, {"v": v, "u": n.beta2 * kept["u"] + (1 - n.beta2) * (step * step)}


def adafactor(p: Array, g: Array, kept: Kept, n: Update) -> tuple[Array, Kept]:
    """Step by the gradient over a second moment of rank 1, its size bounded, behind decoupled decay.

    Rates are the schedule's: no relative steps, no scaling by the parameter. Source: Shazeer and Stern 2018,
    algorithms 4 and 5.
    """
    beta2 = 1 - n.step**-ADAFACTOR_DECAY
    squares = g * g + ADAFACTOR_EPS
    if "v" in kept:
        news = {"v": beta2 * kept["v"] + (1 - beta2) * squares}
        step = g / sqrt(news["v"])
    else:
        r = beta2 * kept["r"] + (1 - beta2) * squares.mean(axis=-1)
        c = beta2 * kept["c"] + (1 - beta2) * squares.mean(axis=-2)
        news = {"r": r, "c": c}
        step = g / sqrt(r / r.mean(axis=-1, keepdims=True))[..., None] / sqrt(c)[..., None, :]
    size = sqrt(mean_square(step)) / ADAFACTOR_CLIP
    return decayed(p, n) - n.lr * step / (1 + (size - 1) * (size > 1)), news


def muon(p: Array, g: Array, kept: Kept, n: Update) -> tuple[Array, Kept]:
    """Step by the momentum of each matrix with its singular values near 1, scaled to the size of an AdamW update.

    Source: Jordan et al. 2024; the scale that lets one rate serve all tensors: Liu et al. 2025, eq. 4.
    """
    m = n.momentum * kept["m"] + (1 - n.momentum) * g
    ahead = n.momentum * m + (1 - n.momentum) * g if n.nesterov else m
    scale = MUON_SCALE * math.sqrt(max(p.shape[-2:]))
    return decayed(p, n) - n.lr * scale * orthogonal(ahead), {"m": m}


def orthogonal(x: Array) -> Array:
    """Return matrices (..., rows, columns) with singular values of about 1, by five quintic Newton-Schulz steps."""
    if x.shape[-2] > x.shape[-1]:
        return orthogonal(x.swapaxes(-1, -2)).swapaxes(-1, -2)
    a, b, c = NEWTON_SCHULZ
    x = x / (sqrt((x * x).sum(axis=-1, keepdims=True).sum(axis=-2, keepdims=True)) + NEWTON_SCHULZ_EPS)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.swapaxes(-1, -2)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x


def decayed(p: Array, n: Update) -> Array:
    """Return the value behind decoupled decay."""
    return p * (1 - n.lr * n.weight_decay) if n.weight_decay else p


def with_decay(p: Array, g: Array, n: Update) -> Array:
    """Return the gradient with that of weight_decay / 2 * |p|**2."""
    return g + n.weight_decay * p if n.weight_decay else g


def sqrt(x: Array) -> Array:
    """Return the square root; NumPy's arrays have no such method."""
    return np.sqrt(x) if isinstance(x, np.ndarray) else x.sqrt()


def mean_square(x: Array) -> Array:
    """Return the mean square of each tensor of a stack, (n, 1, ...)."""
    x = x * x
    for axis in range(1, x.ndim):
        x = x.mean(axis=axis, keepdims=True)
    return x


def like(*prefixes: str) -> Callable[[Shape], dict[str, Shape]]:
    """Return what keeps tensors of the parameter's own shape."""
    return lambda shape: dict.fromkeys(prefixes, shape)


def factors(shape: Shape) -> dict[str, Shape]:
    """Return the means over columns and rows that Adafactor keeps of a matrix, or the squares of a vector."""
    return {"r": shape[:-1], "c": (*shape[:-2], shape[-1])} if len(shape) >= 2 else {"v": shape}


def find_rule(name: str) -> Rule:
    """Return an optimizer by name, or a user's own by "package.module:NAME"; raises ConfigError."""
    return RULES[name] if name in RULES else import_own(name, Rule, key="optimizer.name")


RULES = {
    "adamw": Rule(adamw, like("m", "v"), coded=True),
    "adam": Rule(adam, like("m", "v"), coded=True),
    "sgd": Rule(sgd, like("m"), coded=True),
    "plain_sgd": Rule(plain_sgd, like(), coded=True),
    "lion": Rule(lion, like("m"), coded=True),
    "adadelta": Rule(adadelta, like("v", "u")),
    "adafactor": Rule(adafactor, factors, whole=True),
    "muon": Rule(muon, like("m"), whole=True),
}
