"""What pydantic finds wrong with a config, in the words of a user: the place, the key, what was found and expected."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from difflib import get_close_matches
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
        return ConfigError(f'{where}: unknown key "{key}"', code="E201", fix=key_advice(root, path, first.get("input")))
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
    fix = next((hint for hint in hints if hint.startswith("did")), None)
    if section := next((problem for problem in problems if problem["type"] == "model_type"), None):
        fix = fix or section_advice(root, key_path(section), section["input"], by_option=where == "--set")
    return ConfigError(f"{where}: {key}{shown}", code="E202", expected=" or ".join(wanted), fix=fix)


def section_advice(root: type[BaseModel], path: tuple[Any, ...], found: Any, *, by_option: bool) -> str | None:
    """Return how a section is written whose main key alone was given, None where that cannot be told.

    by_option: as --set has it.
    """
    main = next((key for key in ("path", "name", "type") if key in keys_of(root, path)), None)
    texts = [found] if isinstance(found, str) else found
    if main is None or not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        return None
    written = [text if PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False) for text in texts]
    if isinstance(path[-1], int):  # of a list of sections
        return f"a section for each: [{{{main}: {written[0]}}}, ...]"
    if not isinstance(found, str):
        return f"{path[-1]}: {{{main}: [{{{main}: {written[0]}}}, ...]}}" if main == "path" else None
    key = ".".join(map(str, path))
    return f"--set {key}.{main}={written[0]}" if by_option else f"{key}: {{{main}: {written[0]}}}"


def key_advice(root: type[BaseModel], path: tuple[Any, ...], found: Any = None) -> str:
    """Return what an unknown key may be meant for: another program's name, a key of another section, or a near one.

    found: what stands under it.
    """
    name, section, everywhere = str(path[-1]), path[:-1], key_paths(root)
    if name in everywhere:  # the whole path as one key
        first, _, rest = name.partition(".")
        return f"write it as a section: {first}: {{{rest}: ...}}"
    plain = name.lower().replace("-", "_")
    foreign = get_close_matches(plain, FOREIGN, n=1, cutoff=0.9)
    if foreign:
        return meaning([FOREIGN[foreign[0]]], section, found)
    if same := [full for full in everywhere if full.rpartition(".")[2] == plain]:
        return meaning(same, section, found)
    near = did_you_mean(name, keys_of(root, section))
    if near.startswith("did"):
        return near
    last = {full.rpartition(".")[2]: full for full in everywhere}
    other = get_close_matches(plain, last, n=1, cutoff=0.8)
    return meaning([last[other[0]]], section, found) if other else near


def meaning(paths: Sequence[str], section: tuple[Any, ...], found: Any) -> str:
    """Return a question about keys by their paths, by the name alone of one that is in the same section.

    >>> meaning(["optimizer.lr"], ("optimizer",), 1), meaning(["checkpoint.every", "log.every"], (), 1)
    ('did you mean "lr"?', 'did you mean "checkpoint.every" or "log.every"?')
    >>> meaning(["adapter"], (), {"r": 8})
    'did you mean "adapter", with rank?'
    """
    names = [path.removeprefix(".".join([*map(str, section), ""])) for path in paths]
    inner = [FOREIGN.get(str(key), str(key)).rpartition(".")[2] for key in found] if isinstance(found, dict) else []
    behind = f", with {', '.join(inner[:4])}" if inner else ""
    return "did you mean " + " or ".join(f'"{name}"' for name in names) + behind + "?"


def key_paths(root: type[BaseModel], above: str = "") -> list[str]:
    """Return the dotted paths of all sections and settings."""
    found: list[str] = []
    for key, field in root.model_fields.items():
        found.append(above + key)
        if (section := section_in(field.annotation, listed=False)) is not None:
            found += key_paths(section, f"{above}{key}.")
    return found


def nearest(name: Any, problem: dict[str, Any]) -> str:
    """Return the nearest of the names that a problem's key may have, or all of them."""
    known = re.findall("'([^']+)'", problem["ctx"]["expected"])
    name = next((meant for meant in MEANT.get(str(name).lower(), ()) if meant in known), str(name))
    return did_you_mean(name, known)


MEANT = {  # what other programs call ours
    "fp16": ("float16",), "bf16": ("bfloat16",), "fp32": ("float32",), "full": ("none",),
    "cuda": ("gpu", "torch"), "mps": ("gpu", "mlx"), "metal": ("gpu", "mlx"), "pytorch": ("torch",),
}  # fmt: skip
FOREIGN = {  # keys of other programs -> ours
    "learning_rate": "optimizer.lr", "optim": "optimizer.name", "lr_scheduler_type": "schedule.name",
    "lr_schedule": "schedule.name", "warmup_ratio": "schedule.warmup", "warmup_steps": "schedule.warmup",
    "num_epochs": "train.epochs", "num_train_epochs": "train.epochs", "max_steps": "train.updates",
    "iters": "train.updates", "per_device_train_batch_size": "train.batch_size", "data_seed": "train.seed",
    "gradient_checkpointing": "train.recompute", "grad_checkpoint": "train.recompute", "torch_dtype": "train.dtype",
    "max_seq_length": "data.max_length", "max_seq_len": "data.max_length", "cutoff_len": "data.max_length",
    "lora": "adapter", "peft_config": "adapter", "r": "adapter.rank", "lora_r": "adapter.rank",
    "lora_rank": "adapter.rank", "lora_alpha": "adapter.alpha", "lora_dropout": "adapter.dropout",
    "target_modules": "adapter.targets", "num_layers": "adapter.layers", "scheduler": "schedule",
    "model_name_or_path": "model", "base_model": "model", "dataset": "data", "output_dir": "output",
    "adapter_path": "output", "save_steps": "checkpoint.every", "save_every": "checkpoint.every",
    "eval_steps": "evaluation.every", "steps_per_eval": "evaluation.every", "logging_steps": "log.every",
    "report_to": "log.to",
}  # fmt: skip
PLAIN = re.compile(r"[\w./~@-]+")  # texts that YAML takes without quotes
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
