"""How answers are drawn: the options that `generate` and `chat` have alike, and the checks of their values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from inspect import Parameter, signature
from itertools import chain
from typing import Annotated, Any

import typer

from mlxlora.cli.options import check_finite
from mlxlora.cli.output import say

Settings = Mapping[str, Any]  # of shared.generation.config, None where an option is not given
FROM_OPTIONS: Settings = {}  # the place of the options in a command's signature
OPTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "max_tokens": (int, {"min": 1, "help": "Tokens of an answer, at most."}),
    "temperature": (float, {"min": 0.0, "help": "0: the likeliest token each time."}),
    "top_k": (int, {"min": 0, "help": "Only the K likeliest tokens; 0: all."}),
    "top_p": (float, {"min": 0.0, "max": 1.0, "help": "Only the likeliest that sum to this probability."}),
    "min_p": (float, {"min": 0.0, "max": 1.0, "help": "Only tokens with this share of the likeliest one's."}),
    "repetition_penalty": (float, {"min": 0.0, "help": "Above 1: what was said is less likely."}),
    "stop": (list[str], {"metavar": "TEXT", "help": "Text that ends an answer; may stand several times."}),
    "seed": (int, {"min": 0, "help": "Same seed, same text."}),
}


def takes_sampling(**defaults: float) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that puts the options above in the place of a command's parameter `sampling`.

    defaults: those that the help shows; a test holds them against shared.generation.config, which needs pydantic.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(**given: Any) -> None:
            sampling = {name: given.pop(name) for name in OPTIONS}
            command(sampling={**sampling, "stop": sampling["stop"] or None}, **given)

        own = signature(command, eval_str=True)
        spread = {name: [param] for name, param in own.parameters.items()} | {"sampling": parameters(defaults)}
        vars(run)["__signature__"] = own.replace(parameters=list(chain(*spread.values())))
        return run

    return decorate


def parameters(defaults: Mapping[str, float]) -> list[Parameter]:
    """Return the options as parameters of a command, None each where it is not given."""
    found = []
    for name, (kind, details) in OPTIONS.items():
        shown = f" [default: {defaults[name]:g}]" if name in defaults else ""
        option = typer.Option(f"--{name.replace('_', '-')}", **{**details, "help": details["help"] + shown})
        hint = Annotated[kind | None, option]
        found.append(Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=hint))
    return found


def check_settings(settings: Settings) -> None:
    """Raise ConfigError for what no generation can use, before a model is loaded; note what has no effect."""
    for key in ("temperature", "top_p", "min_p", "repetition_penalty"):
        if settings[key] is not None:
            check_finite(f"--{key.replace('_', '-')}", settings[key])
    from shared.generation.config import WITHOUT_EFFECT, read_settings

    greedy = read_settings(dict(settings)).temperature == 0
    idle = [f"--{key.replace('_', '-')}" for key in WITHOUT_EFFECT if settings[key]]
    if idle and greedy:
        say(f"{idle[0]} changes nothing at temperature 0, which takes the likeliest token; --temperature 1 draws")
