"""`mlxlora quantize`: a model in fewer bits, as the tool that owns the format loads it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlxlora.cli.options import Debug, Json, ModelPath
from mlxlora.cli.output import emit
from mlxlora.cli.planning import size

if TYPE_CHECKING:
    from shared.convert.quantize import Layer, QuantizeResult

SchemeName = Annotated[
    str, typer.Option("--scheme", metavar="SCHEME", help="affine-4bit-g64, nf4, mxfp4, ternary-g64.")
]
Output = Annotated[Path | None, typer.Option("--output", metavar="DIR", help="The new model folder.")]
Override = Annotated[
    list[str] | None,
    typer.Option("--override", metavar="PATTERN=SCHEME", help="Another scheme (or none) for modules of this name."),
]
Keep = Annotated[list[str] | None, typer.Option("--keep", metavar="PATTERN", help="Modules of this name stay floats.")]


def quantize(
    model: ModelPath,
    scheme: SchemeName,
    output: Output = None,
    override: Override = None,
    keep: Keep = None,
    plan: Annotated[bool, typer.Option("--plan", help="Show bits and error of every layer; write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a model folder at --output.")] = False,
    base3: Annotated[
        bool, typer.Option("--base3", help="Ternary weights in 1.6 bits on disk, read here only.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """A float model in fewer bits, in a new folder that mlx-lm, transformers or optimum-quanto loads."""
    import mlxlora
    from shared.errors import ConfigError

    if output is None and not plan:
        raise ConfigError("--output is missing", fix="--output DIR to write the model, or --plan to see what it costs")
    heading = [f"{'module':<44}{'shape':>16}  {'scheme':<22}{'bits':>6}{'error':>9}"]
    tell = (lambda layer: show(layer, heading)) if plan and not as_json else (lambda layer: None)
    result = mlxlora.quantize(
        model, scheme=scheme, output=None if plan else output, overrides=override or [], keep=keep or [],
        force=force, base3=base3, tell=tell,
    )  # fmt: skip
    if as_json:
        emit(result)
    else:
        print("\n".join(lines(result)))


def show(layer: Layer, heading: list[str]) -> None:
    """Print one module of a plan, the first below the heading."""
    while heading:
        print(heading.pop())
    shape = " x ".join(map(str, layer.shape))
    error = "" if layer.error is None else f"{layer.error:.2%}"
    why = f"  ({layer.why})" if layer.why else ""
    print(f"{layer.module:<44}{shape:>16}  {layer.scheme:<22}{layer.bits_per_weight:>6.2f}{error:>9}{why}")


def lines(result: QuantizeResult) -> list[str]:
    """Return the summary."""
    packed = sum(layer.scheme != "none" for layer in result.layers)
    found = [
        f"{packed} of {len(result.layers)} matrices in {result.scheme}: {result.bits_per_weight:.2f} bits per weight, "
        f"{size(result.source_bytes)} became {size(result.num_bytes)}"
    ]
    if result.output is not None:
        found.append(f"wrote {result.output} in the format of {result.loads_with}, which both backends here read too")
    return found
