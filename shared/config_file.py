"""YAML to and from the config: safe, without aliases, with line numbers for every message."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from shared.config import Places, RunConfig, advise_key, known_keys, validate
from shared.data.formats import MARK, READERS
from shared.errors import ConfigError
from shared.problems import NO_FILE

MAX_BYTES = 1_000_000
MAX_DEPTH = 20
MAX_NODES = 20_000  # half a second to read
Lines = dict[tuple[Any, ...], int]


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 floats (1e-4 is a number), without anchors and aliases, of so many values at most."""

    nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        self.nodes += 1
        if self.nodes > MAX_NODES:
            problem = f"more than {MAX_NODES} values; is this the config file?"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        if event.anchor is not None:  # of an alias too
            problem = "anchors (&name) and aliases (*name) are not allowed"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)


_Loader.yaml_implicit_resolvers = {
    key: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:float"]
    for key, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)"
        r"|[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
    ),
    list("-+0123456789."),
)


def load_config(path: Path, *, overrides: Iterable[str] = (), values: dict[str, Any] | None = None) -> RunConfig:
    """Return the config of a YAML file with `key.sub=value` overrides and nested `values` on top.

    Raises ConfigError with file:line, the key and the nearest known name.
    """
    found, lines = read_yaml(path)
    places = {key: f"{path.name}:{line}" for key, line in lines.items()}
    return build_over(found, values or {}, overrides, place=path.name, places=places)


def beside(config: RunConfig, file: Path, key: str) -> str | None:
    """Return what to do about a path of a config that is not there but would be beside its file, else None.

    Paths go from the folder in which the command runs. key: model, or data.path.
    """
    texts = [config.model] if key == "model" else [source.path for source in config.data.sources]
    for path in (Path(text).expanduser() for text in texts):
        there = file.parent / path
        if not path.exists() and there != path and there.exists():
            go = f"cd {shlex.quote(str(file.parent))}, or --set {key}={shlex.quote(str(there))}"
            return f"{path} is beside {file.name}, but paths go from {Path.cwd()}: {go}"
    return None


def build_config(values: dict[str, Any], *, overrides: Iterable[str] = ()) -> RunConfig:
    """Return the config of nested values and `key.sub=value` overrides, without a file."""
    return build_over({}, values, overrides, place=NO_FILE, places={})


def build_over(
    base: dict[str, Any], values: dict[str, Any], overrides: Iterable[str], *, place: str, places: Places
) -> RunConfig:
    """Return the config of `base` with values and overrides on top; a message names where a key was set last."""
    merged = merge(base, values)
    places.update(dict.fromkeys(leaves(values), "argument"))
    together: dict[str, Any] = {}
    for text in overrides:
        together = overlay(together, parse_override(text))
    places.update(dict.fromkeys(leaves(together), "--set"))
    return validate(merge(merged, together), place=place, places=places)


