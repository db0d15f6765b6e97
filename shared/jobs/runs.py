"""Run folders side by side: what there is, what one of them did, and whether one is better than another."""

from __future__ import annotations

import fcntl
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from shared.callbacks import Metrics
from shared.config import DataConfig
from shared.config_file import build_config
from shared.data.layout import choose_layout
from shared.data.rows import find_data, find_split
from shared.data.tokenize import tokenize_rows
from shared.errors import CheckpointError, ConfigError, StorageError, did_you_mean
from shared.evaluating.held_out import fitting
from shared.evaluating.loss import evaluate_each
from shared.running import checkpoint
from shared.running.lock import FILE as LOCK
from shared.sessions import find_rows, open_session
from shared.types import Example
from shared.watching.charts import Point, chart, noisy, points
from shared.watching.report import flatten, page, read_manifest, read_settings, write_page
from shared.watching.words import escape

RUNS = Path("runs")  # where runs are that are called by their names
BARS = "▁▂▃▄▅▆▇█"
WIDTH = 48  # of a curve in text
RESAMPLES = 2000
CURVES = {"loss": "loss", "valid": "eval_loss"}  # as text: name -> key of metrics.jsonl
LEVEL = 0.95
FORMS = {1000: ",.0f", 100: ".1f", 0.1: ".4f", 0: ".4g"}  # of numbers from a size on
FACTS = ("state", "step", "updates", "backend", "model", "created")  # of both runs, on the page
Rows = Sequence[Mapping[str, Any]]
PLACES = ("output", "backend", "device", "log", "checkpoint")  # settings that decide nothing about the result
FINAL = {  # of the comparison: name -> key of metrics.jsonl, which of its values, and whether less is better
    "training loss": ("loss", "last"),
    "validation loss": ("eval_loss", "last"),
    "best validation loss": ("eval_loss", "min"),
    "tokens per second": ("tokens_per_s", "median"),
    "peak memory, MiB": ("peak_memory_bytes", "max"),
    "training time, s": ("time_s", "last"),
}


@dataclass(frozen=True)
class RunFacts:
    """One run: where it is, how far it came, and its last losses (nats per supervised token)."""

    name: str
    path: Path
    state: str  # done, diverged, running, stopped, damaged (the manifest)
    step: int
    updates: int
    loss: float | None
    eval_loss: float | None
    model: str
    backend: str
    created: str


@dataclass(frozen=True)
class RunDetails:
    """One run in full."""

    facts: RunFacts
    settings: dict[str, Any]  # that are not the default
    final: dict[str, float | None]
    curves: dict[str, str]  # by name, as text
    checkpoints: tuple[str, ...]
    command: tuple[str, ...]


@dataclass(frozen=True)
class Paired:
    """Loss of b less loss of a on the same rows, nats per supervised token; negative: b is better."""

    rows: int
    loss_a: float
    loss_b: float
    difference: float
    low: float  # the interval that holds the difference with `level`, resampling rows
    high: float
    level: float

    @property
    def verdict(self) -> str:
        """Return in words whether the difference is more than chance."""
        if self.low <= 0 <= self.high:
            return "no difference beyond chance"
        return "b is better" if self.high < 0 else "a is better"


@dataclass(frozen=True)
class Comparison:
    """Two runs: settings and data that differ, last numbers of both, curves as text, and rows evaluated with both."""

    a: RunFacts
    b: RunFacts
    settings: dict[str, tuple[Any, Any]]
    final: dict[str, tuple[float | None, float | None]]
    curves: dict[str, tuple[str, str]]
    paired: Paired | None


def list_runs(folder: Path) -> list[RunFacts]:
    """Return the runs in a folder, the newest last; raises ConfigError where there is no such folder."""
    if not folder.is_dir():
        raise ConfigError(f"no folder at {folder}", expected="the folder that holds run folders, mostly runs")
    found = [read_run(path.parent) for path in folder.glob("*/manifest.json")]
    return sorted(found, key=lambda run: (run.created, run.name))


