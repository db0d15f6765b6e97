"""`mlxlora estimate` against the real peaks of `mlxlora train`, each in a fresh process.

    python benchmarks/memory.py --output benchmarks/results/NAME.json

Prints the table "estimated and measured". Models have random weights and the tokenizer of the embedded demo base. Where
the errors have grown, benchmarks/calibrate_memory.py makes new factors.

Peaks: MLX by `mx.get_peak_memory`, torch on CUDA by `max_memory_allocated`, torch on a CPU by the process's largest
resident size, imports included. To steady the last, glibc gets one arena and a fixed threshold from which an allocation
is mapped by itself and so given back when freed (MALLOC_ARENA_MAX=1, MALLOC_MMAP_THRESHOLD_=65536): by default the
threshold grows with what was freed, and freed memory stays in the heap. `--plain` measures without that.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from mlxlora import DEMO
from shared.callbacks import Metrics
from shared.config import RunConfig
from shared.config_file import build_config
from shared.estimate import memory as model
from shared.estimate.machines import here
from shared.estimate.shapes import Shape, read_shape
from shared.folder import open_folder

MIB = 2**20
STEADY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Case:
    """One measurement: a model's sizes and a run's settings."""

    backend: str
    hidden: int = 256
    heads: int = 4
    key_heads: int = 4
    head_size: int = 64
    mlp: int = 512
    layers: int = 2
    vocabulary: int = 2048
    length: int = 256
    micro_tokens: int = 2048
    rows: int = 8
    supervised: float = 1.0  # share of a row's tokens
    rank: int = 8
    dropout: float = 0.0
    targets: str = "all-linear"
    adapter: str = "lora"
    recompute: bool = False
    quantization: str = "none"
    dtype: str = "float32"
    tied: bool = False


def main() -> None:
    """Run what was asked for."""
    arguments = parse()
    if arguments.child:
        child(json.loads(arguments.child))
        return
    backends = [arguments.backend] if arguments.backend else ["mlx", "torch"]
    chosen = [case for case in CASES if case.backend in backends]
    compare(arguments, chosen[:: arguments.every])


def parse() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("mlx", "torch"))
    parser.add_argument("--every", type=int, default=1, help="measure every n-th case only")
    parser.add_argument("--plain", action="store_true", help="leave glibc's settings alone")
    parser.add_argument("--output", type=Path, help="JSON of all results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def child(task: dict[str, Any]) -> None:
    """Write a model (task "write"), or train three updates and print the peak in bytes (task "train")."""
    if task["do"] == "write":
        write_model(Path(task["folder"]), Case(**task["case"]))
        return
    import mlxlora

    result = mlxlora.train(build_config(task["config"]))
    rows = Metrics(result.output / "metrics.jsonl").read()
    print("\n" + json.dumps({"peak": rows[-1]["peak_memory_bytes"]}))


def write_model(folder: Path, case: Case) -> None:
    """Write a Llama with random weights, a tokenizer, and rows that are cut at the case's length."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    config = LlamaConfig(
        hidden_size=case.hidden, intermediate_size=case.mlp, num_hidden_layers=case.layers, head_dim=case.head_size,
        num_attention_heads=case.heads, num_key_value_heads=case.key_heads, vocab_size=case.vocabulary,
        max_position_embeddings=8192, tie_word_embeddings=case.tied, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(getattr(torch, case.dtype)).save_pretrained(folder)
    for name in TOKENIZER:
        (folder / name).write_bytes((DEMO / "base" / name).read_bytes())
    write_rows(folder, case)


def write_rows(folder: Path, case: Case) -> None:
    """Write rows that are longer than the case's length in tokens, so that all are cut there."""
    from tokenizers import Tokenizer

    words = np.random.default_rng(0).choice(["cat", "tree", "sun", "house", "big", "ran"], (case.rows, case.length))
    per_word = len(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(" ".join(words[0])).ids) / case.length
    prompt = int(case.length * (1 - case.supervised) / per_word)
    rows: list[dict[str, str]] = [{"text": " ".join(row)} for row in words]
    if case.supervised < 1.0:
        rows = [{"prompt": " ".join(row[:prompt]), "completion": " " + " ".join(row[prompt:])} for row in words]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def recipe(case: Case, folder: Path) -> dict[str, Any]:
    """Return the config of a case: three updates over the same rows."""
    return {
        "model": str(folder), "quantization": case.quantization,
        "data": {"path": str(folder / "train.jsonl"), "max_length": case.length},
        "adapter": {
            "type": case.adapter, "rank": case.rank, "dropout": case.dropout,
            "targets": case.targets if case.targets == "all-linear" else case.targets.split(),
        },
        "train": {
            "batch_size": case.rows, "updates": 3, "micro_tokens": case.micro_tokens, "dtype": case.dtype,
            "recompute": case.recompute,
        },
        "evaluation": {"every": None}, "checkpoint": {"every": None}, "log": {"every": 1},
        "backend": case.backend, "output": str(folder / "run"),
    }  # fmt: skip


