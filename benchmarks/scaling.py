"""How cost grows: time and memory of an update against row length, rows, vocabulary, rank and layers.

    python benchmarks/scaling.py --backend both --output benchmarks/results/NAME.json
    python benchmarks/scaling.py --backend torch --only loss,recompute

Every point is measured in a process of its own on a random Llama. Exponents are slopes of log cost against log size,
with their standard errors. Time is processor time on a CPU, where other programs then do not count, and wall time on a
GPU. Memory is what training adds to the loaded model: as MLX counts it, as CUDA's allocator does, or the resident size
of the process where PyTorch computes on a CPU. For the two claims on memory, the C library on Linux is told to give
freed blocks back at once: what it would keep in fragments is no part of the claim. Three claims are checked:

1. time is linear in the number of tokens at fixed length
2. memory of the loss is flat in vocabulary x tokens, beyond the hidden states, their gradient and the head's weight
3. with recompute, memory is flat in layers beyond one row of activations (the layer's input) each
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from common import fit_power, heading, write

from shared.measuring.measure import Effort, ask_updates
from shared.measuring.synthetic import Shape, write_llama
from shared.registry import BACKENDS, find_backend

TOLERANCE = 0.1  # of an exponent
FLOAT = 4  # bytes
LOSS_WIDTH = 32  # narrow, so that hidden states weigh nothing beside logits
SEED = 0
THRESHOLD = "MALLOC_MMAP_THRESHOLD_"  # of glibc, in bytes
BASE = Shape(layers=4, hidden=128, intermediate=384, heads=4, kv_heads=2, vocabulary=2048, tied=False)


@dataclass(frozen=True)
class Point:
    """One update: the model, its rows (all of one length), the adapter's rank, and whether layers run again."""

    shape: Shape = BASE
    rows: int = 8
    length: int = 128
    rank: int = 8
    recompute: bool = False


WIDE = Point(shape=replace(BASE, hidden=256, intermediate=768), rows=8, length=256, rank=1, recompute=True)
AXES: dict[str, tuple[Callable[[int], Point], tuple[int, ...]]] = {
    "length": (lambda n: Point(rows=4, length=n), (128, 256, 512, 1024)),
    "rows": (lambda n: Point(rows=n), (16, 32, 64, 128)),
    "vocabulary": (lambda n: Point(shape=replace(BASE, vocabulary=n)), (4096, 16384, 65536, 131072)),
    "rank": (lambda n: Point(rank=n), (8, 32, 128, 512)),
    "layers": (lambda n: Point(shape=replace(BASE, layers=n)), (2, 4, 8, 16)),
    "recompute": (lambda n: replace(WIDE, shape=replace(WIDE.shape, layers=n)), (2, 4, 8, 16)),  # against layers
}
EFFORTS = {False: Effort(least=3, most=9, time_s=2.0), True: Effort(least=1, most=1, time_s=0.0)}  # by recompute
LOSSES = ((1024, 8192), (2048, 16384), (4096, 32768), (8192, 65536))  # supervised tokens, vocabulary
FEW = {"rows": (2, 4), "recompute": (2, 4)}  # --quick
FEW_LOSSES = ((512, 16384), (1024, 16384))


def main() -> None:
    """Measure, fit, and print exponents and claims."""
    arguments = parse()
    if arguments.loss:
        print(json.dumps(loss_point(**json.loads(arguments.loss))))
        return
    names = list(BACKENDS) if arguments.backend == "both" else [arguments.backend]
    results = {name: measure(name, arguments) for name in names}
    for name, found in results.items():
        print_table(name, found)
    write(arguments.output, {**heading(names), "quick": arguments.quick, "results": results})


def parse() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = (*AXES, "loss")
    parser.add_argument("--backend", choices=(*BACKENDS, "both"), default="both")
    parser.add_argument("--only", default=",".join(known), help=f"of {', '.join(known)}")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--quick", action="store_true", help="two small points of three axes: a test of this script")
    parser.add_argument("--loss", help=argparse.SUPPRESS)  # one point of the loss, in this process
    arguments = parser.parse_args()
    arguments.only = arguments.only.split(",")
    unknown = [name for name in arguments.only if name not in known]
    if unknown:
        parser.error(f"--only: unknown {unknown[0]}; known: {', '.join(known)}")
    return arguments


