"""Gradient norms module by module: whose norm a tensor's is part of, and what metrics.jsonl has of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from shared.adapters.spec import layer_of

KEY = "grad_norms"  # in a row of metrics.jsonl: {"layers.0.q_proj": norm, ...}
DIGITS = 6  # significant ones in metrics.jsonl
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
