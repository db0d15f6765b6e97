"""Write the golden checkpoint of the format of this day: `python tests/recovery/golden/make.py`, once per format."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from shared.config_file import build_config
from shared.jobs.train import train
from shared.running import checkpoint

HERE = Path(__file__).resolve().parent
BASE = HERE.parents[2] / "mlxlora/demo/base"


def recipe(output: Path, *, backend: str) -> dict[str, Any]:
    """Return the config of the run that the golden checkpoints are of: as small as it gets, moments included."""
    return {
        "model": str(BASE), "data": {"path": str(HERE / "train.jsonl")}, "output": str(output), "backend": backend,
        "adapter": {"rank": 1, "targets": ["q_proj"], "layers": 1, "dropout": 0.1},
        "train": {"batch_size": 2, "updates": 4, "dtype": "float32"}, "evaluation": {"every": None},
        "optimizer": {"lr": 0.01}, "checkpoint": {"every": 2}, "log": {"every": 1},
    }  # fmt: skip


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        train(build_config(recipe(Path(folder), backend="torch")))
        target = HERE / f"format-{checkpoint.FORMAT}" / "step-000002"
        shutil.copytree(Path(folder) / "checkpoints/step-000002", target)
        print(f"written: {target.relative_to(HERE)}")