def read_run(folder: Path) -> RunFacts:
    """Return the facts of a run folder; raises CheckpointError where it is none."""
    if not is_listed(folder):
        names = {path.parent.name for place in (folder.parent, RUNS) for path in place.glob("*/manifest.json")}
        near = names - {str(folder)}
        hint = did_you_mean(folder.name, near) if near else "mlxlora runs ls DIR lists runs"
        raise CheckpointError(
            f"{folder} is not the folder of a run", expected="manifest.json in it", fix=hint, code="E323"
        )
    rows, manifest = Metrics(folder / "metrics.jsonl").read(), read_manifest(folder / "manifest.json")
    updates, state = manifest.get("updates"), state_of(folder, manifest)
    return RunFacts(
        name=folder.resolve().name,
        path=folder,
        state=state,
        step=step_of_run(folder, manifest, rows, running=state == "running"),
        updates=updates if isinstance(updates, int) else 0,
        loss=last(rows, "loss"),
        eval_loss=last(rows, "eval_loss"),
        **{key: str(manifest.get(key, "")) for key in ("model", "backend", "created")},
    )


def is_listed(folder: Path) -> bool:
    """Return whether a folder is shown as a run: whether it has a manifest."""
    return (folder / "manifest.json").is_file()


def step_of_run(folder: Path, manifest: Mapping[str, Any], rows: Rows, *, running: bool) -> int:
    """Return the last update of a run that is saved, else logged; of one that is running, the later one."""
    result, logged = manifest.get("result.last_update"), max((row["step"] for row in rows), default=0)
    saved = [checkpoint.step_of(path) for path in checkpoint.step_dirs(folder / "checkpoints")]
    saved += [result] if isinstance(result, int) else []
    return max([logged, *saved]) if running or not saved else max(saved)


def state_of(folder: Path, manifest: Mapping[str, Any]) -> str:
    """Return where a run stands; one whose result is of before it diverged is done."""
    if is_held(folder):
        return "running"
    if not isinstance(manifest.get("updates"), int):
        return "damaged"
    if not (folder / "report.html").is_file():
        return "stopped"
    is_last = manifest.get("result.update") == manifest.get("result.last_update")
    return "diverged" if manifest.get("result.diverged") and is_last else "done"


def find_run(folder: Path) -> Path:
    """Return a run folder, or where there is none, that of its name in runs/."""
    named = RUNS / folder
    return named if not is_listed(folder) and is_listed(named) else folder


