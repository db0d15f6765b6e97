"""`mlxlora estimate`: a config against this machine and the usual ones, without loading a weight or a framework."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shared.adapters.spec import resolve
from shared.config import RunConfig
from shared.config_file import to_yaml
from shared.data.rows import Row
from shared.data.sources import Weights, epoch_rows, load_rows, num_drawn, weigh
from shared.data.stream import Encoding, Stream, open_stream, streams
from shared.data.tokenize import load_tokenizer, tokenize_rows
from shared.errors import ConfigError, DataError, ModelError, OutOfMemory, StorageError
from shared.estimate.duration import Time, operations, update_time
from shared.estimate.machines import Machine, here, machines, parse_memory
from shared.estimate.memory import Part, num_trained
from shared.estimate.plan import (
    COMFORT,
    Decision,
    Lengths,
    as_line,
    check_fits,
    decide,
    fit_changes,
    longest_length,
    made_lengths,
    most_micro_tokens,
    with_settings,
)
from shared.estimate.shapes import Shape, read_shape
from shared.folder import ModelFolder, find_folder, open_folder
from shared.protocols import Backend
from shared.registry import BACKENDS
from shared.types import Example, Recompute

MOST_ROWS = 1000  # rows that are tokenized: one half at random, the other the longest texts


@dataclass(frozen=True)
class Line:
    """One machine: what the run takes there by itself, and the largest settings that fit."""

    machine: str
    limit_bytes: int
    peak_bytes: int
    fits: bool
    micro_tokens: int
    recompute: Recompute
    longest_max_length: int | None
    largest_micro_tokens: int | None
    changes: dict[str, Any] | None  # that make it fit; {} where nothing must change, None where nothing helps


@dataclass(frozen=True)
class BackendReport:
    """A config on one backend: bytes by part on this machine, and a line for each machine."""

    backend: str
    place: str
    measured: bool
    peak_bytes: int
    moment: str
    recompute: Recompute
    micro_tokens: int
    parts: tuple[Part, ...]
    time: Time
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Report:
    """A config's estimate on one or more backends."""

    model: str
    parameters: int
    trained_parameters: int
    longest_row: int
    rows_known: bool
    backends: tuple[BackendReport, ...]
    notes: tuple[str, ...]


def make_report(config: RunConfig, *, memory: str | None = None, tflops: float | None = None) -> Report:
    """Return the estimate of a config, on its backend or on all; memory: one size instead of the table."""
    base = open_folder(find_folder(config.model))
    shape = read_shape(base)
    lengths, notes = read_lengths(config, base)
    names = list(BACKENDS) if config.backend == "auto" else [config.backend]
    found = tuple(backend_report(name, config, shape, lengths, memory=memory, tflops=tflops) for name in names)
    return Report(
        model=config.model,
        parameters=sum(elements for elements, _ in shape.floats.values())
        + sum(out * wide for name, (out, wide) in shape.info.linears.items() if name in shape.schemes),
        trained_parameters=num_trained(shape, resolve(config.adapter, shape.info)),
        longest_row=lengths.longest,
        rows_known=lengths.known,
        backends=found,
        notes=notes,
    )


def backend_report(
    name: str, config: RunConfig, shape: Shape, lengths: Lengths, *, memory: str | None, tflops: float | None
) -> BackendReport:
    """Return the estimate on one backend."""
    device = None if config.device == "auto" else config.device
    own = parse_memory(memory, backend=name) if memory and memory != "here" else here(name, device=device)
    every = [own] if memory else [own, *machines(name)]
    first = decide(config, shape, lengths, own)
    amount = operations(config, shape, lengths, recompute=first.recompute)
    return BackendReport(
        backend=name,
        place=own.place,
        measured=first.estimate.measured,
        peak_bytes=first.estimate.peak,
        moment=first.estimate.moment,
        recompute=first.recompute,
        micro_tokens=first.micro_tokens,
        parts=first.estimate.parts,
        time=update_time(amount, backend=name, place=own.place, dtype=config.train.dtype, tflops=tflops),
        lines=tuple(machine_line(config, shape, lengths, machine) for machine in every),
    )


def machine_line(config: RunConfig, shape: Shape, lengths: Lengths, machine: Machine) -> Line:
    """Return what a config takes on a machine, and the largest settings that fit there."""
    found = decide(config, shape, lengths, machine)
    return Line(
        machine=machine.name,
        limit_bytes=machine.limit,
        peak_bytes=found.estimate.peak,
        fits=found.fits,
        micro_tokens=found.micro_tokens,
        recompute=found.recompute,
        longest_max_length=longest_length(config, shape, lengths, machine),
        largest_micro_tokens=most_micro_tokens(config, shape, lengths, machine),
        changes={} if found.fits else fit_changes(config, shape, lengths, machine),
    )


def read_lengths(config: RunConfig, base: ModelFolder) -> tuple[Lengths, tuple[str, ...]]:
    """Return the rows' lengths, and notes: where no data is readable, data.max_length stands in and a note says why."""
    try:
        if streams(config):
            return stream_lengths(config, base)
        return whole_lengths(config, base)
    except (DataError, ConfigError, ModelError, StorageError) as error:
        reason = str(error).splitlines()[0]
        return made_lengths(config.data.max_length), (f"data.max_length stands in for the rows: {reason}",)


