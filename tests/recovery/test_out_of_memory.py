"""Memory that really runs out (an address-space limit): the same update in smaller pieces, or exit code 6."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tolerances

# A real limit in a process of its own: 160 MiB above what the loaded model takes.
SCRIPT = """
import json, resource, sys
from pathlib import Path
import psutil
from shared.adapters.spec import initial_adapter, resolve
from shared.config import AdapterConfig
from shared.data.batch import make_batch
from shared.data.cut import halve
from shared.errors import OutOfMemory
from shared.registry import find_backend
from shared.types import Example, Method, Update
import numpy as np

name, folder, headroom, length = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
model = find_backend(name).load_model(folder, dtype="float32", quantization=None, recompute=False, device="cpu")
spec = resolve(AdapterConfig(), model.info)
model.attach(spec)
model.load_tensors("adapter", initial_adapter(spec, model.info.linears, seed=0))
trainer = find_backend(name).trainer(model, objective="sft", optimizer=Method("adamw"))
random = np.random.default_rng(0)
update = Update(1, 0, 1e-3, 0.9, 0.999, 1e-8, 0.0, 1.0, True, 0.9, False)
def rows(count, length):
    tokens = random.integers(0, 256, (count, length), dtype=np.int32)
    return [Example(row, np.arange(length) > 0, "x") for row in tokens]
trainer.step([make_batch(rows(2, 16), range(2))], update).result()  # warm: libraries and threads are loaded
before = {key: tensor.data.copy() for key, tensor in [*model.tensors("adapter"), *trainer.state()]}
micro = [make_batch(rows(16, length), range(16))]
if headroom:
    limit = psutil.Process().memory_info().vms + headroom * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
tries = 1
while True:
    try:
        stats = trainer.step(micro, update).result()
        break
    except OutOfMemory:
        after = dict([*model.tensors("adapter"), *trainer.state()])
        assert all(np.array_equal(after[key].data, before[key]) for key in before), "left a trace"
        micro = halve(micro)
        tries *= 2
print(json.dumps({"tries": tries, "loss": stats.loss, "norm": stats.grad_norm}))
"""


def run(folder: Path, *, backend: str, headroom: int, length: int) -> dict:
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, backend, str(folder), str(headroom), str(length)],
        capture_output=True, text=True, timeout=240, cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-2000:]
    return json.loads(process.stdout.splitlines()[-1])


def test_update_is_retried_in_halves_and_comes_out_the_same(tiny_model_folder):
    """On torch; MLX's CPU allocator ends the process where malloc fails, so there it cannot happen to us alive."""
    free = run(tiny_model_folder(), backend="torch", headroom=0, length=240)
    tight = run(tiny_model_folder(), backend="torch", headroom=30, length=240)
    assert free["tries"] == 1
    assert tight["tries"] > 1
    assert tight["loss"] == pytest.approx(free["loss"], rel=tolerances.MICRO)
    assert tight["norm"] == pytest.approx(free["norm"], rel=1e-5)
