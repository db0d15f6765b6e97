"""`mlxlora estimate` on the command line, what `train` does with it, and one measurement per backend."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlxlora.cli.main import run
from shared.config_file import load_config
from shared.estimate.machines import mac
from shared.estimate.report import make_report
from tests.tolerances import ESTIMATE

ROOT = Path(__file__).resolve().parents[2]


def call(capsys: pytest.CaptureFixture[str], *arguments: Any, code: int = 0) -> tuple[str, str]:
    """Return what a command printed on stdout and stderr."""
    capsys.readouterr()
    found = run([str(argument) for argument in arguments])
    out, error = capsys.readouterr()
    assert found == code, error
    return out, error


@pytest.fixture
def recipe(tmp_path, tiny_model_folder) -> Path:
    rows = [{"prompt": "hello? ", "completion": "hello " * n} for n in range(1, 12)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "recipe.yaml"
    values = {
        "model": str(tiny_model_folder()), "data": str(tmp_path / "train.jsonl"), "evaluation": {"every": None},
        "train": {"updates": 2, "dtype": "float32"}, "output": str(tmp_path / "run"),
    }  # fmt: skip
    file.write_text("# mine\n" + yaml.safe_dump({**values, "data": {"path": values["data"]}}))
    return file


def test_text_has_parts_and_machines_of_both_backends(capsys, recipe):
    out, _ = call(capsys, "estimate", recipe)
    for words in ("weights", "optimizer", "activations", "Mac 8 GB", "Mac 128 GB", "GPU 141 GB", "mlx:", "torch:"):
        assert words in out
    assert "--tflops" in out


def test_json_is_one_object_and_agrees_with_python(capsys, recipe):
    out, _ = call(capsys, "estimate", recipe, "--backend", "torch", "--set", "adapter.rank=4", "--json")
    found = json.loads(out)
    assert found["ok"]
    (backend,) = found["backends"]
    assert backend["peak_bytes"] == sum(part["bytes"] for part in backend["parts"] if part["at_peak"])
    report = make_report(load_config(recipe, overrides=["backend=torch", "adapter.rank=4"]))
    assert report.backends[0].peak_bytes == backend["peak_bytes"]
    assert report.trained_parameters == found["trained_parameters"]


def test_one_memory_size_instead_of_the_table(capsys, recipe):
    out, _ = call(capsys, "estimate", recipe, "--backend", "mlx", "--memory", "24GB", "--json")
    (line,) = json.loads(out)["backends"][0]["lines"]
    assert (line["machine"], line["limit_bytes"]) == ("Mac 24 GB", mac(24).limit)


def test_a_rate_gives_a_time(capsys, recipe):
    out, _ = call(capsys, "estimate", recipe, "--backend", "torch", "--tflops", "1", "--json")
    found = json.loads(out)["backends"][0]["time"]
    assert found["seconds"] == pytest.approx(found["operations"] / 0.5e12)


def test_no_weight_and_no_framework_is_loaded(recipe, tmp_path):
    """Where no data is readable, so that no tokenizer is needed."""
    code = (
        "import sys; from mlxlora.cli.main import run; run(sys.argv[1:]); "
        "print(sorted({'mlx', 'torch', 'transformers'} & {name.split('.')[0] for name in sys.modules}))"
    )
    command = [sys.executable, "-c", code, "estimate", str(recipe), "--set", f"data.path={tmp_path / 'absent'}"]
    began = time.process_time()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "stands in" in done.stderr
    assert time.process_time() - began < 2


def test_fit_prints_or_writes_a_new_config_and_leaves_the_users_own(capsys, recipe, tmp_path):
    before = recipe.read_text()
    new = tmp_path / "new.yaml"
    options = ["--backend", "torch", "--set", "train.micro_tokens=65536", "--set", "train.batch_size=4096"]
    out, error = call(capsys, "estimate", recipe, *options, "--fit", "here")
    assert yaml.safe_load(out)["adapter"]["rank"] == 8
    assert "note: train.recompute: " in error  # was auto
    out, _ = call(capsys, "estimate", recipe, *options, "--fit", "here", "--output", new)
    written = load_config(new)
    assert isinstance(written.train.recompute, bool)
    assert (written.data.max_length, written.quantization) == (2048, "none")
    assert recipe.read_text() == before
    call(capsys, "estimate", recipe, *options, "--fit", "here", "--output", recipe, code=2)
    assert recipe.read_text() == before


def test_without_a_backend_fit_takes_that_of_this_machine_and_says_so(capsys, recipe):
    taken = "mlx" if sys.platform == "darwin" else "torch"
    out, error = call(capsys, "estimate", recipe, "--fit", "16GB")
    assert yaml.safe_load(out)["backend"] == taken
    assert f"note: backend: {taken}, as on this machine" in error


def test_wrong_usage_is_told(capsys, recipe, tmp_path):
    assert "MB and KB are not read" in call(capsys, "estimate", recipe, "--fit", "10MB", code=2)[1]
    assert "16GB" in call(capsys, "estimate", recipe, "--memory", "much", code=2)[1]
    assert "--fit" in call(capsys, "estimate", recipe, "--output", tmp_path / "n.yaml", code=2)[1]


def test_train_says_what_it_chose_and_refuses_what_cannot_fit_before_it_loads(capsys, recipe):
    _, error = call(capsys, "train", recipe, "--backend", "torch")
    assert "micro-batches of 1024 tokens, recompute off" in error
    huge = ["train.micro_tokens=1000000000", "train.recompute=false", "train.batch_size=100000000"]
    options = [part for text in huge for part in ("--set", text)]
    _, error = call(capsys, "train", recipe, "--backend", "torch", "--resume", "never", *options, code=6)
    assert "train.micro_tokens: " in error
    assert len(error.strip().splitlines()) <= 3


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_search_measures_growing_micro_batches(capsys, recipe, backend):
    out, _ = call(capsys, "estimate", recipe, "--backend", backend, "--search", "--json")
    found = json.loads(out)
    sizes = [tried["micro_tokens"] for tried in found["tried"]]
    assert sizes == sorted(set(sizes))
    assert len(sizes) > 2
    assert found["fastest"] in sizes
    assert all(tried["peak_bytes"] > 0 and tried["tokens_per_s"] > 0 for tried in found["tried"])
    assert "all 11 rows" in found["stopped"]


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_the_estimate_is_near_the_peak_of_a_real_run(backend, tmp_path):
    """One case of benchmarks/memory.py; all of them with -m slow."""
    assert abs(measure(tmp_path, "--backend", backend, "--every", "100")) <= ESTIMATE


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_estimate_is_near_the_peak_of_all_real_runs(tmp_path):
    assert abs(measure(tmp_path)) <= ESTIMATE


def measure(folder: Path, *options: str) -> float:
    """Return the worst error of the benchmark's cases."""
    file = folder / "memory.json"
    command = [sys.executable, "benchmarks/memory.py", "--output", str(file), *options]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return max((result["error"] for result in json.loads(file.read_text())["results"]), key=abs)
