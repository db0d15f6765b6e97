"""`quickstart`: the main job end to end on the embedded demo base, in under three minutes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.callbacks import Callback
from shared.config_file import build_config
from shared.data.rows import Row, read_rows
from shared.evaluating.exams import Graded, mean_scores
from shared.jobs.train import train
from shared.registry import BACKENDS, find_backend, resolve
from shared.sessions import Session, answer_rows, open_session

RECIPE: dict[str, Any] = {
    "adapter": {"rank": 8, "alpha": 16},
    "optimizer": {"lr": 1e-2},
    "schedule": {"warmup": 0.05},
    "train": {"batch_size": 16, "updates": 200, "dtype": "float32"},
    "evaluation": {"every": 100},
    "log": {"every": 10},
}
MAX_TOKENS = 32
SHOWN = 3
OTHER_ROWS = 20


@dataclass(frozen=True)
class QuickstartResult:
    """Exact match on held-out rows before and after, samples, and whether the other backend agrees."""

    backend: str
    adapter: str
    before: float
    after: float
    rows: int
    samples: tuple[tuple[str, str, str, str], ...]  # prompt, wanted, before, after
    other_backend: str | None
    other_after: float | None
    agreement: float | None  # share of greedy texts that are the same on both backends
    time_s: float


def quickstart(
    demo: Path,
    output: Path,
    *,
    backend: str = "auto",
    callbacks: Sequence[Callback] = (),
    note: Callable[[str], None] = print,
) -> QuickstartResult:
    """Fine-tune the demo base and return what changed; demo: folder with base/ and task/."""
    base, task = str(demo / "base"), demo / "task"
    rows = read_rows(task / "test.jsonl")
    engine = find_backend(backend)
    note(f"asking the base {len(rows)} held-out questions on {engine.name} ({engine.probe().reason})")
    first = exam(open_session(base, adapter=None, backend=engine.name), rows)
    config = build_config(
        {**RECIPE, "model": base, "data": {"path": str(task)}, "backend": engine.name, "output": str(output)}
    )
    result = train(config, resume="never", callbacks=callbacks)
    adapter = str(result.adapter)
    note("asking again, with the adapter")
    second = exam(open_session(base, adapter=adapter, backend=engine.name), rows)
    other = other_backend(engine.name)
    other_after = agreement = None
    if other:
        note(f"loading the same adapter on {other}")
        third = exam(open_session(base, adapter=adapter, backend=other), rows[:OTHER_ROWS])
        other_after = share_exact(third)
        agreement = sum(a.got == b.got for a, b in zip(second, third, strict=False)) / len(third)
    pairs = zip(rows[:SHOWN], first, second, strict=False)
    samples = tuple((row.fields["prompt"], a.wanted, a.got, b.got) for row, a, b in pairs)
    return QuickstartResult(
        backend=engine.name, adapter=adapter, before=share_exact(first), after=share_exact(second),
        rows=len(rows), samples=samples, other_backend=other, other_after=other_after, agreement=agreement,
        time_s=result.time_s,
    )  # fmt: skip


def exam(session: Session, rows: list[Row]) -> list[Graded]:
    """Return the greedy answers to all rows."""
    return answer_rows(session, rows, number=len(rows), max_tokens=MAX_TOKENS)


def share_exact(answers: Sequence[Graded]) -> float:
    """Return the share of answers that are the wanted text."""
    return mean_scores(answers)["exact_match"]


def other_backend(name: str) -> str | None:
    """Return the other backend's name where it is available."""
    others = (key for key in BACKENDS if key != name)
    return next((key for key in others if resolve(BACKENDS, key, "backend")().probe().available), None)


def report(result: QuickstartResult) -> str:
    """Return what a newcomer should read at the end."""
    lines = [
        f"held-out exact match: {result.before:.0%} before, {result.after:.0%} after "
        f"({result.rows} rows, trained in {result.time_s:.0f} s on {result.backend})"
    ]
    for prompt, wanted, before, after in result.samples:
        lines += [
            "",
            f"  prompt  {' / '.join(prompt.splitlines())}",
            f"  before  {one_line(before)}",
            f"  after   {one_line(after)}",
        ]
        lines += [] if after == wanted else [f"  wanted  {wanted}"]
    if result.other_backend:
        lines += [
            "",
            f"the same adapter on {result.other_backend}: {result.agreement:.0%} of the texts identical, "
            f"exact match {result.other_after:.0%}",
        ]
    else:
        lines += ["", "the other backend is not installed here; the adapter would load there as it is"]
    return "\n".join([*lines, "", *next_steps(result)])


def one_line(text: str) -> str:
    """Return a text on one line, at most 70 characters."""
    flat = " / ".join(text.split("\n"))
    return flat if len(flat) <= 70 else flat[:67] + "..."


def next_steps(result: QuickstartResult) -> list[str]:
    """Return the commands to go on with."""
    return [
        "what next:",
        f"  the run       {Path(result.adapter).parent} holds adapter/, which PEFT and mlx-lm load as it is",
        "  your data     mlxlora train --model PATH_OR_HUB_ID --data FOLDER_WITH_train.jsonl",
        "  both backends mlxlora parity CONFIG.yaml",
        "  this machine  mlxlora doctor",
    ]
