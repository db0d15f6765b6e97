"""Commands that measure: arguments in, one call of the Python API, results out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlxlora.cli.options import Debug, Json
from mlxlora.cli.output import emit, say


def bench(
    size: Annotated[
        str,
        typer.Option(
            "--size", metavar="auto|tiny|small|medium|large|huge", help="The model; auto: done in under a minute."
        ),
    ] = "auto",
    backend: Annotated[
        str, typer.Option("--backend", metavar="auto|mlx|torch|both", help="Where to compute.")
    ] = "auto",
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="auto|float32|bfloat16", help="auto: bfloat16 on a GPU, else float32.")
    ] = "auto",
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE.md", help="Append the rows to this Markdown file.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """How fast this machine fine-tunes, and how near that is to what it can do."""
    import mlxlora
    from shared.measuring.bench import report

    result = mlxlora.bench(size=size, backend=backend, dtype=dtype, output=output, note=say)
    if as_json:
        emit(result, table=result.table)
    else:
        print(report(result))
