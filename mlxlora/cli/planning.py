"""`mlxlora estimate`: what a config needs before anything is loaded, as text or JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlxlora.cli.options import ConfigFile, Data, Debug, Json, Model, Set, given
from mlxlora.cli.output import emit, emit_object, say

if TYPE_CHECKING:
    from shared.config import RunConfig
    from shared.estimate.report import BackendReport, Line, Report
    from shared.jobs.search import Tried

GIB = 2**30
HEADINGS = "  {:<16}{:>10}{:>10}  {:<10}{:<14}{:<10}{:<13}change".format(
    "", "usable", "needs", "recompute", "micro_tokens", "at most", "longest row"
)
Memory = Annotated[
    str | None, typer.Option("--memory", metavar="SIZE", help="One size, e.g. 16GB, instead of the table; or here.")
]
Fit = Annotated[
    str | None, typer.Option("--fit", metavar="SIZE", help="Print a config that fits into 16GB, say, or here.")
]
Output = Annotated[Path | None, typer.Option("--output", metavar="NEW.yaml", help="Write that config into a new file.")]


def estimate(
    config: ConfigFile = None,
    model: Model = None,
    data: Data = None,
    overrides: Set = None,
    backend: Annotated[str | None, typer.Option("--backend", metavar="auto|mlx|torch", help="auto: both.")] = None,
    memory: Memory = None,
    fit: Fit = None,
    output: Output = None,
    search: Annotated[bool, typer.Option("--search", help="Load the model and try growing micro-batches.")] = False,
    tflops: Annotated[float | None, typer.Option("--tflops", min=0.001, help="Matmul rate, for the time.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Memory by part and time per update, on this machine and the usual ones; loads no weights."""
    import mlxlora
    from shared.errors import ConfigError

    checked = mlxlora.load_config(config, overrides=overrides or [], **given(model, data, backend=backend))
    if output is not None and fit is None:
        raise ConfigError("--output takes the config that --fit makes", fix="add --fit here, or --fit 16GB")
    if fit is not None:
        write_fitting(checked, fit, output, as_json=as_json)
        return
    if search:
        show_search(checked, as_json=as_json)
        return
    report = mlxlora.estimate(checked, memory=memory, tflops=tflops)
    if as_json:
        emit(report)
        return
    for note in report.notes:
        say(note)
    print("\n".join(report_lines(report)))


def write_fitting(config: RunConfig, memory: str, output: Path | None, *, as_json: bool) -> None:
    """Print a config that fits, or write it into a new file; say what has changed."""
    from shared.config_file import to_yaml
    from shared.errors import ConfigError
    from shared.estimate.report import fit, write_config

    if memory.upper().rstrip("IB").endswith(("M", "K")):
        raise ConfigError(f"--fit {memory}: MB and KB are not read", expected="here, or a size in GB such as 16GB")
    if config.backend == "auto":
        config = config.model_copy(update={"backend": "mlx" if sys.platform == "darwin" else "torch"})
        say(f"backend: {config.backend}, as on this machine; --backend for another")
    fitting, changes = fit(config, memory)
    if output is not None:
        write_config(fitting, output)
    if as_json:
        emit_object({"changes": changes, "output": output, "config": fitting.model_dump(mode="json")})
        return
    for key, value in changes.items():
        say(f"{key}: {json.dumps(value)}")
    if not changes:
        say("it fits as it is")
    print(f"wrote {output}" if output is not None else to_yaml(fitting), end="\n" if output is not None else "")


def show_search(config: RunConfig, *, as_json: bool) -> None:
    """Measure growing micro-batches and print each."""
    from shared.jobs.search import search_micro_tokens

    def show(tried: Tried) -> None:
        if not as_json:
            print(
                f"  micro_tokens {tried.micro_tokens:>8,}  {tried.tokens_per_s:>10,.0f} tokens/s  "
                f"peak {size(tried.peak_bytes)}"
            )

    found = search_micro_tokens(config, tell=show)
    if as_json:
        emit(found)
        return
    print(f"stopped: {found.stopped}")
    print(f"fastest: train.micro_tokens={found.fastest}")


def report_lines(report: Report) -> list[str]:
    """Return the report as text."""
    rows = f"rows of up to {report.longest_row} tokens" if report.rows_known else f"rows of {report.longest_row} tokens"
    trained = f"{report.trained_parameters:,} of {report.parameters:,} parameters trained"
    lines = [f"{report.model}: {trained}, {rows}"]
    for found in report.backends:
        lines += ["", *backend_lines(found)]
    return lines


def backend_lines(found: BackendReport) -> list[str]:
    """Return the text of one backend: parts on this machine, time, and the table of machines."""
    state = "on" if found.recompute else "off"
    taken = f"micro-batches of {found.micro_tokens} tokens, recompute {state}"
    lines = [f"{found.backend}: {size(found.peak_bytes)} with {taken}"]
    for part in sorted(found.parts, key=lambda part: -part.bytes):
        if part.bytes:
            at_peak = "" if part.at_peak else f"  not at the peak ({found.moment})"
            lines.append(f"  {part.name:<16}{size(part.bytes):>12}{at_peak}")
    if not found.measured:
        lines.append("  activations: factors borrowed from a CPU or from float32, not measured here yet")
    lines.append(f"  {time_line(found)}")
    return [*lines, HEADINGS, *(machine_text(line) for line in found.lines)]


def time_line(found: BackendReport) -> str:
    """Return the time of an update in words."""
    from shared.estimate.duration import UTILISATION

    work, time = f"{found.time.operations / 1e12:.3g} TFLOP per update", found.time
    if time.seconds is None or time.rate is None:
        return f"{work}; time {time.source}"
    return f"{work}: about {time.seconds:.2g} s at {UTILISATION:.0%} of {time.rate / 1e12:.3g} TFLOP/s ({time.source})"


def machine_text(line: Line) -> str:
    """Return one machine's row of the table."""
    state = "on" if line.recompute else "off"
    change = "" if line.fits else "nothing helps"
    if line.changes:
        change = ", ".join(f"{key}={value}" for key, value in line.changes.items())
    longest = line.longest_max_length or "-"
    return (
        f"  {line.machine:<16}{size(line.limit_bytes):>10}{size(line.peak_bytes):>10}  {state:<10}"
        f"{line.micro_tokens:<14}{line.largest_micro_tokens or '-':<10}{longest:<13}{change}"
    )


def size(count: int) -> str:
    """Return bytes in a readable unit.

    >>> size(3 * 2**30)
    '3.0 GB'
    """
    return f"{count / GIB:.1f} GB" if count >= GIB / 10 else f"{count / 2**20:.1f} MB"
