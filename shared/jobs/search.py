"""The batch size search: real updates with growing micro-batches until the memory's end is near."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from shared.adapters.start import start_values
from shared.config import RunConfig
from shared.data.batch import micro_batches
from shared.data.layout import Layout, choose_layout
from shared.data.stream import sample_of
from shared.errors import OutOfMemory
from shared.estimate.plan import COMFORT
from shared.estimate.report import decide_run
from shared.jobs.prepare import prepare
from shared.jobs.train import load_trainable
from shared.loop import build_update
from shared.optimizers import method_of
from shared.protocols import Trainer
from shared.registry import find_backend
from shared.types import Example, Recompute


@dataclass(frozen=True)
class Tried:
    """One size of micro-batch: real tokens per second of its second update, and the peak so far."""

    micro_tokens: int
    tokens_per_s: float
    peak_bytes: int


@dataclass(frozen=True)
class Search:
    """All sizes that were tried, the fastest of them, and why the search ended."""

    tried: tuple[Tried, ...]
    fastest: int
    stopped: str
    recompute: Recompute


def search_micro_tokens(config: RunConfig, *, tell: Callable[[Tried], None] = lambda tried: None) -> Search:
    """Return what real updates of one micro-batch take, doubling its size; nothing is saved.

    The longest rows come first, so that each size meets its worst case. The search ends where the next size, by the
    growth of the last, would not fit, where memory does run out, or where an update has no more rows.
    """
    prepared, backend = prepare(config), find_backend(config.backend)
    chosen = decide_run(config, prepared.base, sample_of(prepared.train), backend=backend)
    model, spec = load_trainable(prepared, backend, recompute=chosen.recompute)
    if spec.kind != "none":
        model.load_tensors("adapter", start_values(config, spec, model, prepared.base))
    trainer = backend.trainer(model, objective="sft", optimizer=method_of(config))
    how: dict[str, Any] = {"packing": config.data.packing, "padding_side": config.data.padding_side}
    rows = sorted(sample_of(prepared.train), key=lambda example: -len(example.tokens))[: config.train.batch_size]
    tried: list[Tried] = []
    micro, most = len(rows[0].tokens), len(rows) * len(rows[0].tokens)
    while True:
        try:
            layout = choose_layout(model.info, micro_tokens=micro, **how)
            tried.append(try_size(trainer, rows, config, layout=layout, micro_tokens=micro))
        except OutOfMemory:
            stopped = f"out of memory at {micro} tokens"
            break
        tell(tried[-1])
        if micro >= most:
            stopped = f"all {len(rows)} rows of an update are in one micro-batch"
            break
        micro = min(2 * micro, most)
        if expected_peak(tried) > COMFORT * chosen.limit:
            stopped = f"{micro} tokens would not fit"
            break
    if not tried:
        raise OutOfMemory("not even one row fits", fix="lower data.max_length, or set train.recompute: true")
    fastest = max(tried, key=lambda found: found.tokens_per_s).micro_tokens
    return Search(tuple(tried), fastest, stopped, chosen.recompute)


def try_size(
    trainer: Trainer, rows: Sequence[Example], config: RunConfig, *, layout: Layout, micro_tokens: int
) -> Tried:
    """Return the speed and the peak of an update of one full micro-batch; the first of two only warms up."""
    count = max(1, micro_tokens // len(rows[0].tokens))
    batches = micro_batches(rows[:count], layout)
    took = 0.0
    for step in (1, 2):
        began = time.perf_counter()
        trainer.step(batches, build_update(config, step, lr=config.optimizer.lr)).result()
        took = time.perf_counter() - began
    tokens = sum(batch.num_tokens for batch in batches)
    return Tried(micro_tokens, tokens / took, trainer.memory().peak)


def expected_peak(tried: Sequence[Tried]) -> float:
    """Return the peak of twice the last size, by the growth between the last two; memory is linear in positions.

    >>> expected_peak([Tried(512, 1.0, 100), Tried(1024, 1.0, 150)])
    250.0
    """
    last = tried[-1]
    if len(tried) == 1:
        return float(last.peak_bytes)
    before = tried[-2]
    slope = (last.peak_bytes - before.peak_bytes) / (last.micro_tokens - before.micro_tokens)
    return last.peak_bytes + slope * last.micro_tokens
