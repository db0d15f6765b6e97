"""A run in progress: what the loop works with, and where it stands."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from shared.callbacks import Callback, Metrics
from shared.config import RunConfig
from shared.data.batch import Plan
from shared.data.layout import Layout
from shared.evaluating.exams import Exam
from shared.protocols import Model, Pending, Trainer
from shared.signals import StopFlag
from shared.types import AdapterSpec, Example, StepStats


@dataclass
class LoopState:
    """Where a run stands, as state.json keeps it."""

    step: int = 0
    finished: bool = False  # trained to the end and evaluated there
    time_s: float = 0.0
    evaluated_step: int = -1
    metric: str = ""  # what these three are of: "min eval_loss"
    best: float | None = None
    best_step: int = -1  # -1: not known
    evaluations_without_better: int = 0
    skipped_in_a_row: int = 0
    skipped: int = 0
    overflows: int = 0  # updates that float16's loss scale was too large for
    first_loss: float | None = None  # of update 1
    losses: list[float] = field(default_factory=list[float])  # of the last updates, for shared/running/spikes.py
    spike_step: int = 0  # a spike from which to go back to a checkpoint, 0: none
    tokens: int = 0  # these three: since the last logged row
    supervised_tokens: int = 0
    positions: int = 0


@dataclass
class Run:
    """All that the loop works with."""

    config: RunConfig
    folder: Path
    model: Model
    trainer: Trainer
    spec: AdapterSpec
    train: Sequence[Example]
    valid: Sequence[Example]
    plan: Plan
    updates: int
    layout: Layout
    identity: dict[str, Any]  # what a resume must find unchanged
    maker: dict[str, Any]  # backend and versions: what a resume may find changed
    callbacks: Sequence[Callback] = ()
    sets: Mapping[str, Sequence[Example]] = field(default_factory=dict[str, Sequence[Example]])  # beside valid
    exam: Exam | None = None  # prompts to answer at evaluations
    state: LoopState = field(default_factory=LoopState)
    pending: list[tuple[int, Pending[StepStats]]] = field(default_factory=list)
    last: StepStats | None = None
    stop: StopFlag = field(default_factory=StopFlag)
    row_began: float = 0.0
    lr: float = 0.0  # of the last update

    def trained_for(self) -> float:
        """Return the seconds since the row began in which the process did not stand still."""
        self.row_began += self.stop.take_still()
        return time.perf_counter() - self.row_began

    @cached_property
    def metrics(self) -> Metrics:
        """Return the run's metrics file."""
        return Metrics(self.folder / "metrics.jsonl")
