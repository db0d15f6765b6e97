"""`mlxlora merge`: several adapters as one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlxlora.cli.options import Debug, Json
from mlxlora.cli.output import emit, say


def merge(
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER[=WEIGHT]...", help="Folders; a weight is 1.")],
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="The new adapter folder.")],
    method: Annotated[
        str, typer.Option("--method", metavar="concat|linear|ties|svd", help="concat: the exact sum, ranks added.")
    ] = "concat",
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="Of svd.")] = None,
    density: Annotated[float | None, typer.Option("--density", help="Share of values that ties keeps.")] = None,
    base: Annotated[
        str | None, typer.Option("--base", metavar="M", help="The model, where no config names it.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a folder at --output.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Several adapters of one base as one, each with its weight."""
    import mlxlora

    result = mlxlora.merge(adapters, output=output, method=method, rank=rank, density=density, base=base, force=force)
    if as_json:
        emit(result)
        return
    for text in result.notes:
        say(text)
    parts = " + ".join(f"{one.weight:g} {one.folder}" for one in result.adapters)
    what = "copied" if result.copied else f"{result.method}, rank {result.rank}"
    print(f"{parts}: {result.modules} modules, {what}\nadapter: {result.output}")
