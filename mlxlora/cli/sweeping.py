"""`mlxlora train --sweep`: the runs of a grid, and the table of how they ended."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxlora.cli.output import print_table, say

if TYPE_CHECKING:
    from shared.callbacks import Callback
    from shared.jobs.sweep import Member, SweepResult


def train_grid(config: Path | None, grid: Path, *, overrides: Sequence[str], values: dict[str, Any]) -> SweepResult:
    """Return how the runs of a grid ended; every one has a display of its own."""
    import mlxlora
    from shared.watching.display import make_display

    displays: list[Any] = []

    def watch() -> list[Callback]:
        displays.append(make_display())
        return displays[-1:]

    try:
        return mlxlora.sweep(config, grid, overrides=overrides, watch=watch, note=say, **values)
    finally:
        for display in displays:
            getattr(display, "close", lambda: None)()


def as_object(result: SweepResult) -> dict[str, Any]:
    """Return a sweep as the object of --json."""
    return {"ok": result.exit_code == 0, "exit_code": result.exit_code, **asdict(result)}


def show(result: SweepResult) -> None:
    """Print the table of a sweep, the best run first, what failed, and where the best adapter is."""
    from shared.jobs.runs import number_text

    keys = list(result.runs[0].settings)
    rows = [("", *keys, result.metric, "updates", "state")]
    for number, run in enumerate(result.runs, 1):
        values = [str(run.settings[key]) for key in keys]
        rows.append((str(number), *values, number_text(run.value), str(run.updates or "-"), state(run)))
    with suppress(BrokenPipeError):
        print_table(rows)
        for run in result.runs:
            if run.error:
                print(f"failed: {run.name}: error {run.code}: {run.error}")
        best = result.runs[0]
        if best.state == "done":
            print(f"best: {result.output / best.name}")


def state(run: Member) -> str:
    """Return how a run ended, in words."""
    if run.state != "done":
        return f"{run.state}, {run.code}" if run.code else run.state
    best = f", the best of update {run.result_update}" if run.result_update != run.updates else ""
    return ("stopped early" if run.stopped_early else "done") + best
