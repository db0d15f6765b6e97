"""`mlxlora fuse`: base and adapter as one model, and what became of the adapter in it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from mlxlora.cli.options import BackendName, Debug, Json, ModelPath, check_backend
from mlxlora.cli.output import emit, say

if TYPE_CHECKING:
    from shared.jobs.fuse import FuseResult

Adapter = Annotated[str, typer.Option("--adapter", metavar="DIR", help="Adapter folder: ours, PEFT's or mlx-lm's.")]
Output = Annotated[str, typer.Option("--output", metavar="DIR", help="The new model folder.")]
Scheme = Annotated[
    str,
    typer.Option(
        "--scheme", metavar="none|same|SCHEME", help="Plain weights; the base's own grid; a format to quantize to."
    ),
]
Dtype = Annotated[
    str,
    typer.Option("--dtype", metavar="auto|float32|float16|bfloat16", help="Of plain weights; auto: as the base."),
]
Rows = Annotated[
    str | None, typer.Option("--data", metavar="PATH", help="Rows to measure on; otherwise built-in ones.")
]


def fuse(
    model: ModelPath,
    adapter: Adapter,
    output: Output,
    scheme: Scheme = "none",
    dtype: Dtype = "auto",
    accept_loss: Annotated[bool, typer.Option("--accept-loss", help="Write it, however little survives.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a model folder at --output.")] = False,
    data: Rows = None,
    backend: BackendName = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Base and adapter as one model; refused where less than 0.9 of the adapter would be left."""
    import mlxlora
    from shared.jobs.fuse import Lost

    check_backend(backend)
    try:
        result = mlxlora.fuse(
            model, adapter=adapter, output=output, scheme=scheme, dtype=dtype, accept_loss=accept_loss, force=force,
            data=data, backend=backend, note=say,
        )  # fmt: skip
    except Lost as error:
        print("\n".join(lines(error.result)), file=sys.stderr if as_json else sys.stdout)
        raise
    if as_json:
        emit(result)
        return
    print("\n".join(lines(result)))
    print(f"wrote {result.output}")


def lines(result: FuseResult) -> list[str]:
    """Return the report: what survived by layer, in all, and on text."""
    if not result.weights:
        return ["the adapter changes nothing: all weights are the base's"]
    found = [f"{'':<28}{'cosine':>8}  share of the change"]
    found += [f"{part.name:<28}{part.cosine:>8.4f}  {part.share:.4f}" for part in result.layers]
    found.append(f"{'all':<28}{result.cosine:>8.4f}  {result.share:.4f}")
    if result.text is not None:
        text = result.text
        found.append(
            f"{'log-probabilities':<28}{text.cosine:>8.4f}  {text.share:.4f}  ({text.tokens} tokens, {text.rows})"
        )
    return found
