"""What pydantic finds wrong with a config, in the words of a user: the place, the key, what was found and expected."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ValidationError

from shared.errors import ConfigError, did_you_mean

Places = dict[tuple[Any, ...], str]  # key path -> where it was set: "run.yaml:3", "--set"


def pick_problems(error: ValidationError) -> list[dict[str, Any]]:
    """Return the problems of one key, unknown keys first: a typo also leaves its key missing."""
    problems: list[dict[str, Any]] = [dict(problem) for problem in error.errors(include_url=False)]
    first = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")
    path = key_path(first)
    return [first, *(other for other in problems if other is not first and key_path(other)[: len(path)] == path)]


def key_path(problem: dict[str, Any]) -> tuple[Any, ...]:
    """Return the keys that lead to a problem, without what pydantic puts in to name a branch of a union."""
    if problem["type"] == "extra_forbidden":
        return tuple(problem["loc"])
    return tuple(part for part in problem["loc"] if not is_union_label(part))


def describe(root: type[BaseModel], error: ValidationError, *, place: str, places: Places) -> ConfigError:
    """Return a ConfigError with the place, the key, what was found and what was expected."""
    problems = pick_problems(error)
    first, path = problems[0], key_path(problems[0])
    key = ".".join(str(part) for part in path) or "the top level"
    where = next((places[path[:n]] for n in range(len(path), 0, -1) if path[:n] in places), place)
    if first["type"] == "extra_forbidden":
        return ConfigError(
            f'{where}: unknown key "{key}"', code="E201", fix=did_you_mean(str(path[-1]), keys_of(root, path[:-1]))
        )
    if first["type"] == "missing" and isinstance(path[-1], int):
        whole = ".".join(str(part) for part in path[:-1])
        return ConfigError(f"{where}: {whole} is too short", code="E202", expected=f"{path[-1] + 1} values at least")
    if first["type"] == "missing":
        inner = keys_of(root, path)  # of a section, which --set takes apart
        at = f"{key}.{inner[0]}" if inner else key
        return ConfigError(
            f'{where}: key "{key}" is missing', code="E202", fix=f"add {key} to the config, or --set {at}=..."
        )
    found = first.get("input")
    shown = "" if isinstance(found, dict) else f", found {shorten(found)}"
    wanted = dict.fromkeys(expectation(root, problem) for problem in problems)
    return ConfigError(f"{where}: {key}{shown}", code="E202", expected=" or ".join(wanted))


def expectation(root: type[BaseModel], problem: dict[str, Any]) -> str:
    """Return what a problem's key should hold.

    >>> expectation(BaseModel, {"type": "greater_than", "msg": "Input should be greater than 0", "loc": ("lr",)})
    'greater than 0'
    """
    if problem["type"] == "model_type":
        return f"a section with keys such as {', '.join(keys_of(root, key_path(problem))[:3])}"
    message = str(problem["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
    return message[0].lower() + message[1:]


def is_union_label(part: Any) -> bool:
    """Return whether pydantic put this into the path to name a branch of a union, not a key."""
    if not isinstance(part, str):
        return False
    return part in {"int", "float", "str", "bool"} or "[" in part or "-" in part


def shorten(value: Any) -> str:
    """Return a value's repr, cut to 60 characters."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def keys_of(root: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """Return the keys that the section of `root` at this path has."""
    section: Any = root
    for part in path:
        section = getattr(section.model_fields.get(part), "annotation", None)
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            return []
    return list(section.model_fields)
