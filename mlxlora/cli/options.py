"""Options that several commands have, and the checks of their values."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, e.g. train.seed=1.")
]
BackendName = Annotated[str, typer.Option("--backend", metavar="auto|mlx|torch", help="Where to compute.")]
ModelPath = Annotated[str, typer.Argument(help="Folder or hub id.")]
Adapted = Annotated[str, typer.Argument(help="Folder or hub id.", callback=lambda ctx, value: check_no_run(ctx, value))]
AdapterPath = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter", metavar="DIR[=WEIGHT]", help="Adapter folder: ours, PEFT's or mlx-lm's; several are added."
    ),
]
Dtype = Annotated[
    str, typer.Option("--dtype", metavar="auto|float32|bfloat16|float16", help="auto: bfloat16 on a GPU, else float32.")
]
Quantization = Annotated[
    str,
    typer.Option(
        "--quantization", metavar="SCHEME", help="auto: as the adapter was trained; none; affine-4bit-g64 ..."
    ),
]

ConfigFile = Annotated[Path | None, typer.Argument(help="YAML file of a run; not needed with --model and --data.")]
Model = Annotated[str | None, typer.Option("--model", metavar="M", help="Folder or hub id of the base.")]
Data = Annotated[str | None, typer.Option("--data", metavar="D", help="Folder with train.jsonl, or a file.")]

AllowChange = Annotated[
    list[str] | None,
    typer.Option("--allow-change", metavar="KEY", help="Go on though this setting, data or base has changed."),
]

Supervise = Annotated[
    bool, typer.Option("--supervise", help="Train in a child process; start it again where the system ends it.")
]

Sweep = Annotated[
    Path | None,
    typer.Option("--sweep", metavar="GRID.yaml", help="Train every combination of the values that a file lists."),
]


def check_no_run(context: typer.Context, value: str) -> str:
    """Return a model's name; raises ModelError with the right command for a run folder, or an adapter's."""
    path = Path(value).expanduser()
    places = [place for place in (path, path / "adapter") if (place / "adapter_config.json").is_file()]
    words: list[str] = list(context.obj or ())
    if not places or (path / "config.json").is_file() or value not in words:
        return value
    from shared.adapters.schema import named_base
    from shared.errors import ModelError
    from shared.folder import read_json
    from shared.watching.report import read_settings

    run = places[0].parent
    settings = read_settings(run) if (run / "manifest.json").is_file() else {}
    base = settings.get("model") or named_base(read_json(places[0] / "adapter_config.json"))
    adapter = [] if any(word.startswith("--adapter") for word in words) else ["--adapter", str(places[0])]
    at = words.index(value)
    command = shlex.join(["mlxlora", *words[:at], str(base or "MODEL"), *adapter, *words[at + 1 :]])
    what = "an adapter" if places[0] == path else "a run folder"
    raise ModelError(f"{value} is {what}, not a model", code="E300", fix=command)


def given(model: str | None, data: str | None, **more: Any) -> dict[str, Any]:
    """Return the settings that options name, without those that were not given."""
    values = {"model": model, "data": {"path": data} if data else None, **more}
    return {key: value for key, value in values.items() if value is not None}


def check_choice(option: str, value: Any, known: tuple[Any, ...]) -> None:
    """Raise ConfigError unless an option has one of its known values."""
    if value not in known:
        from shared.errors import ConfigError, did_you_mean

        raise ConfigError(f'{option}: unknown value "{value}"', fix=did_you_mean(str(value), [k for k in known if k]))


def check_backend(name: str) -> None:
    """Raise ConfigError for a backend that nobody knows, before anything is loaded to look for it."""
    from shared.registry import BACKENDS

    check_choice("--backend", name, ("auto", *BACKENDS))


def check_finite(option: str, value: float) -> None:
    """Raise ConfigError for NaN and infinity."""
    from math import isfinite

    if not isfinite(value):
        from shared.errors import ConfigError

        raise ConfigError(f"{option} is {value}", expected="a finite number")
