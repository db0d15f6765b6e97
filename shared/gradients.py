"""Gradient norms module by module: whose norm a tensor's is part of, and which layers vanish or explode."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from shared.adapters.spec import layer_of
from shared.callbacks import Metrics

if TYPE_CHECKING:
    from shared.config import RunConfig

KEY = "grad_norms"  # in a row of metrics.jsonl: {"layers.0.q_proj": norm, ...}
DIGITS = 6  # significant ones in metrics.jsonl
VANISHING = 1e-3  # of the median layer's norm
EXPLODING = 1e2  # times the median layer's norm, or a layer's own norm before
FEWEST = 3  # rows with norms before anything is said
Rows = Sequence[Mapping[str, Any]]


def module_of(name: str) -> str:
    """Return the module that a trained tensor belongs to: its layer, and the last part of its path.

    >>> module_of("model.layers.3.self_attn.q_proj.lora_A"), module_of("lm_head.weight")
    ('layers.3.q_proj', 'lm_head')
    """
    name = name.replace(".modules_to_save.", ".").replace(".own_adapter.", ".")
    layer, module = layer_of(name), name.split(".")[-2] if "." in name else name
    return module if layer is None else f"layers.{layer}.{module}"


def by_module(names: Sequence[str], norms: Sequence[float]) -> dict[str, float]:
    """Return the norm of every module's gradient from those of its tensors: LoRA's A and B are one.

    >>> by_module(["layers.0.q_proj.lora_A", "layers.0.q_proj.lora_B"], [3.0, 4.0])
    {'layers.0.q_proj': 5.0}
    """
    squares: dict[str, float] = {}
    for name, norm in zip(names, norms, strict=True):
        module = module_of(name)
        squares[module] = squares.get(module, 0.0) + norm * norm
    return {module: math.sqrt(square) for module, square in squares.items()}


def by_layer(norms: Mapping[str, float]) -> dict[str, float]:
    """Return the norm of every layer's gradient, and those of modules outside the layers.

    >>> by_layer({"layers.0.q_proj": 3.0, "layers.0.v_proj": 4.0, "lm_head": 1.0})
    {'layers.0': 5.0, 'lm_head': 1.0}
    """
    squares: dict[str, float] = {}
    for module, norm in norms.items():
        place = module.rpartition(".")[0] or module
        squares[place] = squares.get(place, 0.0) + norm * norm
    return {place: math.sqrt(square) for place, square in squares.items()}


def rounded(norms: Mapping[str, float]) -> dict[str, float]:
    """Return the finite norms with the digits that metrics.jsonl keeps."""
    return {name: float(f"{norm:.{DIGITS}g}") for name, norm in norms.items() if math.isfinite(norm)}


def norms_of(rows: Rows) -> list[tuple[int, dict[str, float]]]:
    """Return (step, norms by module) of the rows that have them."""
    return [
        (row["step"], {str(name): float(x) for name, x in row[KEY].items() if isinstance(x, int | float)})
        for row in rows
        if isinstance(row.get(KEY), dict)
    ]


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
