"""`train --sweep`: a small grid of settings, a run of each in a folder of its own, and a table of how they ended."""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import math
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from shared.callbacks import Callback
from shared.config import RunConfig
from shared.config_file import parse_override, read_yaml
from shared.durable import write_json
from shared.errors import ConfigError, Interrupted, MlxloraError, OutOfMemory, is_out_of_memory
from shared.jobs.train import TrainResult, train
from shared.running.lock import locked
from shared.running.run_folder import command_line, open_run

MOST = 256  # runs of one grid
REFUSED = ("output", "evaluation.metric", "evaluation.mode")  # where runs lie, and what they are compared by
EXAMPLE = "optimizer.lr: [1e-4, 1e-3]"
LONGEST = 100  # characters of a run folder's name
Make = Callable[[Sequence[str], str | None], RunConfig]  # overrides and an output -> a checked config


@dataclass(frozen=True)
class Member:
    """One run of a grid: its folder's name, the settings that it differs in, and how it ended."""

    name: str
    settings: dict[str, Any]
    state: str = "waiting"  # done, failed, waiting
    value: float | None = None  # of the metric, of the run's result
    updates: int = 0
    result_update: int = 0
    stopped_early: bool = False
    evaluation: dict[str, float] | None = None
    code: str | None = None  # of the error that it failed with
    exit_code: int = 0
    error: str | None = None


@dataclass(frozen=True)
class SweepResult:
    """A whole grid, the best run first and those without a value last."""

    output: Path
    metric: str
    better: str  # min or max
    runs: tuple[Member, ...]

    @property
    def exit_code(self) -> int:
        """Return 0, or the exit code of the first run that failed."""
        return next((run.exit_code for run in self.runs if run.state == "failed"), 0)


def read_grid(path: Path) -> dict[str, list[Any]]:
    """Return a grid file's settings, each with its values; raises ConfigError with the line."""
    found, lines = read_yaml(path, what="sweep file", instead=f"with lines such as {EXAMPLE}")
    if not found:
        raise ConfigError(f"{path.name} has no settings", code="E203", expected=f"lines such as {EXAMPLE}")
    check_grid(found, place=path.name, lines=lines)
    return found


def check_values(key: str, values: Any, *, place: str) -> None:
    """Raise ConfigError for a setting that cannot be swept, or for what is no list of different values."""
    if not isinstance(values, list) or not values:
        raise ConfigError(
            f"{place}: {key} is no list of values",
            code="E203",
            expected=f"key.sub: [value, value], e.g. {EXAMPLE}",
        )
    if key in REFUSED or key.split(".")[0] in REFUSED:
        raise ConfigError(f"{place}: {key} must be the same for all runs", code="E204", fix="set it in the config")
    texts = [json.dumps(value, sort_keys=True, default=str) for value in values]
    if len(set(texts)) < len(texts):
        raise ConfigError(f"{place}: {key} has a value twice", code="E203", fix="remove one of them")
    try:
        parse_override(f"{key}=0")
    except ConfigError as error:
        raise ConfigError(f'{place}: unknown key "{key}"', code="E201", fix=error.fix) from None


def check_grid(grid: Mapping[str, Any], *, place: str, lines: Mapping[tuple[Any, ...], int] | None = None) -> None:
    """Raise ConfigError for settings that cannot be swept, or for more runs than one grid may have."""
    for key, values in grid.items():
        line = (lines or {}).get((key,))
        check_values(key, values, place=place if line is None else f"{place}:{line}")
    count = math.prod(len(values) for values in grid.values())
    if count > MOST:
        raise ConfigError(
            f"{place} makes {count:,} runs", expected=f"{MOST} at most", fix="fewer values, or two sweeps"
        )