def whole_lengths(config: RunConfig, base: ModelFolder) -> tuple[Lengths, tuple[str, ...]]:
    """Return the lengths of rows that are read into memory, of some where there are many, and a note of how many."""
    found = load_rows(config.data, valid_too=False)
    weights = weigh(config.data.sources, found.counts)
    fair, others = fair_rows(weights, config, num_rows=len(found.train)), longest_rows(found.train)
    if len(found.train) <= MOST_ROWS and not weights:
        fair, others = list(range(len(found.train))), []
    chosen = [*fair, *(number for number in others if number not in set(fair))]
    options = {"train_on": config.data.train_on, "max_length": config.data.max_length}
    examples = tokenize_rows([found.train[number] for number in chosen], load_tokenizer(base.path), **options)
    return replace(lengths_of(examples), num_fair=len(fair)), note_of(chosen, len(found.train))


def stream_lengths(config: RunConfig, base: ModelFolder) -> tuple[Lengths, tuple[str, ...]]:
    """Return the lengths of some rows of files that are not read into memory, and a note of how many."""
    how = Encoding(load_tokenizer(base.path), config.data.train_on, config.data.max_length, vocabulary=None)
    rows = Stream(open_stream(config.data, valid_too=False).index, how)
    found = rows.rows.found
    fair = fair_rows(weigh(config.data.sources, tuple(found.counts)), config, num_rows=len(rows))
    chosen = [*fair, *(number for number in found.longest if number not in set(fair))]
    examples = [rows[number] for number in chosen]
    return replace(lengths_of(examples), num_fair=len(fair)), note_of(chosen, len(rows))


def fair_rows(weights: Weights, config: RunConfig, *, num_rows: int) -> list[int]:
    """Return the numbers of the rows that the first updates take: a choice at random, by the weights of the sources."""
    drawn = sum(num_drawn(weights)) or num_rows
    return epoch_rows(weights, seed=config.train.seed, epoch=0, num_rows=drawn)[: MOST_ROWS // 2].tolist()


def longest_rows(rows: Sequence[Row]) -> list[int]:
    """Return the numbers of the rows with the longest texts, which decide how much memory a run takes."""
    return heapq.nlargest(MOST_ROWS // 2, range(len(rows)), key=lambda number: len(str(rows[number].fields)))


def note_of(chosen: Sequence[int], num_rows: int) -> tuple[str, ...]:
    """Return a note of how many rows were looked at, none where that is all of them."""
    looked_at = len(set(chosen))
    return () if looked_at == num_rows else (f"lengths of {looked_at} of {num_rows} rows, the longest included",)


def lengths_of(examples: Sequence[Example]) -> Lengths:
    """Return the lengths of tokenized rows."""
    supervised = [int(example.supervised.sum()) for example in examples]
    return Lengths([len(example.tokens) for example in examples], supervised, known=True)


def decide_run(config: RunConfig, base: ModelFolder, examples: Sequence[Example], *, backend: Backend) -> Decision:
    """Return the settings of a run; raises OutOfMemory where it cannot fit, with what would."""
    shape, lengths, machine = read_shape(base), lengths_of(examples), place_of_run(config, backend)
    found = decide(config, shape, lengths, machine)
    check_fits(found, config, shape, lengths, machine)
    return found


def what_fits(config: RunConfig, base: ModelFolder, examples: Sequence[Example], *, backend: Backend) -> str | None:
    """Return the changes that make a run fit whose smallest pieces did not, though the estimate said so; None: none."""
    shape, lengths, machine = read_shape(base), lengths_of(examples), place_of_run(config, backend)
    smallest = decide(with_settings(config, {"train.micro_tokens": 1}), shape, lengths, machine)
    changes = fit_changes(config, shape, lengths, replace(machine, limit=int(COMFORT * smallest.estimate.peak)))
    return as_line(changes) if changes else None


def place_of_run(config: RunConfig, backend: Backend) -> Machine:
    """Return this machine as a run on a backend finds it."""
    return here(backend.name, device="cpu" if config.device == "cpu" else backend.probe().device)


def fit(config: RunConfig, memory: str) -> tuple[RunConfig, dict[str, Any]]:
    """Return a config that fits, and the changes by key; raises OutOfMemory where none is found.

    memory: "here" or a size such as 16GB, of a Mac with MLX and of a GPU with PyTorch.
    """
    if config.backend == "auto":
        raise ConfigError("--fit needs to know the backend", fix="add --backend mlx or --backend torch")
    base = open_folder(find_folder(config.model))
    shape, (lengths, _) = read_shape(base), read_lengths(config, base)
    machine = here(config.backend) if memory == "here" else parse_memory(memory, backend=config.backend)
    changes = fit_changes(config, shape, lengths, machine)
    if changes is None:
        raise OutOfMemory(
            f"{config.model} does not fit into {machine.name}, whatever is changed", fix="a smaller model"
        )
    return with_settings(config, changes), changes


def write_config(config: RunConfig, file: Path) -> None:
    """Write a config as YAML into a new file; raises ConfigError where there is one already, and StorageError."""
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(to_yaml(config))
    except FileExistsError:
        raise ConfigError(f"{file} exists", fix="give --output a new name", code="E205") from None
    except OSError as error:
        raise StorageError(f"cannot write {file}: {error.strerror}", fix="choose another --output") from None
