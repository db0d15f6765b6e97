"""The factors behind `mlxlora estimate`: small models, one size doubled after the other, least squares over the peaks.

    python benchmarks/calibrate_memory.py --backend mlx --dtype float32

Prints the entries for shared/estimate/costs.py. All runs share one process: MLX's peak is reset between them; with
torch on a CPU it is the kernel's high-water mark of the resident size (Linux only), glibc being told to map every
allocation from 64 KiB on by itself, so that what is freed is gone.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from memory import STEADY, Case, largest, measure_fresh, recipe, write_model

from shared.adapters.spec import initial_adapter, resolve
from shared.config_file import build_config
from shared.data.batch import micro_batches
from shared.data.layout import choose_layout
from shared.estimate import memory as model
from shared.estimate.costs import NOTHING, Costs, Rows
from shared.estimate.shapes import WORD, Shape, read_shape
from shared.folder import open_folder
from shared.registry import find_backend
from shared.schemes import parse_scheme
from shared.types import AdapterSpec, Example, Method, Update

KINDS = [field.name for field in fields(Rows)]
CHANGES: list[dict[str, Any]] = [
    {}, {"hidden": 512}, {"heads": 8}, {"heads": 8, "key_heads": 8}, {"mlp": 1024}, {"rank": 64}, {"length": 512},
]  # fmt: skip


def main() -> None:
    """Print the entries of a backend and dtype, for LoRA and for full fine-tuning."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("mlx", "torch"), required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--lora-only", action="store_true")
    arguments = parser.parse_args()
    if arguments.backend == "torch" and any(os.environ.get(key) != value for key, value in STEADY.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **STEADY})
    costs: Costs | None = None
    for adapter in ("lora",) if arguments.lora_only else ("lora", "none"):
        rows = 2 if arguments.backend == "mlx" else 8  # MLX counts its bytes; of a process the small noise counts too
        base = Case(arguments.backend, dtype=arguments.dtype, adapter=adapter, rows=rows, supervised=0.02)
        costs = calibrate(replace(base, vocabulary=512), lora=costs)
        key = (f"{arguments.backend}-cpu", arguments.dtype, adapter == "none")
        print(f"    {key!r}: {costs},", flush=True)


def calibrate(base: Case, *, lora: Costs | None) -> Costs:
    """Return the factors that explain the peaks best; lora: those of LoRA, where these are of full fine-tuning."""

    measure(base)  # what the first run leaves behind is none of the others'

    costs = NOTHING
    for recompute, names in ((False, ("kept", "working")), (True, ("kept_inputs", "recomputed"))):
        both = fit_rows([replace(base, recompute=recompute, layers=n, **change) for change in CHANGES for n in (2, 4)])
        costs = replace(costs, **dict(zip(names, both, strict=True)))
    return add_rest(costs, base, lora=lora)


def fit_rows(cases: Sequence[Case]) -> tuple[Rows, Rows]:
    """Return what every layer keeps and what one works with, from the peaks of these cases."""
    rows: list[list[float]] = []
    wanted: list[float] = []
    for case in cases:
        found, shape = measure(case)
        widths, size, work = widths_of(case, shape), model.SIZES[case.dtype], largest(case)
        scale = work.positions * size
        once = [width * scale for width in widths]
        rows.append([*(width * case.layers for width in once), *once])
        wanted.append(found - standing(case, shape))
        shown = ", ".join(f"{kind} {width:g}" for kind, width in zip(KINDS, widths, strict=True))
        print(f"# layers {case.layers}, {shown}: {wanted[-1] / scale:.0f} elements", file=sys.stderr, flush=True)
    weight = 1 / np.array(wanted)
    found = not_negative(np.array(rows) * weight[:, None], np.array(wanted) * weight)
    errors = np.array(rows) @ found / np.array(wanted) - 1
    print(f"# worst misfit {abs(errors).max():.1%}", file=sys.stderr)
    half = len(KINDS)
    kept, working = (Rows(*(round(float(value), 2) for value in part)) for part in (found[:half], found[half:]))
    return kept, working