def measure(backend: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the points, fits and claims of one backend."""
    found: dict[str, Any] = {"clock": "processor" if find_backend(backend).probe().device == "cpu" else "wall"}
    for axis in [name for name in AXES if name in arguments.only and (name in FEW or not arguments.quick)]:
        make, sizes = AXES[axis]
        points = []
        for n in FEW[axis] if arguments.quick else sizes:
            with freed_at_once(make(n).recompute):
                points.append({"size": n, **run_point(backend, make(n), clock=found["clock"])})
            tell(backend, axis, points[-1])
        found[axis] = {"points": points, **fit(points)}
    if "loss" in arguments.only:
        points = []
        for n, v in FEW_LOSSES if arguments.quick else LOSSES:
            with freed_at_once(True):
                points.append({"size": n * v, **ask_loss(backend, tokens=n, vocabulary=v)})
            tell(backend, "loss", points[-1])
        found["loss"] = {"points": points, **fit(points)}
    return {**found, "claims": [asdict(claim) for claim in claims(found)]}


@contextmanager
def freed_at_once(wanted: bool) -> Iterator[None]:
    """Make glibc, in processes started meanwhile, map every large block apart, so that freed ones leave the process.

    It raises its own threshold with every block that is freed, up to 32 MiB, and keeps smaller ones in fragments.
    """
    if wanted:
        os.environ[THRESHOLD] = "65536"
    try:
        yield
    finally:
        os.environ.pop(THRESHOLD, None)


def tell(backend: str, axis: str, point: dict[str, Any]) -> None:
    """Say on stderr that a point is done: a whole run takes minutes."""
    cost = f"{point['time_s']:.3f} s, {point['added_bytes'] / 2**20:.1f} MiB"
    print(f"{backend} {axis} {point['size']}: {cost}", file=sys.stderr, flush=True)


def run_point(backend: str, point: Point, *, clock: str) -> dict[str, Any]:
    """Return time and memory of a point's updates, in a process of its own."""
    rows = {
        "count": point.rows, "median": point.length, "sigma": 0.0, "longest": point.length, "supervised": 0.35,
        "vocabulary": point.shape.vocabulary, "seed": SEED,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        write_llama(Path(folder), point.shape, positions=point.length, seed=SEED)
        config = {
            "folder": folder, "rank": point.rank, "quantization": "none", "dtype": "float32",
            "recompute": point.recompute,
        }  # fmt: skip
        done = ask_updates(backend, config=config, rows=rows, effort=EFFORTS[point.recompute])
    held = done.positions // done.micro_batches * point.shape.hidden * FLOAT * point.shape.layers
    return {
        "time_s": statistics.median(done.cpu_s if clock == "processor" else done.times_s),
        "added_bytes": done.peak_memory_bytes - done.loaded_memory_bytes,
        "layer_inputs_bytes": held,  # one row of activations per layer
        "tokens": done.tokens, "positions": done.positions, "micro_batches": done.micro_batches,
    }  # fmt: skip


def ask_loss(backend: str, *, tokens: int, vocabulary: int) -> dict[str, Any]:
    """Return time and memory of the loss layer alone, in a process of its own."""
    task = json.dumps({"backend": backend, "tokens": tokens, "vocabulary": vocabulary})
    done = subprocess.run([sys.executable, __file__, "--loss", task], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the loss layer on {backend} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def loss_point(*, backend: str, tokens: int, vocabulary: int) -> dict[str, Any]:
    """Return time and memory of loss and gradient of the hidden states, in this process."""
    make = {"mlx": mlx_loss, "torch": torch_loss}[backend]
    find_backend(backend).probe()  # on Linux this is where MLX borrows torch's BLAS
    run, memory, reset = make(tokens, vocabulary)
    before = memory()[0]
    reset()
    began = time.process_time() if find_backend(backend).probe().device == "cpu" else None
    wall = time.perf_counter()
    run()
    took = time.perf_counter() - wall if began is None else time.process_time() - began
    gradient = tokens * LOSS_WIDTH * FLOAT
    return {"tokens": tokens, "vocabulary": vocabulary, "time_s": took, "added_bytes": memory()[1] - before - gradient}


def mlx_loss(tokens: int, vocabulary: int) -> Any:
    """Return (the computation, memory in use and at the highest, a reset of the highest) of the loss on MLX."""
    import mlx.core as mx
    from mlx import nn

    from mlxlora.memory import read_memory
    from mlxlora.objectives import OBJECTIVES, Head
    from shared.families import HeadFacts

    head = Head(nn.Linear(LOSS_WIDTH, vocabulary, bias=False), HeadFacts())
    h_ND = mx.random.normal((tokens, LOSS_WIDTH))
    targets_N, weights_N = mx.arange(tokens) % vocabulary, mx.ones((tokens,))
    mx.eval(head.module.parameters(), h_ND, targets_N, weights_N)

    def run() -> None:
        mx.eval(mx.value_and_grad(lambda h: OBJECTIVES["sft"](h, head, targets_N, weights_N, train_head=False))(h_ND))

    return run, lambda: (read_memory().active, read_memory().peak), mx.reset_peak_memory


def torch_loss(tokens: int, vocabulary: int) -> Any:
    """Return (the computation, memory in use and at the highest, a reset of the highest) of the loss on PyTorch."""
    import torch
    from torch import nn

    from shared.families import HeadFacts
    from torch_backend.memory import read_memory
    from torch_backend.objectives import OBJECTIVES, Head

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = nn.Linear(LOSS_WIDTH, vocabulary, bias=False, device=device).requires_grad_(False)
    head = Head(module, HeadFacts())
    h_ND = torch.randn(tokens, LOSS_WIDTH, device=device, requires_grad=True)
    targets_N, weights_N = torch.arange(tokens, device=device) % vocabulary, torch.ones(tokens, device=device)

    def run(count: int = tokens) -> None:
        loss = OBJECTIVES["sft"](h_ND[:count], head, targets_N[:count], weights_N[:count])
        torch.autograd.grad(loss, h_ND)

    run(1)  # libraries load and threads start with the first matmul
    reset = torch.cuda.reset_peak_memory_stats if device.type == "cuda" else lambda: None
    return run, lambda: (read_memory(device).active, read_memory(device).peak), reset


def fit(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the power laws of time and memory against size."""
    return {cost: law(points, cost) for cost in ("time_s", "added_bytes")}


def law(points: Sequence[dict[str, Any]], cost: str) -> dict[str, Any] | None:
    """Return the power law of a cost against size, None where it does not stand out of the noise."""
    costs = [point[cost] for point in points]
    return asdict(fit_power([point["size"] for point in points], costs)) if min(costs) > 0 else None


@dataclass(frozen=True)
class Claim:
    """A claim on an exponent, and whether it holds."""

    text: str
    exponent: float | None
    standard_error: float | None
    wanted: float
    ok: bool


def claims(found: dict[str, Any]) -> Iterator[Claim]:
    """Yield the claims on what was measured."""
    if "rows" in found:
        yield judge("time is linear in tokens at fixed length", found["rows"]["time_s"], wanted=1.0)
    if "loss" in found:
        yield judge("memory of the loss is flat in vocabulary x tokens", found["loss"]["added_bytes"], wanted=0.0)
    if "recompute" in found:
        beyond = [
            {"size": point["size"], "beyond_bytes": point["added_bytes"] - point["layer_inputs_bytes"]}
            for point in found["recompute"]["points"]
        ]
        text = "memory with recompute is flat in layers beyond one row of activations each"
        yield judge(text, law(beyond, "beyond_bytes"), wanted=0.0)


def judge(text: str, power: dict[str, Any] | None, *, wanted: float) -> Claim:
    """Return a claim: the exponent is as wanted, give or take the tolerance."""
    if power is None:
        return Claim(text, None, None, wanted, ok=False)
    return Claim(text, power["exponent"], power["standard_error"], wanted, abs(power["exponent"] - wanted) <= TOLERANCE)


def print_table(name: str, found: dict[str, Any]) -> None:
    """Print exponents and claims of one backend."""
    print(f"{name} ({found['clock']} time)\n\n| against | sizes | time | added memory |\n|---|---|---|---|")
    for axis in [axis for axis in (*AXES, "loss") if axis in found]:
        sizes = ", ".join(f"{point['size']:,}" for point in found[axis]["points"])
        cells = " | ".join(law_text(found[axis][cost]) for cost in ("time_s", "added_bytes"))
        print(f"| {axis} | {sizes} | {cells} |")
    print()
    for claim in found["claims"]:
        power = law_text(claim if claim["exponent"] is not None else None)
        print(
            f"{'PASS' if claim['ok'] else 'FAIL'}  {claim['text']}: {power}, wanted {claim['wanted']:g} +- {TOLERANCE}"
        )
    print(flush=True)


def law_text(power: dict[str, Any] | None) -> str:
    """Return an exponent with its standard error."""
    if power is None:
        return "not above the noise"
    error = power["standard_error"]
    return f"size^{power['exponent']:.2f}" + (f" +- {error:.2f}" if error is not None else "")


if __name__ == "__main__":
    main()
