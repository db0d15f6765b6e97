"""How fast whole models are quantized, converted and fused, and how much memory that takes: part of codecs.py.

The source is a random Llama in bfloat16, in shards of a few layers. Each conversion runs in a process of its own: MB of
the source per second, and the largest resident size less what the imports took (Linux). The bound on the latter is
1.3 times the largest shard plus one decoder layer in bfloat16.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from mlxlora import DEMO
from shared.convert.shards import SINGLE, Planned, write_index, write_shard
from shared.data.tokenize import load_tokenizer
from shared.folder import ModelFolder, open_folder
from shared.measuring.synthetic import Shape, write_llama
from shared.seeds import generator
from shared.tensors import read_tensor, save_file
from shared.types import Tensor

CONVERSIONS = {
    "quantize affine-4bit-g64": ("quantize", {"scheme": "affine-4bit-g64"}),
    "quantize nf4-dq": ("quantize", {"scheme": "nf4-dq"}),
    "quantize quanto-qint4": ("quantize", {"scheme": "quanto-qint4"}),
    "convert to hf, float32": ("convert", {"to": "hf", "dtype": "float32"}),
    "convert to gguf, q8_0": ("convert", {"to": "gguf", "weights": "q8_0"}),
    "fuse": ("fuse", {}),
    "fuse on the base's grid": ("fuse", {"scheme": "same", "accept_loss": True}),
}
SHARE = 1.3  # of the largest shard that a conversion may take beside one decoder layer


def write_source(folder: Path, shape: Shape, *, layers_per_shard: int) -> Path:
    """Write a random Llama in shards of so many layers, with the adapter `adapter` beside it; return its folder."""
    whole = open_folder(write_llama(folder / "whole", shape, positions=512, seed=0))
    parts: dict[int, list[Planned]] = {}
    for name, entry in whole.entries.items():
        layer = re.search(r"\.layers\.(\d+)\.", name)
        part = int(layer[1]) // layers_per_shard if layer else 0
        blocks = lambda entry=entry: [read_tensor(entry)]  # noqa: E731
        parts.setdefault(part, []).append(Planned(name, entry.dtype, entry.shape, blocks))
    target, weight_map = folder / "source", {}
    target.mkdir()
    for part, planned in sorted(parts.items()):
        name = f"model-{part + 1:05d}-of-{len(parts):05d}.safetensors"
        write_shard(target / name, planned, metadata={"format": "pt"})
        weight_map |= {item.name: name for item in planned}
    write_index(target, weight_map, total=sum(item.num_bytes for planned in parts.values() for item in planned))
    (whole.path / "config.json").rename(target / "config.json")
    (whole.path / SINGLE).unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / "base" / name, target / name)
    write_adapter(folder / "adapter", open_folder(target), rank=8)
    return target


def write_adapter(folder: Path, base: ModelFolder, *, rank: int) -> None:
    """Write a random LoRA of all linear layers as PEFT keeps it."""
    random, tensors = generator(0, "synthetic adapter"), {}
    for name, entry in base.entries.items():
        if "_proj" in name:
            for leaf, shape in (("A", (rank, entry.shape[1])), ("B", (entry.shape[0], rank))):
                values = random.standard_normal(shape, dtype=np.float32) * np.float32(0.05)
                key = f"base_model.model.{name.removesuffix('.weight')}.lora_{leaf}.weight"
                tensors[key] = Tensor("F32", values)
    folder.mkdir()
    save_file(folder / "adapter_model.safetensors", tensors.items(), metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def measure_conversions(folder: Path, shape: Shape, *, layers_per_shard: int) -> dict[str, dict[str, Any]]:
    """Return seconds, MB/s, memory and its bound of every conversion."""
    source, quantized = write_source(folder, shape, layers_per_shard=layers_per_shard), folder / "quantize-0"
    found: dict[str, dict[str, Any]] = {}
    for number, (name, (command, options)) in enumerate(CONVERSIONS.items()):
        model = quantized if options.get("scheme") == "same" else source
        if command == "fuse":
            options = {**options, "adapter": str(folder / "adapter")}
        target = folder / f"{command}-{number}"
        task = {"command": command, "model": str(model), "output": str(target), **options}
        done = subprocess.run(
            [sys.executable, __file__], input=json.dumps(task), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(done.stderr)
        found[name] = {**json.loads(done.stdout.splitlines()[-1]), "bound_bytes": bound_of(model, source)}
        found[name]["mb_per_s"] = size_of(model) / 1e6 / found[name]["time_s"]
        if target != quantized:
            shutil.rmtree(target)
    return found


def bound_of(model: Path, source: Path) -> int:
    """Return how many bytes the conversion of a model may take, a layer being one of the unquantized source."""
    layer = sum(e.end - e.start for name, e in open_folder(source).entries.items() if ".layers.0." in name)
    return round(SHARE * max(file.stat().st_size for file in open_folder(model).files)) + layer


def size_of(folder: Path) -> int:
    """Return the bytes of a folder's weights."""
    return sum(file.stat().st_size for file in open_folder(folder).files)


def run_task(task: dict[str, Any]) -> dict[str, float | None]:
    """Do one conversion in this process and return its seconds and the memory it took beside the imports."""
    from shared.convert.gguf_arch import read_facts
    from shared.convert.models import convert_model
    from shared.convert.quantize import quantize
    from shared.jobs.fuse import fuse

    if task.get("to") == "gguf":
        load_tokenizer(Path(task["model"]))  # transformers' imports are no part of the conversion
        read_facts(open_folder(Path(task["model"])))
    command, model, output = task.pop("command"), task.pop("model"), task.pop("output")
    before = reset_peak()
    began = time.perf_counter()
    if command == "quantize":
        quantize(model, output=Path(output), **task)
    else:
        {"convert": convert_model, "fuse": fuse}[command](model, output=output, **task)
    elapsed = time.perf_counter() - began
    return {"time_s": elapsed, "memory_bytes": None if before is None else resident("VmHWM") - before}


def reset_peak() -> int | None:
    """Let the largest resident size begin anew and return the present one in bytes; None where nobody tells."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return resident("VmRSS")


def resident(key: str) -> int:
    """Return a size of /proc/self/status, in bytes."""
    match = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return 1024 * int(match[1])


def print_conversions(found: dict[str, dict[str, Any]]) -> None:
    """Print MB/s and memory beside its bound."""
    print("\n| conversion | MB/s | memory, MB | bound, MB |\n|---|---|---|---|")
    for name, row in found.items():
        memory = "-" if row["memory_bytes"] is None else f"{row['memory_bytes'] / 1e6:.0f}"
        print(f"| {name} | {row['mb_per_s']:.0f} | {memory} | {row['bound_bytes'] / 1e6:.0f} |")


if __name__ == "__main__":
    print(json.dumps(run_task(json.load(sys.stdin))))