def is_held(folder: Path) -> bool:
    """Return whether a process trains in a run folder."""
    try:
        with (folder / LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def last(rows: Rows, key: str) -> float | None:
    """Return the last finite value of a key."""
    found = points(rows, key)
    return found[-1][1] if found else None


def describe(folder: Path, *, html: Path | None = None) -> RunDetails:
    """Return one run in full; html: a page to write it to, as far as the run has come."""
    folder = find_run(folder)
    if html is not None:
        write_report_of(folder, html)
    facts, rows = read_run(folder), Metrics(folder / "metrics.jsonl").read()
    defaults = flatten(build_config({"model": "-", "data": {"path": "-"}}).model_dump(mode="json"))
    found = read_manifest(folder / "manifest.json").get("command")
    return RunDetails(
        facts=facts,
        settings={k: v for k, v in read_settings(folder).items() if k not in defaults or defaults[k] != v},
        final=final_numbers(rows),
        curves={name: text for name, key in CURVES.items() if (text := sparkline(rows, key))},
        checkpoints=tuple(sorted(path.name for path in (folder / "checkpoints").glob("step-*"))),
        command=tuple(map(str, found)) if isinstance(found, list) else (),
    )


def write_report_of(folder: Path, file: Path) -> None:
    """Write the report of a run that may be running, or have stopped, without samples; raises StorageError."""
    state = read_run(folder).state
    write_page(folder, file, samples=(), end="stopped early" if state in ("done", "diverged") else state)


def final_numbers(rows: Rows) -> dict[str, float | None]:
    """Return the numbers that sum a run up, None where there is none."""
    take: dict[str, Callable[[list[float]], float]] = {
        "last": lambda ys: ys[-1], "min": min, "max": max, "median": lambda ys: float(np.median(ys)),
    }  # fmt: skip
    found: dict[str, float | None] = {}
    for name, (key, which) in FINAL.items():
        ys = [y for _, y in points(rows, key, scale=2.0**20 if "bytes" in key else 1.0)]
        found[name] = take[which](ys) if ys else None
    return found


def sparkline(rows: Rows, key: str) -> str:
    """Return a curve as bars of equal steps, from its lowest to its highest value; empty without two points.

    >>> sparkline([{"step": n, "loss": 4.0 - n} for n in range(4)], "loss")
    '█▆▃▁'
    """
    return sparklines([rows], key)[0]


def sparklines(runs: Sequence[Rows], key: str) -> list[str]:
    """Return curves as bars on one scale, so that the same height and the same place mean the same for all.

    >>> falling = [{"step": n, "loss": 4.0 - n} for n in range(4)]
    >>> sparklines([falling, [{"step": n, "loss": 2.0} for n in range(2)]], "loss")
    ['█▆▃▁', '▃▃']
    """
    curves = [points(rows, key) for rows in runs]
    known = [point for curve in curves if len(curve) > 1 for point in curve]
    if not known:
        return ["" for _ in curves]
    first, end = min(x for x, _ in known), max(x for x, _ in known)
    width = min(WIDTH, max(map(len, curves)))
    heights = [means(curve, first=first, end=end, width=width) if len(curve) > 1 else [] for curve in curves]
    low, high = min(min(ys) for ys in heights if ys), max(max(ys) for ys in heights if ys)
    return ["".join(BARS[round((y - low) / ((high - low) or 1.0) * (len(BARS) - 1))] for y in ys) for ys in heights]


def means(curve: Sequence[Point], *, first: float, end: float, width: int) -> list[float]:
    """Return the mean of the values in each of `width` equal parts of the steps, up to the curve's last one.

    A part without values has that of the one before.
    """
    places = [min(int((x - first) / ((end - first) or 1.0) * width), width - 1) for x, _ in curve]
    groups: dict[int, list[float]] = {}
    for place, (_, y) in zip(places, curve, strict=True):
        groups.setdefault(place, []).append(y)
    found: list[float] = []
    for place in range(places[-1] + 1):
        found.append(fmean(groups[place]) if place in groups else (found[-1] if found else curve[0][1]))
    return found


def compare(one: Path, two: Path, *, data: str | None = None, html: Path | None = None, **options: Any) -> Comparison:
    """Return what two runs have different, and with `data` whether one adapter is better on its rows.

    html: a page to write it to. options: backend, note.
    """
    one, two = find_run(one), find_run(two)
    a, b = read_run(one), read_run(two)
    rows = [Metrics(folder / "metrics.jsonl").read() for folder in (one, two)]
    ours, theirs = read_settings(one), read_settings(two)
    keys = [key for key in {**ours, **theirs} if key.split(".")[0] not in PLACES and ours.get(key) != theirs.get(key)]
    numbers = [final_numbers(found) for found in rows]
    found = Comparison(
        a=a,
        b=b,
        settings={key: (ours.get(key), theirs.get(key)) for key in keys},
        final={name: (numbers[0][name], numbers[1][name]) for name in FINAL},
        curves={name: (lines[0], lines[1]) for name, key in CURVES.items() if (lines := sparklines(rows, key))},
        paired=None if data is None else evaluate_both(a, b, data=data, **options),
    )  # fmt: skip
    if html is not None:
        write_comparison(found, rows, html)
    return found


def evaluate_both(
    a: RunFacts, b: RunFacts, *, data: str, backend: str = "auto", note: Callable[[str], None] = lambda text: None
) -> Paired:
    """Return the losses of two runs' results on the same rows, one model after the other; raises MlxloraError."""
    file = find_split(find_data(data))[0]
    columns = read_settings(a.path).get("data.columns") or {}
    rows, _ = find_rows(data, columns=fitting(DataConfig(path=data, columns=columns), file).columns)
    losses: list[np.ndarray] = []
    weights: list[np.ndarray] = []
    for run in (a, b):
        settings = read_settings(run.path)
        adapter = run.path / "adapter"
        if not adapter.is_dir() and not (run.path / "model").is_dir():
            raise CheckpointError(
                f"{run.path} has no adapter yet", fix="let the run end: the same command goes on", code="E323"
            )
        base = str(settings.get("model", run.model)) if adapter.is_dir() else str(run.path / "model")
        session = open_session(base, adapter=str(adapter) if adapter.is_dir() else None, backend=backend, note=note)
        options = {"max_length": settings["data.max_length"], "train_on": settings["data.train_on"]}
        examples: list[Example] = tokenize_rows(rows, session.tokenizer, **options)
        layout = choose_layout(session.model.info, packing="auto", micro_tokens=None)
        losses_E, weights_E = evaluate_each(session.model, examples, layout)
        losses, weights = [*losses, losses_E], [*weights, weights_E]
    if not np.array_equal(weights[0], weights[1]):
        raise ConfigError(
            "the two runs count other tokens of these rows, so their losses cannot be compared",
            fix="compare runs of one tokenizer, data.max_length and data.train_on",
        )
    return paired_bootstrap(losses[0], losses[1], weights[0])


def paired_bootstrap(a_E: np.ndarray, b_E: np.ndarray, weights_E: np.ndarray, *, seed: int = 0) -> Paired:
    """Return the difference of two token-weighted losses and its interval from resampled rows.

    a_E, b_E: sums of nats per row; weights_E: tokens. Percentile bootstrap (Efron and Tibshirani 1993, 13.3).
    """
    random, rows = np.random.default_rng(seed), len(a_E)
    differences = np.empty(RESAMPLES)
    for n in range(RESAMPLES):
        drawn = random.integers(0, rows, rows)
        differences[n] = (b_E[drawn] - a_E[drawn]).sum() / weights_E[drawn].sum()
    low, high = np.quantile(differences, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    weight = float(weights_E.sum())
    one, two = float(a_E.sum()) / weight, float(b_E.sum()) / weight
    return Paired(rows, one, two, two - one, float(low), float(high), LEVEL)


def write_comparison(found: Comparison, rows: Sequence[Rows], file: Path) -> None:
    """Write a comparison as one page without scripts; raises StorageError."""
    title = f"{found.a.name} (a) and {found.b.name} (b)"
    try:
        file.write_text(page(title, {}, body="".join(page_parts(found, rows))), encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write {file}: {error.strerror}", fix="choose another --html") from None


def page_parts(found: Comparison, rows: Sequence[Rows]) -> Iterator[str]:
    """Yield the parts of the page: verdict, curves of both in one chart, tables."""
    if found.paired:
        yield f'<p class="card">{escape(paired_line(found.paired))}</p>'
    steps = max(found.a.step, found.b.step)
    charts = []
    for title, key in (("Training loss", "loss"), ("Validation loss", "eval_loss"), ("Speed", "tokens_per_s")):
        lines = [line for name, part in zip("ab", rows, strict=True) for line in noisy(part, key, name, style=name)]
        unit = "tokens per second" if title == "Speed" else "nats per supervised token"
        charts.append(chart(title, unit, *lines, last_step=steps, from_zero=title == "Speed"))
    yield f'<h2>Curves</h2><div class="grid">{"".join(charts)}</div>'
    yield table("Last numbers", found.final)
    yield table("Settings that differ", found.settings)
    yield table("Runs", {name: (getattr(found.a, name), getattr(found.b, name)) for name in FACTS})


def table(title: str, pairs: Mapping[str, tuple[Any, Any]]) -> str:
    """Return a table of both runs, empty where there is nothing in it."""
    lines = [
        f"<tr><th>{escape(name)}</th><td>{escape(number_text(x))}</td><td>{escape(number_text(y))}</td></tr>"
        for name, (x, y) in pairs.items()
    ]
    head = "<tr><th></th><td>a</td><td>b</td></tr>"
    return f'<h2>{title}</h2><div class="card"><table>{head}{"".join(lines)}</table></div>' if lines else ""


def paired_line(paired: Paired) -> str:
    """Return the outcome of a paired evaluation in one line."""
    return (
        f"on {paired.rows} rows: loss {paired.loss_a:.4f} (a), {paired.loss_b:.4f} (b); "
        f"b - a = {paired.difference:+.4f}, "
        f"{paired.level:.0%} of resamples in [{paired.low:+.4f}, {paired.high:+.4f}]: {paired.verdict}"
    )


def number_text(value: Any) -> str:
    """Return a value for people.

    >>> number_text(None), number_text(1234.5), number_text(416.43), number_text(2.0), number_text(3e-3)
    ('-', '1,234', '416.4', '2.0000', '0.003')
    """
    if value is None:
        return "-"
    if isinstance(value, float) and math.isfinite(value):
        form = next(form for limit, form in FORMS.items() if abs(value) >= limit)
        return f"{value:{form}}"
    return str(value)