def expand(grid: Mapping[str, Sequence[Any]]) -> Iterator[Member]:
    """Yield the runs of a grid, the last setting's values fastest.

    >>> [run.name for run in expand({"optimizer.lr": [1e-4, 1e-3], "adapter.rank": [8]})]
    ['lr-0.0001_rank-8', 'lr-0.001_rank-8']
    """
    names = short_names(list(grid))
    for values in itertools.product(*grid.values()):
        settings = dict(zip(grid, values, strict=True))
        yield Member(folder_name({names[key]: value for key, value in settings.items()}), settings)


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Return the last part of every key, the whole key where two end alike.

    >>> short_names(["optimizer.lr", "train.seed"])
    {'optimizer.lr': 'lr', 'train.seed': 'seed'}
    """
    last = [key.rpartition(".")[2] for key in keys]
    return {key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)}


def folder_name(settings: Mapping[str, Any]) -> str:
    """Return a name that stands for settings and for no others; what a name cannot hold becomes a hash.

    >>> folder_name({"lr": 1e-4}), folder_name({"targets": ["q_proj", "v_proj"]})
    ('lr-0.0001', 'targets-q_proj-v_proj-2dbbd4')
    """
    plain = "_".join(f"{key}-{value_text(value)}" for key, value in settings.items())
    name = re.sub(r"-*[^\w.+-]+-*", "-", plain, flags=re.ASCII).strip("-.")
    if name == plain and len(name) <= LONGEST:
        return name
    return f"{name[:LONGEST]}-{hashlib.sha256(plain.encode()).hexdigest()[:6]}"


def value_text(value: Any) -> str:
    """Return a value as a folder's name has it: a text as it is, but in quotes where it would be another value's JSON.

    >>> value_text("q_proj"), value_text(8), value_text("8")
    ('q_proj', '8', '"8"')
    """
    if isinstance(value, str):
        try:
            json.loads(value)
        except ValueError:
            return value
    return json.dumps(value)


def sweep(
    make: Make, grid: Mapping[str, Sequence[Any]], *, watch: Callable[[], Sequence[Callback]] = tuple,
    note: Callable[[str], None] = lambda text: None, place: str = "grid",
) -> SweepResult:  # fmt: skip
    """Train every run of a grid that has not ended yet, one after the other, and return how all ended.

    watch: makes the callbacks of a run. place: what the grid is called in messages, as its file's name.
    A run that fails does not stop the others. Raises ConfigError before anything runs where one could not be begun,
    and Interrupted where a signal came: the same call goes on there.
    """
    check_grid(grid, place=place)
    base = make([], None)
    folder = base.output_dir if base.output else base.output_dir.with_name(f"{base.output_dir.name}-sweep")
    if (folder / "manifest.json").exists():
        raise ConfigError(f"output: {folder} is the folder of a run", code="E205", fix="choose another --output")
    members = list(expand(grid))
    configs = {member.name: make_member(make, member, folder, place=place) for member in members}
    open_run(folder)
    with locked(folder, note):
        for number, member in enumerate(members):
            note(f"run {number + 1} of {len(members)}: {member.name}")
            members[number] = run_member(configs[member.name], member, callbacks=watch(), note=note)
            result = rank(base, folder, members)
            write_json(folder / "sweep.json", {**asdict(result), "output": str(folder), "grid": dict(grid)})
            gc.collect()  # models are in cycles, and the next one wants their memory
    return rank(base, folder, members)


def make_member(make: Make, member: Member, folder: Path, *, place: str) -> RunConfig:
    """Return the config of a run of a grid; raises ConfigError with its name."""
    overrides = [f"{key}={json.dumps(value, default=str)}" for key, value in member.settings.items()]
    try:
        return make(overrides, str(folder / member.name))
    except MlxloraError as error:
        what = re.sub("^--set( |: )", f"{place}: ", error.what)  # overrides of the grid; others are checked before
        raise ConfigError(
            f"{what} (run {member.name})", code=error.code, expected=error.expected, fix=error.fix
        ) from None


def run_member(
    config: RunConfig, member: Member, *, callbacks: Sequence[Callback], note: Callable[[str], None]
) -> Member:
    """Return how a run ended, after training what is left of it."""
    try:
        return ended(config, member, train(config, callbacks=callbacks))
    except Interrupted as error:
        again = f"to go on: {shlex.join(command_line())}"
        raise Interrupted(f"{member.name}: {error.what}", exit_code=error.exit_code, fix=again) from None
    except Exception as error:
        if is_out_of_memory(error) and not isinstance(error, MlxloraError):
            error = OutOfMemory("out of memory", fix="a smaller model, data.max_length or batch")
        if not isinstance(error, MlxloraError):
            raise
        note(f"{member.name} failed, error {error.code}: {error.what}")
        return replace(member, state="failed", code=error.code, exit_code=error.exit_code, error=str(error))


def ended(config: RunConfig, member: Member, result: TrainResult) -> Member:
    """Return a run that has ended, with its metric: that of its result, or its training loss without evaluations."""
    return replace(
        member,
        state="done",
        value=result.evaluation.get(config.evaluation.metric, None if result.evaluation else result.loss),
        updates=result.updates,
        result_update=result.result_update,
        stopped_early=result.stopped_early,
        evaluation=result.evaluation,
    )


def rank(base: RunConfig, folder: Path, members: Sequence[Member]) -> SweepResult:
    """Return the runs in their order: the best first, those without a value last, else as the grid has them."""
    measured = any(member.evaluation for member in members)
    better = base.evaluation.better if measured else "min"
    sign = 1 if better == "min" else -1

    def place(member: Member) -> tuple[bool, float]:
        return member.value is None, sign * (member.value or 0.0)

    return SweepResult(
        folder, base.evaluation.metric if measured else "loss", better, tuple(sorted(members, key=place))
    )
