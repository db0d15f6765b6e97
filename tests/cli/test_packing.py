"""`data.packing: packed` where it is not proven is refused by name; under auto the rows are sorted, and exact."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shared.data.batch import micro_batches
from shared.data.layout import choose_layout
from shared.evaluating.loss import evaluate_examples
from tests import tolerances
from tests.architectures import load, save, wanted_log_probs

FAMILIES = {  # one that packs on the other backend, and for PyTorch one that packs on none
    "mlx": ("phi3", {}),
    "torch": ("opt", {"word_embed_proj_dim": 64, "ffn_dim": 128}),
}
LENGTHS = [5, 19, 8, 31, 12, 12, 3, 27]


@pytest.mark.parametrize("backend", FAMILIES)
def test_packing_that_is_not_proven_is_refused_by_name_with_exit_code_4(tmp_path, backend):
    folder = save(tmp_path / "model", *FAMILIES[backend])
    (tmp_path / "data").mkdir()
    rows = "".join(json.dumps({"text": f"hello {n}"}) + "\n" for n in range(12))
    (tmp_path / "data/train.jsonl").write_text(rows)
    values = [f"backend={backend}", "data.packing=packed", "train.updates=2", "train.dtype=float32"]
    process = subprocess.run(
        [
            sys.executable, "-m", "mlxlora", "train", "--model", str(folder), "--data", str(tmp_path / "data"),
            "--output", str(tmp_path / "run"), *(part for value in values for part in ("--set", value)),
        ],
        capture_output=True, text=True, timeout=240, cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert process.returncode == 4, process.stderr
    assert f"data.packing: packed is not proven exact for {FAMILIES[backend][0]}" in process.stderr
    assert "data.packing: auto" in process.stderr
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize("backend", FAMILIES)
def test_under_auto_such_a_family_is_sorted_and_has_the_zoo_s_loss(tmp_path, make_examples, backend):
    folder, examples = save(tmp_path / "model", *FAMILIES[backend]), make_examples(LENGTHS)
    model = load(backend, folder)
    layout = choose_layout(model.info, packing="auto", micro_tokens=64)
    assert not layout.packed
    assert all(not batch.is_packed for batch in micro_batches(examples, layout))
    wanted = -wanted_log_probs(folder, examples).astype("float64").mean()
    assert evaluate_examples(model, examples, layout).loss == pytest.approx(wanted, rel=tolerances.FIRST_LOSS)
