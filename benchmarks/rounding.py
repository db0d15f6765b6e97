"""How far bfloat16 is from float32 on each backend, and how far the backends are from each other, token by token.

The truth is float32 arithmetic over the same weights, rounded to bfloat16 beforehand. Per backend: the mean of the
error of a supervised token's loss, the root of its mean square, and what the mean would be by chance alone, which is
rms / sqrt(tokens).
The backends' difference is sqrt(2) times the error of one where the errors have nothing to do with each other.

    python benchmarks/rounding.py --model mlxlora/demo/base --data mlxlora/demo/task --rows 16
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from shared.config_file import build_config
from shared.data.batch import micro_batches
from shared.data.layout import choose_layout
from shared.folder import open_folder
from shared.jobs.prepare import prepare
from shared.registry import find_backend
from shared.tensors import from_float32, save_file, to_float32
from shared.types import Example


def main() -> None:
    """Measure, print a line per backend and pair, and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="unquantized folder")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=16, help="the first rows of training, as update 1 takes them")
    arguments = parser.parse_args()
    values = {"model": str(arguments.model), "data": {"path": str(arguments.data)}, "evaluation": {"every": None}}
    prepared = prepare(build_config({**values, "train": {"batch_size": arguments.rows}}))
    examples = [prepared.train[int(row)] for row in prepared.plan.rows(1)]
    with tempfile.TemporaryDirectory() as folder:
        rounded = round_weights(arguments.model, Path(folder))
        truth_N = losses("torch", rounded, examples, dtype="float32")
        found = {name: losses(name, rounded, examples, dtype="bfloat16") for name in ("torch", "mlx")}
        checked_N = losses("mlx", rounded, examples, dtype="float32")
    errors = {name: losses_N - truth_N for name, losses_N in found.items()}
    errors |= {"mlx - torch": found["mlx"] - found["torch"], "mlx in float32": checked_N - truth_N}
    print(f"{len(truth_N)} supervised tokens, loss {truth_N.mean():.4f} in float32")
    print(f"{'':<16}{'mean':>10}{'rms':>10}{'by chance':>11}")
    rows = {}
    for name, error_N in errors.items():
        rms = float(np.sqrt((error_N**2).mean()))
        rows[name] = {"mean": float(error_N.mean()), "rms": rms, "by_chance": rms / len(error_N) ** 0.5}
        print(f"{name:<16}{rows[name]['mean']:>+10.1e}{rms:>10.1e}{rows[name]['by_chance']:>11.1e}")
    print(json.dumps({"tokens": len(truth_N), "loss": float(truth_N.mean()), **rows}))


def round_weights(source: Path, target: Path) -> Path:
    """Return a copy of a folder whose weights are rounded to bfloat16."""
    folder = open_folder(source)
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    names = list(folder.entries)
    save_file(
        target / "model.safetensors",
        ((name, from_float32(to_float32(folder.value(name)), "BF16")) for name in names),
        metadata={"format": "pt"},
    )
    (target / "model.safetensors.index.json").unlink(missing_ok=True)
    return target


def losses(backend: str, folder: Path, examples: list[Example], *, dtype: str) -> np.ndarray:
    """Return the loss in nats of every supervised token, float64."""
    model = find_backend(backend).load_model(folder, dtype=dtype, quantization=None, recompute=False, device="cpu")
    layout = choose_layout(model.info, packing="auto", micro_tokens=None)
    return -np.concatenate([model.log_probs(batch) for batch in micro_batches(examples, layout)]).astype(np.float64)


if __name__ == "__main__":
    main()
