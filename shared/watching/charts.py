"""Curves as pictures: SVG with axes, ticks and names, and no script."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import itemgetter
from statistics import fmean
from typing import Any

import numpy as np

from shared.watching.words import number, short

Point = tuple[float, float]
Rows = Sequence[Mapping[str, Any]]

LIMIT = 1000  # points per curve; 100k of them would make a page of 10 MB
NOISY, MEAN_OF, MEANS = 60, 25, 200  # points from which a mean is drawn, of a 25th of them, at so many places
LEFT, RIGHT, TOP, BOTTOM = 58, 436, 28, 196  # the plot's box in a picture of 460 x 240
COLOURS = 6  # of sets, s0 to s5
GAP, DASH = "\u2003", {"a": "\u2014", "b": "- -", "c": "- -"}


@dataclass(frozen=True)
class Curve:
    """One line of a chart; style: a, b (dashed, a dot at each point), c (dashed), s0 to s5; faint: behind its mean."""

    name: str
    points: tuple[Point, ...]
    style: str = "a"
    faint: bool = False


def points(rows: Rows, key: str, *, scale: float = 1.0) -> tuple[Point, ...]:
    """Return (step, value / scale) of every row with a finite value."""
    pairs = ((row["step"], number(row.get(key))) for row in rows)
    return tuple((float(step), value / scale) for step, value in pairs if value is not None)


def curve(rows: Rows, key: str, name: str, *, style: str = "a", scale: float = 1.0) -> Curve:
    """Return one line of a chart, thinned."""
    return Curve(name, thin(points(rows, key, scale=scale)), style)


def noisy(rows: Rows, key: str, name: str, *, style: str = "a") -> tuple[Curve, ...]:
    """Return a curve that goes up and down: of a long run faint, with its running mean in front."""
    found, raw = points(rows, key), curve(rows, key, name, style=style)
    if len(found) < NOISY:
        return (raw,)
    return replace(raw, faint=True), Curve(name, running_mean(found, window=len(found) // MEAN_OF), style)


def running_mean(found: Sequence[Point], *, window: int, num: int = MEANS) -> tuple[Point, ...]:
    """Return at most `num` points, each the mean of the `window` values around it, fewer at the ends.

    >>> running_mean([(float(n), n * n) for n in range(5)], window=3)
    ((0.0, 0.5), (1.0, 1.6666666666666667), (2.0, 4.666666666666667), (3.0, 9.666666666666666), (4.0, 12.5))
    """
    half, places = window // 2, np.unique(np.linspace(0, len(found) - 1, min(num, len(found))).round().astype(int))
    ys = [y for _, y in found]
    return tuple((found[n][0], fmean(ys[max(n - half, 0) : n + half + 1])) for n in places)


def thin(found: Sequence[Point], *, limit: int = LIMIT) -> tuple[Point, ...]:
    """Return at most `limit` points: the ends, and the lowest and highest of equal buckets between them."""
    if len(found) <= limit:
        return tuple(found)
    inner, num_buckets = found[1:-1], (limit - 2) // 2
    edges = [len(inner) * n // num_buckets for n in range(num_buckets + 1)]
    kept = [found[0]]
    for begin, end in pairwise(edges):
        bucket = inner[begin:end]
        kept += sorted({min(bucket, key=itemgetter(1)), max(bucket, key=itemgetter(1))})
    return (*kept, found[-1])


def ticks(low: float, high: float, *, num: int = 5, smallest: float = 0.0) -> list[float]:
    """Return about `num` round values from at most `low` to at least `high`."""
    size = max(abs(low), abs(high))
    if high - low <= max(1e-4 * size, 1e-300):  # flat: the noise of one value is no scale
        pad = max(0.1 * size, 1e-300) if size else 1.0
        low, high = low - pad if low else 0.0, high + pad
    rough = (high - low) / num
    decade = 10.0 ** math.floor(math.log10(rough))
    step = max(next(m for m in (1, 2, 5, 10) if m * decade >= rough * 0.75) * decade, smallest)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, last + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """Return the values with as many digits as their distance needs: 4.50, 2,000, 2e-4."""
    place = math.floor(math.log10(values[1] - values[0]) + 1e-9)
    if 0.01 <= max(map(abs, values)) < 1e6:
        return [f"{value:,.{max(0, -place)}f}" for value in values]
    return [f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e") for value in values]


def chart(title: str, unit: str, *curves: Curve, last_step: int, from_zero: bool = True) -> str:
    """Return a figure, empty where there is nothing to draw; x is the update, from 0 to the last one."""
    curves = tuple(line for line in curves if line.points)
    if not curves:
        return ""
    ys = [y for line in curves for _, y in line.points]
    y_ticks = ticks(min(0.0, *ys) if from_zero else min(ys), max(ys))
    bottom, top, end = y_ticks[0], y_ticks[-1], max(last_step, 1)

    def at(x: float, y: float) -> tuple[float, float]:
        return LEFT + (RIGHT - LEFT) * x / end, BOTTOM - (BOTTOM - TOP) * (y - bottom) / (top - bottom)

    parts = [f'<text x="0" y="12">{unit}</text>']
    for value, label in zip(y_ticks, tick_labels(y_ticks), strict=True):
        y = at(0, value)[1]
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    x_ticks = [value for value in ticks(0, end, num=4, smallest=1.0) if value <= end]
    for value, label in zip(x_ticks, tick_labels(x_ticks), strict=True):
        x = at(value, bottom)[0]
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{BOTTOM}" y2="{BOTTOM + 4}"/>')
        parts.append(f'<text x="{x:.1f}" y="{BOTTOM + 18}" text-anchor="middle">{label}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}"/>')
    parts.append(f'<text x="{(LEFT + RIGHT) / 2}" y="{BOTTOM + 38}" text-anchor="middle">update</text>')
    for line in curves:
        places = [at(x, y) for x, y in line.points]
        way, dense = "L".join(f"{x:.1f} {y:.1f}" for x, y in places), " dense" if len(places) > 300 else ""
        dense = " faint" if line.faint else dense
        parts.append(f'<path class="curve {line.style}{dense}" d="M{way}"/>')
        if len(places) == 1 or (line.style[0] in "bs" and len(places) <= 60):
            circle = f'<circle class="dot-{line.style}" r="3" cx="{{:.1f}}" cy="{{:.1f}}"><title>{{}}</title></circle>'
            parts += [circle.format(*place, short(y)) for place, (_, y) in zip(places, line.points, strict=True)]
    named = [line for line in curves if not line.faint]
    if named[0].style != "s0":
        parts.append(names_above(named))
    summary = "; ".join(f"{line.name} {short(line.points[0][1])} to {short(line.points[-1][1])}" for line in named)
    picture = f'<svg viewBox="0 0 460 240" role="img" aria-label="{title}, {unit}: {summary}">{"".join(parts)}</svg>'
    below = names_below(named) if named[0].style == "s0" else ""
    return f'<figure class="card"><h3>{title}</h3>{picture}{below}</figure>'


def names_above(named: Sequence[Curve]) -> str:
    """Return the names of two or three curves, in the picture; of one alone the title says enough."""
    names = [f'<tspan class="dot-{line.style}">{DASH[line.style]} {line.name}</tspan>' for line in named]
    return f'<text x="{RIGHT}" y="12" text-anchor="end">{GAP.join(names)}</text>' if len(named) > 1 else ""


def names_below(named: Sequence[Curve]) -> str:
    """Return any number of names, of any length, below the picture."""
    names = [f'<span class="dot-{line.style}">\u25cf {line.name}</span>' for line in named]
    return f'<p class="label legend">{" ".join(names)}</p>'