def measure_fresh(case: Case, *, plain: bool) -> tuple[int, RunConfig, Shape]:
    """Return the peak of a case in bytes, its config, and the shape of its model."""
    environment = {**os.environ, **({} if plain else STEADY), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        run_child({"do": "write", "folder": place, "case": asdict(case)}, environment)
        values = recipe(case, folder)
        answer = run_child({"do": "train", "config": values}, environment)
        return json.loads(answer.splitlines()[-1])["peak"], build_config(values), read_shape(open_folder(folder))


def run_child(task: dict[str, Any], environment: dict[str, str]) -> str:
    """Return what a fresh process prints; this one stays small, as a child inherits its parent's largest size."""
    command = [sys.executable, __file__, "--child", json.dumps(task)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{task}\n{done.stderr[-3000:]}")
    return done.stdout


def largest(case: Case) -> model.Work:
    """Return the largest micro-batch of a case; all its rows have the same length."""
    rows = min(case.rows, max(1, case.micro_tokens // case.length))
    positions = rows * case.length
    return model.Work(positions, case.length, round(positions * case.supervised), -(-case.rows // rows))


def compare(arguments: argparse.Namespace, cases: Sequence[Case]) -> None:
    """Measure the cases and print the table; write all of it as JSON where asked."""
    results = []
    print("| case | backend | parameters | estimated | measured | error |\n|---|---|---|---|---|---|")
    for case in cases:
        peak, config, shape = measure_fresh(case, plain=arguments.plain)
        place = here(case.backend).place
        found = model.estimate(config, shape, largest(case), place=place, recompute=case.recompute)
        error = found.peak / peak - 1
        count = sum(elements for elements, _ in shape.floats.values())
        print(
            f"| {describe(case)} | {case.backend} | {count / 1e6:.1f} M "
            f"| {found.peak / MIB:.0f} MiB | {peak / MIB:.0f} MiB | {error:+.1%} |",
            flush=True,
        )
        parts = {part.name: part.bytes for part in found.parts}
        results.append({
            "case": asdict(case), "place": place, "parameters": count, "estimated": found.peak, "measured": peak,
            "error": round(error, 4), "moment": found.moment, "parts": parts,
        })  # fmt: skip
    worst = max(abs(result["error"]) for result in results)
    print(f"\nworst error {worst:.1%} of {len(results)} cases")
    if arguments.output:
        arguments.output.write_text(json.dumps({**facts(arguments), "results": results}, indent=1) + "\n")


def describe(case: Case) -> str:
    """Return what sets a case apart, in words."""
    kind = "full fine-tuning" if case.adapter == "none" else f"LoRA rank {case.rank}"
    words = [f"{case.layers} x {case.hidden}", kind, f"{case.micro_tokens} x {case.length} tokens", case.dtype]
    words += [case.quantization] if case.quantization != "none" else []
    words += ["recompute"] if case.recompute else []
    words += [f"dropout {case.dropout}"] if case.dropout else []
    words += [f"vocabulary {case.vocabulary}"] if case.vocabulary > 10_000 else []
    words += [f"targets {case.targets}"] if case.targets != "all-linear" else []
    return ", ".join(words)


def facts(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return date, machine, versions and how memory was steadied."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("mlx", "mlx-lm", "torch", "transformers", "numpy")},
        "command": "python benchmarks/memory.py " + " ".join(sys.argv[1:]),
        "glibc": {} if arguments.plain else STEADY,
    }


SMALL = {"hidden": 256, "heads": 4, "key_heads": 2, "mlp": 1024, "layers": 4, "vocabulary": 8192}  # 8 M weights
MIDDLE = {"hidden": 512, "heads": 8, "key_heads": 4, "mlp": 1408, "layers": 8, "vocabulary": 16384}  # 40 M
LARGE = {"hidden": 768, "heads": 12, "key_heads": 4, "mlp": 2048, "layers": 10, "vocabulary": 32768}  # 112 M
SETTINGS: list[dict[str, Any]] = [
    {**SMALL, "length": 256, "micro_tokens": 2048, "rows": 8},
    {**SMALL, "length": 1024, "micro_tokens": 1024, "rows": 2, "rank": 64},
    {**SMALL, "length": 512, "micro_tokens": 2048, "rows": 4, "recompute": True},
    {**SMALL, "length": 256, "micro_tokens": 512, "rows": 4, "adapter": "none"},
    {**SMALL, "length": 256, "micro_tokens": 1024, "rows": 4, "dropout": 0.1},
    {**SMALL, "length": 256, "micro_tokens": 1024, "rows": 4, "targets": "q_proj v_proj"},
    {**SMALL, "length": 256, "micro_tokens": 1024, "rows": 4, "dtype": "bfloat16"},
    {**MIDDLE, "length": 512, "micro_tokens": 1024, "rows": 2, "supervised": 0.5},
    {**MIDDLE, "length": 512, "micro_tokens": 1024, "rows": 2, "quantization": "affine-4bit-g64"},
    {**MIDDLE, "length": 128, "micro_tokens": 512, "rows": 4, "adapter": "none"},
    {**MIDDLE, "length": 256, "micro_tokens": 1024, "rows": 4, "recompute": True, "rank": 16},
    {**LARGE, "length": 256, "micro_tokens": 512, "rows": 2},
    {**LARGE, "length": 256, "micro_tokens": 256, "rows": 1, "quantization": "affine-4bit-g64", "recompute": True},
]
CASES = [Case(backend, **settings) for backend in ("mlx", "torch") for settings in SETTINGS]

if __name__ == "__main__":
    main()
