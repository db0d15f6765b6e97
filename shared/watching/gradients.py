"""Layers whose gradients vanish or explode: found in a run's rows, and said at its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from shared.callbacks import Metrics
from shared.gradients import Rows, by_layer, norms_of

if TYPE_CHECKING:
    from shared.config import RunConfig

VANISHING = 1e-3  # of the median layer's norm
EXPLODING = 1e2  # times the median layer's norm, or a layer's own norm before
FEWEST = 3  # rows with norms before anything is said


def find_trouble(rows: Rows) -> list[str]:
    """Return in words which layers vanish or explode, with the thresholds; empty where none does.

    A layer is judged by the median over the last half of the rows with norms, against the median layer.
    """
    found = [(step, by_layer(norms)) for step, norms in norms_of(rows)]
    if len(found) < FEWEST:
        return []
    before, late = found[: len(found) // 2], found[len(found) // 2 :]
    now = {place: median(norms.get(place, 0.0) for _, norms in late) for place in late[-1][1]}
    early = {place: median(norms.get(place, 0.0) for _, norms in before) for place in now}
    usual = median(now.values())
    steps = f"updates {late[0][0]:,} to {late[-1][0]:,}"
    small = [place for place, norm in now.items() if norm < VANISHING * usual or norm == 0]
    large = [place for place, norm in now.items() if len(now) > 1 and norm > EXPLODING * usual > 0]
    grown = [place for place, norm in now.items() if place not in large and norm > EXPLODING * early[place] > 0]
    judged = (
        (small, f"gradients vanish: norm below {VANISHING:g} of the median layer's ({usual:.3g})"),
        (large, f"gradients explode: norm above {EXPLODING:g} times the median layer's ({usual:.3g})"),
        (grown, f"gradients explode: norm above {EXPLODING:g} times what it was before"),
    )
    return [f"{what}, {steps}, in {listed(places)}" for places, what in judged if places]


def listed(places: Sequence[str]) -> str:
    """Return places as text, the first few of many.

    >>> listed(["layers.0", "layers.1"]), listed([f"layers.{n}" for n in range(9)])
    ('layers.0, layers.1', 'layers.0, layers.1, layers.2, layers.3 and 5 more')
    """
    return ", ".join(places[:4]) + (f" and {len(places) - 4} more" if len(places) > 4 else "")


class GradientCheck:
    """A callback that says at the end of a run which layers vanish or explode, by all of its metrics.jsonl."""

    def __init__(self, folder: Path, note: Callable[[str], None]) -> None:
        self.folder, self.note = folder, note

    def on_end(self, facts: Mapping[str, Any]) -> None:
        """Say what was found."""
        for text in find_trouble(Metrics(self.folder / "metrics.jsonl").read()):
            self.note(text)


def gradient_checks(config: RunConfig, folder: Path, note: Callable[[str], None]) -> list[Any]:
    """Return the callback that a config asks for, or none."""
    return [GradientCheck(folder, note)] if config.log.gradients else []