def leaves(values: dict[str, Any], path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value that is no section.

    >>> list(leaves({"train": {"seed": 1}, "model": "m"}))
    [('train', 'seed'), ('model',)]
    """
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key)


def read_yaml(
    path: Path, *, what: str = "config file", instead: str = "or --model and --data"
) -> tuple[dict[str, Any], Lines]:
    """Return a YAML mapping and the line of every key path; what it is to be, and instead of what, for messages."""
    try:
        if not path.is_file():
            kind = "is a folder" if path.is_dir() else "does not exist"
            fix = f"give the path of a YAML file, {instead}"
            raise ConfigError(f"{what} {path} {kind}", code="E203", fix=fix)
        if looks_like_data(path):
            raise ConfigError(
                f"{path} is no config: it looks like data",
                code="E203",
                fix=f"--data {shlex.quote(str(path))} --model MODEL",
            )
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(
                f"{path.name} is larger than {MAX_BYTES} bytes", code="E203", fix="is this the config file?"
            )
        return parse_yaml(path.read_text(encoding="utf-8-sig"), name=path.name)
    except OSError as error:
        raise ConfigError(
            f"cannot read {path.name}: {error.strerror}", code="E203", fix="check the path and its permissions"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path.name}: not UTF-8 at byte {error.start}", code="E203", fix="save the file as UTF-8"
        ) from None


def looks_like_data(path: Path) -> bool:
    """Return whether a file is given by mistake, as it holds rows; .json may be a config, but for an array."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1:] == [".gz"] and bool(suffixes.pop())
    if suffixes[-1:] == [".json"] and not packed:
        with path.open("rb") as stream:
            return stream.read(4096).removeprefix(MARK).lstrip().startswith(b"[")
    return suffixes[-1:] != [] and suffixes[-1] in READERS


def parse_yaml(text: str, *, name: str) -> tuple[dict[str, Any], Lines]:
    """Return the mapping a YAML text holds and the line of every key path."""
    lines: Lines = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        walk(node, path=(), lines=lines, name=name)
        values = loader.construct_document(node) if node is not None else {}
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(
            f"{name}:{line}: not valid YAML: {error.problem}", code="E203", fix="correct the line"
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML: {error}", code="E203", fix="is this a text file?") from None
    except ConfigError:
        raise
    except RecursionError:
        raise ConfigError(
            f"{name}: nested deeper than {MAX_DEPTH} levels", code="E203", fix="is this the config file?"
        ) from None
    except (ValueError, LookupError, AttributeError, TypeError) as error:  # of !!bool x, !!int "" and !!timestamp x
        raise ConfigError(f"{name}: a value cannot be read: {error}", code="E203", fix="correct the value") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{name}:1: the top level is a {type(values).__name__}", code="E203", expected="key: value lines"
        )
    return values, lines


def walk(node: Any, *, path: tuple[Any, ...], lines: Lines, name: str) -> None:
    """Note the line of every key; refuse keys that stand twice and deep nesting."""
    if len(path) > MAX_DEPTH:
        raise ConfigError(f"{name}: nested deeper than {MAX_DEPTH} levels", code="E203", fix="is this the config file?")
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(
                    f"{name}:{key.start_mark.line + 1}: a key is a list or a mapping", code="E203", expected="a name"
                )
            inner = (*path, key.value)
            line = key.start_mark.line + 1
            if inner in lines:
                raise ConfigError(
                    f'{name}:{line}: key "{key.value}" stands twice', code="E203", fix="remove one of them"
                )
            lines[inner] = line
            walk(value, path=inner, lines=lines, name=name)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            walk(value, path=(*path, index), lines=lines, name=name)


def parse_override(text: str) -> dict[str, Any]:
    """Return the nested dict of one `key.sub=value`; the value is YAML.

    >>> parse_override("train.batch_size=4")
    {'train': {'batch_size': 4}}
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f'--set "{text}" has no key=value form', fix="write --set train.batch_size=4")
    parts = key.strip().split(".")
    for n, part in enumerate(parts):
        known = known_keys(tuple(parts[:n]))
        if part not in known:
            value_at = ".".join(parts[:n])
            inner = dict.fromkeys(parts[n + 1 :])
            hint = advise_key(tuple(parts[: n + 1]), inner) if known else f"{value_at} is a value: --set {value_at}=..."
            raise ConfigError(f'--set: unknown key "{key.strip()}"', code="E201", fix=hint)
    parsed, _ = parse_yaml(f"value: {value}", name=f"--set {key}")
    result: Any = parsed["value"]
    for part in reversed(parts):
        result = {part: result}
    return result


def merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with `top` laid over it, section by section; a null section counts as empty.

    Setting one of train.updates and train.epochs clears the other.
    """
    result = overlay(base, top)
    train = top.get("train")
    if isinstance(train, dict):
        for one, other in (("updates", "epochs"), ("epochs", "updates")):
            if train.get(one) is not None and train.get(other) is None:
                result["train"] = {**result["train"], other: None}
    return result


def overlay(base: dict[str, Any], top: dict[str, Any], path: tuple[Any, ...] = ()) -> dict[str, Any]:
    """Return `base` with `top` laid over it, section by section; a setting that is a mapping is replaced whole.

    >>> overlay({"train": {"seed": 1}}, {"train": {"epochs": 2}})
    {'train': {'seed': 1, 'epochs': 2}}
    >>> overlay({"data": {"splits": {"valid": "test"}}}, {"data": {"splits": {}}})
    {'data': {'splits': {}}}
    """
    result = dict(base)
    for key, value in top.items():
        below, inner = result.get(key) or {}, (*path, key)
        both = isinstance(value, dict) and isinstance(below, dict) and known_keys(inner)
        result[key] = overlay(below, value, inner) if both else value
    return result


def to_yaml(config: RunConfig) -> str:
    """Return the resolved config as YAML, keys in the schema's order."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
