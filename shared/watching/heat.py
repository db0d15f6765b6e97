"""Heat maps as inline SVG: gradient norms by layer and update, and by module and layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from shared.gradients import by_layer, norms_of
from shared.watching.gradients import EXPLODING, FEWEST, VANISHING, find_trouble
from shared.watching.words import escape, short

COLUMNS = 40  # of updates; each shows the median of those it stands for
LEFT, RIGHT, TOP = 84, 452, 30  # of the cells, in a picture 460 wide
PALEST = 0.06  # opacity of the smallest norm, 1 for the largest
SHADES = 24  # of the legend
Norms = list[tuple[int, dict[str, float]]]


@dataclass(frozen=True)
class Grid:
    """Values by row and column; None: not known. Columns have labels of their own, which tooltips show."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    axis: str  # what the columns are


def gradient_section(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return both heat maps with a verdict, empty where no row has norms by module."""
    found = norms_of(rows)
    if not found:
        return ""
    trouble = "".join(f'<p class="warning">{escape(text[0].upper() + text[1:])}.</p>' for text in find_trouble(rows))
    bounds = f"below {VANISHING:g} of the median layer's norm, or above {EXPLODING:g} times it"
    fine = f"No layer's gradient vanishes or explodes ({bounds}, or of its own norm before)."
    few = f"Too few rows to judge: {FEWEST} are needed."
    verdict = trouble or f'<p class="muted">{fine if len(found) >= FEWEST else few}</p>'
    maps = heat_map("By layer", layers_by_update(found)) + heat_map("By module", modules_by_layer(found))
    return f'<h2>Gradients</h2>{verdict}<div class="grid">{maps}</div>'


def layers_by_update(found: Norms) -> Grid:
    """Return the norm of every layer, the median of neighbouring updates where there are many."""
    steps = [step for step, _ in found]
    layers = [by_layer(norms) for _, norms in found]
    places = tuple(dict.fromkeys(place for norms in layers for place in norms))
    groups = [group for group in np.array_split(np.arange(len(found)), min(COLUMNS, len(found))) if len(group)]
    names = [f"{steps[group[0]]:,}" + (f"-{steps[group[-1]]:,}" if len(group) > 1 else "") for group in groups]
    values = tuple(tuple(middle(layers[n].get(place) for n in group) for group in groups) for place in places)
    return Grid(tuple(place.removeprefix("layers.") for place in places), tuple(names), values, "update")


def modules_by_layer(found: Norms) -> Grid:
    """Return the norm of every module of every layer: the median over the last half of the rows."""
    late = [norms for _, norms in found[len(found) // 2 :]]
    pairs = [name.split(".")[1:] for name in late[-1] if name.startswith("layers.")]
    numbers = tuple(dict.fromkeys(number for number, _ in pairs))
    modules = tuple(dict.fromkeys(module for _, module in pairs))
    values = tuple(
        tuple(middle(norms.get(f"layers.{number}.{module}") for norms in late) for number in numbers)
        for module in modules
    )
    return Grid(modules, numbers, values, "layer")


def middle(values: Iterator[float | None]) -> float | None:
    """Return the median of what is known."""
    known = [value for value in values if value is not None]
    return median(known) if known else None


def heat_map(title: str, grid: Grid) -> str:
    """Return a figure, darker for larger on a logarithmic scale; empty where there is nothing to draw."""
    known = [value for line in grid.values for value in line if value]
    if not known:
        return ""
    low, high = min(known), max(known)
    tall = max(min(190 / len(grid.rows), 22.0), 3.0)
    wide, bottom = (RIGHT - LEFT) / len(grid.columns), TOP + tall * len(grid.rows)
    parts = ['<text x="0" y="12">L2 norm, before clipping</text>', *legend(low, high)]
    for y, name in labelled(grid.rows, step=math.ceil(14 / tall)):
        at = TOP + tall * (y + 0.5) + 4
        parts.append(f'<text x="{LEFT - 6}" y="{at:.1f}" text-anchor="end">{escape(name)}</text>')
    for x, name in labelled(grid.columns, step=math.ceil(len(grid.columns) / 8)):
        at = LEFT + wide * (x + 0.5)
        first = escape(name.split("-")[0])
        parts.append(f'<text x="{at:.1f}" y="{bottom + 16:.1f}" text-anchor="middle">{first}</text>')
    for y, line in enumerate(grid.values):
        for x, value in enumerate(line):
            if value is not None:
                box = f'x="{LEFT + wide * x:.1f}" y="{TOP + tall * y:.1f}" width="{wide:.1f}" height="{tall:.1f}"'
                tip = f"{grid.rows[y]}, {grid.axis} {grid.columns[x]}: {short(value)}"
                shade = f'fill-opacity="{opacity(value, low, high):.2f}"' if value else 'class="zero"'
                parts.append(f"<rect {box} {shade}><title>{escape(tip)}</title></rect>")
    parts.append(f'<text x="{(LEFT + RIGHT) / 2}" y="{bottom + 34:.1f}" text-anchor="middle">{grid.axis}</text>')
    about = f"{title}: {len(grid.rows)} by {len(grid.columns)}, norms from {short(low)} to {short(high)}"
    view = f'<svg class="heat" viewBox="0 0 460 {bottom + 40:.0f}" role="img" aria-label="{escape(about)}">'
    return f'<figure class="card"><h3>{title}</h3>{view}{"".join(parts)}</svg></figure>'


def labelled(names: Sequence[str], *, step: int) -> Iterator[tuple[int, str]]:
    """Yield the place and the name of every step-th, so that labels do not touch."""
    yield from ((n, name) for n, name in enumerate(names) if n % step == 0)


def opacity(value: float, low: float, high: float) -> float:
    """Return how dark a value is.

    >>> opacity(0.1, 0.01, 1.0), opacity(2.0, 2.0, 2.0)
    (0.53, 1.0)
    """
    if high <= low:
        return 1.0
    return round(PALEST + (1 - PALEST) * math.log(value / low) / math.log(high / low), 4)


def legend(low: float, high: float) -> Iterator[str]:
    """Yield a scale of shades between the smallest and the largest norm."""
    left, wide = 300, 96 / SHADES
    yield f'<text x="{left - 6}" y="12" text-anchor="end">{short(low)}</text>'
    for n in range(SHADES):
        shade = PALEST + (1 - PALEST) * n / (SHADES - 1)
        yield f'<rect x="{left + wide * n:.1f}" y="3" width="{wide:.1f}" height="10" fill-opacity="{shade:.2f}"/>'
    yield f'<text x="{left + 102}" y="12">{short(high)}</text>'
