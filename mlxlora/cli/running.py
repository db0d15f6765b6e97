"""`mlxlora runs`: what run folders there are, what one did, and two side by side."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from mlxlora.cli.options import BackendName, Debug, Json, check_backend
from mlxlora.cli.output import check_page, emit, emit_object, print_table, say

runs = typer.Typer(name="runs", help="Runs that were made: list, look, compare.", no_args_is_help=True)

RunFolder = Annotated[Path, typer.Argument(help="Run folder, or the name of one in runs/: what `ls` prints.")]
Html = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write it as a page, too.")]


@runs.command()
def ls(
    folder: Annotated[Path, typer.Argument(help="Folder that holds run folders.")] = Path("runs"),
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """The runs in a folder: state, updates, last losses; the newest last."""
    from dataclasses import asdict

    from shared.jobs.runs import list_runs, number_text

    found = list_runs(folder) if folder != Path("runs") or folder.exists() else []  # nothing was trained here yet
    if as_json:
        emit_object({"runs": [asdict(run) for run in found]})
        return
    rows = [("run", "state", "updates", "loss", "valid", "backend", "started", "model")]
    for run in found:
        losses = (number_text(run.loss), number_text(run.eval_loss))
        started = run.created[:16].replace("T", " ")
        name = run.name if folder in (Path("runs"), Path()) else str(run.path)  # one that `show` takes
        rows.append((name, run.state, f"{run.step}/{run.updates or '?'}", *losses, run.backend, started, run.model))
    print_table(rows if found else [(f"no runs in {folder}",)])


@runs.command()
def show(folder: RunFolder, html: Html = None, as_json: Json = False, debug: Debug = False) -> None:
    """One run: how far it came, its numbers, its curves, its settings."""
    from shared.jobs.runs import describe, number_text

    check_page(html)
    found = describe(folder, html=html)
    if as_json:
        emit(found)
        return
    facts = found.facts
    if facts.state == "damaged":
        say(f"{facts.path / 'manifest.json'} is damaged, so updates, backend and command are not known")
    place = ", ".join(filter(None, (facts.backend, facts.model)))
    print(f"{facts.name}: {facts.state}, update {facts.step} of {facts.updates or '?'}, {place}".rstrip(", "))
    print_table([(name, number_text(value)) for name, value in found.final.items() if value is not None])
    for name, curve in found.curves.items():
        print(f"{name:<5} {curve}")
    print_table([(name, str(value)) for name, value in found.settings.items()])
    print(f"checkpoints: {', '.join(found.checkpoints) or 'none'}")
    print(f"command: {shlex.join(found.command) or 'not known'}")


@runs.command()
def compare(
    a: RunFolder,
    b: RunFolder,
    data: Annotated[
        str | None, typer.Option("--data", metavar="PATH", help="Rows to evaluate both on, and test the difference.")
    ] = None,
    html: Html = None,
    backend: BackendName = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Two runs side by side; with --data a paired bootstrap says whether one is better."""
    from shared.jobs.runs import compare as run
    from shared.jobs.runs import number_text, paired_line

    check_backend(backend)
    options = {"backend": backend, "note": say} if data is not None else {}
    check_page(html)
    found = run(a, b, data=data, html=html, **options)
    if as_json:
        emit(found, **({"verdict": found.paired.verdict} if found.paired else {}))
        return
    pairs = {**found.final, **found.settings}
    rows = [(name, number_text(x), number_text(y)) for name, (x, y) in pairs.items() if (x, y) != (None, None)]
    print_table([("", found.a.name, found.b.name), *rows])
    for name, curves in found.curves.items():
        for side, curve in zip("ab", curves, strict=True):
            print(f"{name + ' ' + side:<7} {curve}".rstrip())
    if found.paired:
        print(paired_line(found.paired))