def widths_of(case: Case, shape: Shape) -> list[float]:
    """Return the widths of a case's rows, in the order of the fields of Rows."""
    spec = spec_of(case, shape)
    widths = model.layer_widths(shape, largest(case), rank=spec.rank * len(spec.modules) / case.layers)
    return [widths[kind] for kind in KINDS]


def standing(case: Case, shape: Shape) -> float:
    """Return the bytes of a case that stand all the time, as the estimate has them."""
    config = build_config(recipe(case, Path("m")))
    return sum(model.standing_bytes(config, shape, spec_of(case, shape), NOTHING).values())


def not_negative(matrix: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the x >= 0 of least |matrix x - wanted|, by dropping the most negative column until none is."""
    active = [n for n in range(matrix.shape[1]) if matrix[:, n].any()]
    while True:
        scale = np.abs(matrix[:, active]).max(axis=0)
        found = np.linalg.lstsq(matrix[:, active] / scale, wanted, rcond=1e-6)[0] / scale
        if found.min() >= -1e-9:
            break
        active.pop(int((found * scale).argmin()))
    result = np.zeros(matrix.shape[1])
    result[active] = found.clip(0)
    return result


def add_rest(costs: Costs, base: Case, *, lora: Costs | None) -> Costs:
    """Return the factors with those of loading, update, decode and loss, each from a run that it dominates."""
    few = replace(base, rows=1, length=32, micro_tokens=32, layers=2)
    big = replace(few, hidden=512, heads=8, key_heads=8, mlp=2048, rank=512)
    table = replace(few, vocabulary=65536, hidden=128, heads=2, key_heads=2, mlp=64)
    loss = replace(table, hidden=64, heads=1, key_heads=1, length=512, micro_tokens=512, supervised=1.0)
    tile = WORD * model.TILE_ELEMENTS[f"{base.backend}-cpu"]
    chunks = replace(loss, **({} if lora else {"targets": "q_proj lm_head"}))
    chunk = replace(chunks, length=model.CHUNK_ROWS, micro_tokens=model.CHUNK_ROWS)
    logits = WORD * model.CHUNK_ROWS * 65536
    packed = replace(big, rank=8, quantization="affine-4bit-g64")

    def rest(case: Case, **options: Any) -> tuple[float, Shape]:
        found, shape = measure(case, **options)
        return found - known_bytes(case, shape, costs, **options), shape

    found, shape = rest(table, load_only=True)
    costs = replace(costs, load=ratio(found, 65536 * shape.width))
    found, shape = rest(big)
    costs = replace(costs, update=ratio(found, WORD * model.num_trained(shape, spec_of(big, shape))))
    if lora is None:
        if base.backend == "torch":
            peak, _, shape = measure_fresh(replace(few, supervised=1.0), plain=False)
            costs = replace(costs, framework=round(peak - known_bytes(few, shape, costs)))
        four, eight = (in_masks(replace(base, layers=layers, dropout=0.1), rest) for layers in (4, 8))
        costs = replace(costs, dropout_kept=ratio(eight - four, 4))
        costs = replace(costs, dropout_working=ratio(four - 4 * costs.dropout_kept, 1))
        found, shape = rest(packed, load_only=True)
        costs = replace(costs, quantizing=ratio(found, big.hidden * big.mlp))
        found, shape = rest(packed)
        costs = replace(costs, decodes=ratio(found, big.hidden * big.mlp * model.SIZES[base.dtype]))
        costs = replace(costs, tiles=ratio(rest(loss)[0], tile), logits=ratio(rest(chunk)[0], logits))
        wide = replace(loss, hidden=1024, vocabulary=4096, length=2048, micro_tokens=2048)  # several rows of tiles
        costs = replace(costs, tile_widths=ratio(rest(wide)[0], WORD * model.TILE_ROWS[base.backend] * wide.hidden))
        return replace(costs, queued=ratio(rest(chunks)[0], logits))
    costs = replace(costs, logits=lora.logits, queued=lora.queued, framework=lora.framework)
    return replace(costs, head=ratio(rest(chunk)[0], logits))


def in_masks(case: Case, rest: Callable[[Case], tuple[float, Shape]]) -> float:
    """Return how many rows of a layer's adapted inputs are not explained yet."""
    found, shape = rest(case)
    dropped = model.dropped_inputs(shape, spec_of(case, shape)) / case.layers
    return found / (largest(case).positions * model.SIZES[case.dtype] * dropped)


def ratio(found: float, unit: float) -> float:
    """Return how often a unit is in what was found, two digits behind the point."""
    return round(max(found, 0) / unit, 2)


def known_bytes(case: Case, shape: Shape, costs: Costs, *, load_only: bool = False) -> float:
    """Return what is explained already: standing bytes and activations, or of a loaded model its weights."""
    config = build_config(recipe(case, Path("m")))
    if load_only:
        return model.weight_bytes(shape, dtype=case.dtype, scheme=model.load_scheme(config, shape))
    running = model.running_bytes(
        config, shape, spec_of(case, shape), largest(case), costs, place=f"{case.backend}-cpu", recompute=case.recompute
    )
    return standing(case, shape) + max(sum(parts.values()) for parts in running.values())


def spec_of(case: Case, shape: Shape) -> AdapterSpec:
    """Return what a case trains."""
    return resolve(build_config(recipe(case, Path("m"))).adapter, shape.info)


def measure(case: Case, *, load_only: bool = False) -> tuple[float, Shape]:
    """Return the bytes at the peak above what was there before, and the model's shape."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_model(folder, case)
        gc.collect()
        before = reset_peak(case.backend)
        run(case, folder, load_only=load_only)
        found = read_peak(case.backend) - before
        gc.collect()
        return found, read_shape(open_folder(folder))


def run(case: Case, folder: Path, *, load_only: bool) -> None:
    """Load a case's model and do two updates of random rows."""
    config = build_config(recipe(case, folder))
    base = find_backend(case.backend).load_model(
        folder, dtype=case.dtype, quantization=parse_scheme(case.quantization), recompute=case.recompute, device="cpu"
    )
    if load_only:
        return
    spec = resolve(config.adapter, base.info)
    base.attach(spec)
    if spec.kind == "lora":
        base.load_tensors("adapter", initial_adapter(spec, base.info.adaptable, seed=0))
    trainer = find_backend(case.backend).trainer(base, objective="sft", optimizer=Method("adamw"))
    random = np.random.default_rng(0)
    examples = [
        Example(
            random.integers(0, case.vocabulary, case.length, dtype=np.int32),
            np.arange(case.length) >= max(1, round(case.length * (1 - case.supervised))), "made",
        )
        for _ in range(case.rows)
    ]  # fmt: skip
    layout = choose_layout(base.info, packing="auto", micro_tokens=case.micro_tokens)
    for step in (1, 2):
        micro = micro_batches(examples, layout)
        update = Update(step, 0, 1e-4, 0.9, 0.999, 1e-8, 0.0, 1.0, True, momentum=0.9, nesterov=False)
        trainer.step(micro, update).result()


def reset_peak(backend: str) -> int:
    """Start a new peak; return the bytes in use now."""
    if backend == "mlx":
        import mlx.core as mx

        mx.clear_cache()
        mx.reset_peak_memory()
        return mx.get_active_memory()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    return status("VmRSS")


def read_peak(backend: str) -> int:
    """Return the bytes at the highest since the reset."""
    if backend == "mlx":
        import mlx.core as mx

        return mx.get_peak_memory()
    return status("VmHWM")


def status(key: str) -> int:
    """Return a size of this process in bytes, as the kernel has it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
