"""`mlxlora convert`: the same numbers in the files of another library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mlxlora.cli.options import Debug, Json
from mlxlora.cli.output import emit, say

if TYPE_CHECKING:
    from shared.convert.adapters import Converted

Source = Annotated[str, typer.Argument(help="Adapter folder of PEFT, of mlx-lm or ours; or a model: folder or hub id.")]
Kind = Annotated[
    str,
    typer.Option("--to", metavar="peft|mlx|gguf|hf|ollama", help="Adapters: peft, mlx, gguf; models: all but peft."),
]
Output = Annotated[str, typer.Option("--output", metavar="DIR", help="The new folder.")]
Base = Annotated[str | None, typer.Option("--base", metavar="M", help="An adapter's model, to check that it fits.")]
Weights = Annotated[
    str,
    typer.Option("--weights", metavar="auto|f32|f16|bf16|q8_0|q4_0|q4_1", help="Of GGUF; auto: as they are stored."),
]
Dtype = Annotated[
    str, typer.Option("--dtype", metavar="auto|float32|float16|bfloat16", help="Of hf and mlx; auto: as stored.")
]


def convert(
    source: Source,
    to: Kind,
    output: Output,
    base: Base = None,
    weights: Weights = "auto",
    dtype: Dtype = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace a folder at --output.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """An adapter for PEFT, mlx-lm or llama.cpp; a model for transformers, mlx-lm, llama.cpp or Ollama."""
    import mlxlora
    from shared.convert.models import ModelResult

    result = mlxlora.convert(source, to=to, output=output, base=base, force=force, weights=weights, dtype=dtype)
    for note in result.notes:
        say(note)
    if output.lower().endswith(".gguf"):  # llama.cpp's own tools name a file there
        name = "model.gguf" if isinstance(result, ModelResult) else "adapter.gguf"
        say(f"--output names a folder: the file is {result.output}/{name}")
    if as_json:
        emit(result)
    elif isinstance(result, ModelResult):
        print(f"{result.output}: {', '.join(result.files)}")
    else:
        print("\n".join(adapter_lines(result)))


def adapter_lines(result: Converted) -> list[str]:
    """Return what became of an adapter."""
    again = ", the bytes it once came from" if result.restored else ""
    moved = f"{result.source} -> {result.to}: {result.modules} modules, {result.tensors} tensors{again}"
    return [moved, f"adapter: {result.output}"]
