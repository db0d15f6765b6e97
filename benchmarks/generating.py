"""Prompts answered one by one and together: seconds, and whether the tokens are the same.

    python benchmarks/generating.py --model MODEL [--prompts 8] [--tokens 200] [--answer 100] [--backend mlx torch]

Both ways take turns; the first turn, in which things are compiled and allocated, does not count. Medians of wall
seconds, and of CPU seconds, user + system, which bear a busy machine better. Prompts are random ids, answers greedy, in
float32 and without end tokens, so that all have their full length.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import heading, write

from shared.protocols import Model
from shared.registry import BACKENDS, find_backend
from shared.types import Sampling


def main() -> None:
    """Measure, print a line per backend, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=200, help="of a prompt")
    parser.add_argument("--answer", type=int, default=100, help="tokens of an answer")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    results = {name: measure(arguments, name) for name in arguments.backend}
    for name, found in results.items():
        print(f"{name}: same tokens: {found['same_tokens']}")
        for clock in ("wall", "cpu"):
            alone, together = (statistics.median(found[clock][key]) for key in ("alone_s", "together_s"))
            print(f"  {clock}: {alone:.2f} s one by one, {together:.2f} s together, {alone / together:.2f} times")
    sizes = {key: getattr(arguments, key) for key in ("prompts", "tokens", "answer", "runs")}
    around = {"model": arguments.model.name, "threads": os.environ.get("OMP_NUM_THREADS"), "load": os.getloadavg()[0]}
    write(arguments.output, {**heading(arguments.backend), **around, **sizes, "results": results})


def measure(arguments: argparse.Namespace, backend: str) -> dict[str, Any]:
    """Return the median seconds of both ways, all of them, and whether the tokens are the same."""
    model = find_backend(backend).load_model(
        arguments.model, dtype="float32", quantization=None, recompute=False, device=None
    )
    random = np.random.default_rng(0)
    prompts = [random.integers(0, model.info.vocab_size, arguments.tokens).tolist() for _ in range(arguments.prompts)]
    seconds: dict[int, list[tuple[float, float]]] = {1: [], arguments.prompts: []}
    tokens: dict[int, list[list[int]]] = {}
    for turn in range(arguments.runs + 1):
        for size in seconds:
            began = time.perf_counter(), time.process_time()
            tokens[size] = answers(model, prompts, Sampling(arguments.answer, 0.0, 0, (), batch_size=size))
            spent = time.perf_counter() - began[0], time.process_time() - began[1]
            seconds[size] += [spent] if turn else []
    found: dict[str, Any] = {"same_tokens": tokens[1] == tokens[arguments.prompts]}
    for n, clock in enumerate(("wall", "cpu")):
        alone, together = ([round(spent[n], 3) for spent in every] for every in seconds.values())
        ratio = statistics.median(alone) / statistics.median(together)
        found[clock] = {"alone_s": alone, "together_s": together, "alone_over_together": round(ratio, 2)}
    return found


def answers(model: Model, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
    """Return the tokens that follow every prompt."""
    found: list[list[int]] = [[] for _ in prompts]
    for token in model.generate(prompts, sampling):
        found[token.prompt].append(token.token)
    return found


if __name__ == "__main__":
    main()
