"""The commands: arguments in, one call of the Python API, results out."""

from __future__ import annotations

import json
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlxlora.cli.options import (
    AllowChange,
    BackendName,
    ConfigFile,
    Data,
    Debug,
    Json,
    Model,
    Set,
    Supervise,
    Sweep,
    check_backend,
    given,
)
from mlxlora.cli.output import emit, emit_object, say

if TYPE_CHECKING:
    from shared.jobs.train import TrainResult

app = typer.Typer(
    name="mlxlora",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Fine-tune language models with MLX and PyTorch: one recipe, one adapter that loads everywhere."""


@app.command()
def train(
    config: ConfigFile = None,
    model: Model = None,
    data: Data = None,
    overrides: Set = None,
    backend: Annotated[
        str | None, typer.Option("--backend", metavar="auto|mlx|torch", help="Where to compute.")
    ] = None,
    output: Annotated[str | None, typer.Option("--output", metavar="DIR", help="Run folder.")] = None,
    resume: Annotated[str, typer.Option("--resume", metavar="auto|never|PATH", help="Where to go on from.")] = "auto",
    allow_change: AllowChange = None,
    supervise: Supervise = False,
    sweep: Sweep = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fine-tune a base model. The same command goes on where it stopped."""
    import mlxlora
    from shared.watching.display import make_display

    values = given(model, data, backend=backend, output=output)
    if sweep is not None:
        check_alone("--sweep", {"--supervise": supervise, "--resume": resume != "auto", "--allow-change": allow_change})
        raise typer.Exit(train_sweep(config, sweep, overrides=overrides or [], values=values, as_json=as_json))
    checked = mlxlora.load_config(config, overrides=overrides or [], **values)
    if supervise:
        raise typer.Exit(train_supervised(checked.output_dir, as_json=as_json))
    display = make_display()
    try:
        result = mlxlora.train(checked, resume=resume, allow_change=allow_change or [], callbacks=[display])
    finally:
        getattr(display, "close", lambda: None)()
    with suppress(BrokenPipeError):  # nobody reads it any more; the run is done all the same
        emit(result) if as_json else show_result(result, model=checked.model)


def train_sweep(config: Path | None, grid: Path, *, overrides: list[str], values: dict[str, Any], as_json: bool) -> int:
    """Return the exit code of the runs of a grid: 0, or that of the first that failed."""
    from mlxlora.cli.sweeping import as_object, show, train_grid

    result = train_grid(config, grid, overrides=overrides, values=values)
    with suppress(BrokenPipeError):
        emit_object(as_object(result)) if as_json else show(result)
    return result.exit_code


def check_alone(option: str, others: dict[str, Any]) -> None:
    """Raise ConfigError where an option is given together with one that it does not go with."""
    given = [name for name, value in others.items() if value]
    if given:
        from shared.errors import ConfigError

        raise ConfigError(f"{option} together with {given[0]}", fix="leave out one of them")


def train_supervised(folder: Path, *, as_json: bool) -> int:
    """Return the exit code of this very command, run in a child process without --supervise."""
    from shared.jobs.supervise import supervise

    program = ["-m", "mlxlora"] if Path(sys.argv[0]).name == "__main__.py" else [sys.argv[0]]
    arguments = [argument for argument in sys.argv[1:] if argument != "--supervise"]
    code = supervise([sys.executable, *program, *arguments], folder=folder, note=say)
    if code < 0 and as_json:
        emit_object({"ok": False, "exit_code": 128 - code, "error": f"training was ended by signal {-code}"})
    return code if code >= 0 else 128 - code


def show_result(result: TrainResult, *, model: str) -> None:
    """Print how a run ended, and the command that uses its adapter."""
    state = "was complete already" if result.already_complete else "trained"
    skipped = f", {result.skipped_updates} skipped" if result.skipped_updates else ""
    valid = f", validation loss {result.eval_loss:.4f}" if result.eval_loss is not None else ""
    loss = f", loss {result.loss:.4f}" if result.loss is not None else ""
    kind = result.adapter.name  # adapter, or model after full fine-tuning
    target = [model, "--adapter", str(result.adapter)] if kind == "adapter" else [str(result.adapter)]
    early = " (stopped early)" if result.stopped_early else " (diverged)" if result.diverged else ""
    best = f", the best of update {result.result_update}" if result.result_update != result.updates else ""
    print(f"{state}: {result.updates} updates{early}{skipped}{loss}{valid}{best}\n{kind}: {result.adapter}")
    print(f'next: mlxlora generate {shlex.join(target)} --prompt "..."')


@app.command()
def parity(
    config: ConfigFile = None,
    model: Model = None,
    data: Data = None,
    updates: Annotated[
        int | None, typer.Option("--updates", min=1, help="How many to compare; by default train.updates, 50 at most.")
    ] = None,
    overrides: Set = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run MLX and PyTorch on the same batches and print the gaps; exit code 0 within tolerance."""
    import mlxlora

    checked = mlxlora.load_config(config, overrides=overrides or [], **given(model, data))
    result = mlxlora.parity(checked, updates=updates, note=say)
    if as_json:
        emit(result, ok=result.ok)
    else:
        print(f"{result.model}: {' and '.join(result.backends)}")
        for gap in result.gaps:
            print(
                f"  {'ok  ' if gap.ok else 'FAIL'} {gap.quantity:<14} {gap.gap:.2e}  "
                f"bound {gap.bound:.0e}  ({gap.note})"
            )
        print("within tolerance" if result.ok else "out of tolerance: please report it with this output")
    raise typer.Exit(0 if result.ok else 1)


@app.command()
def doctor(as_json: Json = False, debug: Debug = False) -> None:
    """This machine, its versions, and a real training step on every backend."""
    import mlxlora

    checks = mlxlora.doctor()
    usable = any(check.status == "PASS" and check.name.endswith(" step") for check in checks)
    if as_json:
        emit_object({"ok": usable, "checks": [vars(check) for check in checks]})
    for check in checks if not as_json else ():
        print(f"{check.status:<4}  {check.name:<18}  {check.found}")
        if check.fix:
            print(f"{'':<26}fix: {check.fix}")
    raise typer.Exit(0 if usable else 4)


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Run folder.")] = Path("runs/quickstart"),
    backend: BackendName = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fine-tune the embedded demo base on the embedded task, and see what changed."""
    import mlxlora
    from shared.jobs.quickstart import report
    from shared.watching.display import make_display

    check_backend(backend)
    display = make_display()
    try:
        result = mlxlora.quickstart(output, backend=backend, callbacks=[display], note=say)
    finally:
        getattr(display, "close", lambda: None)()
    if as_json:
        emit(result)
    else:
        print(report(result))


@app.command()
def schema(as_json: Json = False, debug: Debug = False) -> None:
    """JSON schema of the config file."""
    import mlxlora

    print(json.dumps(mlxlora.schema(), indent=None if as_json else 2))


@app.command()
def explain(
    code: Annotated[str | None, typer.Argument(help="Code of an error, e.g. E202; all of them without.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Cause and remedy of an error, by its code."""
    from shared.catalogue import CATALOGUE, exit_code
    from shared.errors import ConfigError, did_you_mean

    if code is None:
        if as_json:
            emit_object({"errors": {key: vars(kind) for key, kind in CATALOGUE.items()}})
        for key, kind in CATALOGUE.items() if not as_json else ():
            print(f"{key}  {kind.title}")
        return
    name = f"E{code.upper().removeprefix('E')}"
    if name not in CATALOGUE:
        hint = did_you_mean(name, CATALOGUE)
        fix = hint if "mean" in hint else "`mlxlora explain` lists all codes"
        raise ConfigError(f'explain: no error has the code "{code}"', fix=fix)
    kind = CATALOGUE[name]
    if as_json:
        emit_object({"code": name, "exit_code": exit_code(name), **vars(kind)})
    else:
        print(f"{name}: {kind.title} (exit code {exit_code(name)})\ncause:  {kind.cause}\nremedy: {kind.remedy}")


@app.command()
def version(as_json: Json = False) -> None:
    """Version of mlxlora."""
    import mlxlora

    print(json.dumps({"version": mlxlora.__version__}) if as_json else mlxlora.__version__)
