"""The curves of every set of rows that a run is evaluated on: a chart per metric, a line per set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shared.config import METRICS
from shared.watching.charts import COLOURS, Curve, chart, curve
from shared.watching.words import escape

TITLES = {"loss": "Loss by set", "exact_match": "Exact match", "token_f1": "Token F1", "rouge_l": "ROUGE-L"}


def set_charts(rows: Sequence[Mapping[str, Any]], *, last_step: int) -> list[str]:
    """Return the charts of what was evaluated beside the validation loss, which stands with the training loss."""
    keys = dict.fromkeys(key for row in rows for key in row if key.startswith("eval_"))
    charts = []
    for metric in METRICS:
        names = [name for key in keys if (name := set_of(key, metric)) is not None]
        lines = [line(rows, name, metric, number) for number, name in enumerate(names)]
        if any(names) or (lines and metric != "loss"):
            unit = "nats per supervised token" if metric == "loss" else "0 to 1"
            charts.append(chart(TITLES[metric], unit, *lines, last_step=last_step, from_zero=metric != "loss"))
    return charts


def set_of(key: str, metric: str) -> str | None:
    """Return the name of the set whose metric a key holds, "" for the validation rows; None for another metric's.

    >>> set_of("eval_sql_loss", "loss"), set_of("eval_loss", "loss"), set_of("eval_loss", "rouge_l")
    ('sql', '', None)
    """
    name = f"{key.removeprefix('eval')}_".removesuffix(f"_{metric}_")
    return name.removeprefix("_") if key.endswith(f"_{metric}") else None


def line(rows: Sequence[Mapping[str, Any]], name: str, metric: str, number: int) -> Curve:
    """Return one set's curve, in a colour of its own as long as there is one."""
    key = f"eval_{name}_{metric}" if name else f"eval_{metric}"
    return curve(rows, key, escape(name or "validation"), style=f"s{number % COLOURS}")
