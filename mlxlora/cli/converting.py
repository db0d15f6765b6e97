"""`mlxlora convert`: the same numbers in the files of another library."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlxlora.cli.app import Debug, Json, check_choice, emit, say

Source = Annotated[Path, typer.Argument(help="Adapter folder of PEFT, of mlx-lm, or ours.")]
Kind = Annotated[str, typer.Option("--to", metavar="peft|mlx", help="Whose files to write.")]
Output = Annotated[Path, typer.Option("--output", metavar="DIR", help="The new folder.")]
Base = Annotated[str | None, typer.Option("--base", metavar="M", help="The model, to check that the adapter fits it.")]


def convert(
    source: Source,
    to: Kind,
    output: Output,
    base: Base = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a folder at --output.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """An adapter of PEFT for mlx-lm, and back; there and back again gives the first bytes."""
    import mlxlora

    check_choice("--to", to, ("peft", "mlx"))
    result = mlxlora.convert(source, to=to, output=output, base=base, force=force)
    for note in result.notes:
        say(note)
    if as_json:
        emit(result)
        return
    again = ", the bytes it once came from" if result.restored else ""
    print(f"{result.source} -> {result.to}: {result.modules} modules, {result.tensors} tensors{again}")
    print(f"adapter: {result.output}")
