"""What pydantic finds wrong with a config, in the words of a user: the place, the key, what was found and expected."""

from __future__ import annotations

import json
import re
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from shared.errors import ConfigError, did_you_mean

NO_FILE = "config"  # the place of a config that no file holds
Places = dict[tuple[Any, ...], str]  # key path -> where it was set: "run.yaml:3", "--set"


def pick_problems(error: ValidationError) -> list[dict[str, Any]]:
    """Return the problems of one key, unknown keys first: a typo also leaves its key missing."""
    problems: list[dict[str, Any]] = [dict(problem) for problem in error.errors(include_url=False)]
    first = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")
    path = key_path(first)
    return [first, *(other for other in problems if other is not first and key_path(other)[: len(path)] == path)]


def key_path(problem: dict[str, Any]) -> tuple[Any, ...]:
    """Return the keys that lead to a problem, without what pydantic puts in to name a branch of a union."""
    *front, last = problem["loc"] or ("",)
    if last == "[key]":  # of a mapping: the key itself stands before it
        *front, last = front
    path = tuple(part for part in front if not is_union_label(part))
    named = problem["type"] == "extra_forbidden" or not is_union_label(last)
    return (*path, last) if problem["loc"] and named else path


def describe(root: type[BaseModel], error: ValidationError, *, place: str, places: Places) -> ConfigError:
    """Return a ConfigError with the place, the key, what was found and what was expected."""
    problems = pick_problems(error)
    first, path = problems[0], key_path(problems[0])
    key = ".".join(str(part) for part in path) or "the top level"
    where = next((places[path[:n]] for n in range(len(path), 0, -1) if path[:n] in places), place)
    if first["type"] == "literal_error" and first["loc"][-1:] == ("[key]",):
        colon = "put a blank behind the colon: {name: value}" if ":" in str(path[-1]) else None  # YAML wants one
        return ConfigError(f'{where}: unknown key "{key}"', code="E201", fix=colon or nearest(path[-1], first))
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
        fix = f"add {key} to the config, or --set {at}=..."
        if (place, key) == (NO_FILE, "model"):
            fix = "name a config file, or --model MODEL --data DATA; `mlxlora recipes ls` lists configs to begin with"
        return ConfigError(f'{where}: key "{key}" is missing', code="E202", fix=fix)
    found = first.get("input")
    shown = "" if isinstance(found, dict) else f", found {shorten(found)}"
    wanted = dict.fromkeys(expectation(root, problem) for problem in problems)
    hints = (nearest(found, problem) for problem in problems if problem["type"] == "literal_error")
    near = next((hint for hint in hints if hint.startswith("did")), None)
    return ConfigError(f"{where}: {key}{shown}", code="E202", expected=" or ".join(wanted), fix=near)


def nearest(name: Any, problem: dict[str, Any]) -> str:
    """Return the nearest of the names that a problem's key may have, or all of them."""
    known = re.findall("'([^']+)'", problem["ctx"]["expected"])
    name = next((meant for meant in MEANT.get(str(name).lower(), ()) if meant in known), str(name))
    return did_you_mean(name, known)


MEANT = {  # what other programs call ours
    "fp16": ("float16",), "bf16": ("bfloat16",), "fp32": ("float32",), "full": ("none",),
    "cuda": ("gpu", "torch"), "mps": ("gpu", "mlx"), "metal": ("gpu", "mlx"), "pytorch": ("torch",),
}  # fmt: skip
# What a value should be, by what pydantic calls the problem; {ge} and the like are its bounds.
WORDS = {
    "int_type": "a whole number", "int_parsing": "a whole number", "int_from_float": "a whole number",
    "float_type": "a number", "float_parsing": "a number", "finite_number": "a finite number",
    "bool_type": "true or false", "bool_parsing": "true or false",
    "string_type": "a text", "string_too_short": "a text that is not empty",
    "string_pattern_mismatch": "letters, digits, - and _, a letter or digit first",
    "list_type": "a list: [a, b]", "tuple_type": "a list: [a, b]", "dict_type": "a mapping: {{name: value}}",
    "too_short": "a list of {min_length} or more", "too_long": "a list of {max_length} at most",
    "greater_than": "above {gt}", "greater_than_equal": "{ge} or more",
    "less_than": "below {lt}", "less_than_equal": "{le} or less",
    "literal_error": "{expected}",
}  # fmt: skip


def expectation(root: type[BaseModel], problem: dict[str, Any]) -> str:
    """Return what a problem's key should hold.

    >>> expectation(BaseModel, {"type": "greater_than", "ctx": {"gt": 0.0}, "loc": ("lr",)})
    'above 0'
    """
    if problem["type"] == "model_type":
        return f"a section with keys such as {', '.join(keys_of(root, key_path(problem))[:3])}"
    if (words := WORDS.get(problem["type"])) is not None:
        bounds = problem.get("ctx", {}).items()
        return words.format(**{name: f"{bound:.10g}" if isinstance(bound, float) else bound for name, bound in bounds})
    message = str(problem["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
    return message[0].lower() + message[1:]


LABEL = re.compile(r"int|float|str|bool|constrained-\w+|(\w|-)+\[.*\]")


def is_union_label(part: Any) -> bool:
    """Return whether pydantic put this into the path to name a branch of a union, not a key."""
    return isinstance(part, str) and LABEL.fullmatch(part) is not None


def shorten(value: Any) -> str:
    """Return a value's repr, cut to 60 characters."""
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def keys_of(root: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """Return the keys that the section of `root` at this path has."""
    section: Any = root
    for part, behind in zip(path, (*path[1:], None), strict=False):
        if isinstance(part, int):  # of a list of sections
            continue
        section = section_in(
            getattr(section.model_fields.get(part), "annotation", None), listed=isinstance(behind, int)
        )
        if section is None:
            return []
    return list(section.model_fields)


def section_in(annotation: Any, *, listed: bool) -> type[BaseModel] | None:
    """Return the section that a key holds, of a list's values where `listed`; None where it holds none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = get_args(annotation) if listed else ()
    return next((found for one in inner if (found := section_in(one, listed=True)) is not None), None)
