"""The benchmark scripts run from the command line and write what they print."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = {"data", "forward", "head", "backward", "optimizer", "waiting"}


def script(name: str, *arguments: object, code: int = 0) -> str:
    """Return what a benchmark prints."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / name), *map(str, arguments)],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_step_gives_the_time_of_every_part(backend, tmp_path):
    file = tmp_path / "results" / "step.json"
    out = script("step.py", "--quick", "--backend", backend, "--updates", 3, "--output", file)
    found = json.loads(file.read_text())
    assert set(found["parts"]) == PARTS
    assert all(f"| {part} |" in out for part in PARTS)
    assert found["update_s"] > 0
    assert found["tokens_per_s"] > 0
    assert all(found["parts"][part]["median_s"] > 0 for part in ("data", "forward"))
    assert (found["updates"], found["clock"], set(found["devices"])) == (3, "wall", {backend})
    assert found["command"] == f"python benchmarks/step.py --quick --backend {backend} --updates 3 --output step.json"
    assert "need not add up" in out


def test_step_compares_compiled_updates_with_plain_ones(tmp_path):
    file = tmp_path / "step.json"
    script("step.py", "--quick", "--backend", "mlx", "--pairs", "--updates", 2, "--output", file)
    found = json.loads(file.read_text())
    assert 1 <= len(found["shapes"]) <= 8
    assert set(found["update_s"]) == {"plain", "compiled"}
    assert found["compiled_over_plain"] > 0


def test_step_takes_a_real_model_and_real_rows(tiny_model_folder, tmp_path):
    rows = [{"prompt": f"{n} and {n}? ", "completion": "hello"} for n in range(4)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "step.json"
    script(
        "step.py", "--model", tiny_model_folder(), "--data", tmp_path, "--set", "train.dtype=float32", "--set",
        "train.batch_size=2", "--backend", "torch", "--updates", 2, "--warmup", 1, "--output", file,
    )  # fmt: skip
    found = json.loads(file.read_text())
    assert (found["dtype"], found["rows_per_update"], found["updates"]) == ("float32", 2, 2)


@pytest.mark.timeout(900)  # six processes, each loading a framework: 25 s of processor time
@pytest.mark.parametrize(("backend", "axes"), [("torch", "rows,recompute,loss"), ("mlx", "loss")])
def test_scaling_fits_exponents_and_judges_its_claims(backend, axes, tmp_path):
    file = tmp_path / "scaling.json"
    out = script("scaling.py", "--quick", "--backend", backend, "--only", axes, "--output", file)
    found = json.loads(file.read_text())["results"][backend]
    for axis in axes.split(","):
        assert len(found[axis]["points"]) == 2
        assert all(point["time_s"] > 0 for point in found[axis]["points"])
        assert f"| {axis} |" in out
    assert len(found["claims"]) == len(axes.split(","))
    for claim in found["claims"]:
        assert f"{'PASS' if claim['ok'] else 'FAIL'}  {claim['text']}" in out
    loss = found["loss"]["points"]
    whole_logits = [point["size"] * 4 for point in loss]
    assert all(0 < point["added_bytes"] < 3 * 2**26 for point in loss)
    assert loss[1]["added_bytes"] < whole_logits[1] * 3, "less than the logits, their softmax and their gradient"


def test_a_mistake_is_told_at_once():
    assert "one of --config" in script("step.py", "--backend", "mlx", code=2)
    assert "unknown width" in script("scaling.py", "--only", "width", code=2)


@pytest.mark.slow
def test_codecs_are_timed_next_to_their_owners_and_steps_next_to_float32(tmp_path):
    file = tmp_path / "codecs.json"
    out = script("codecs.py", "--quick", "--schemes", "nf4,ternary-g64", "--repeats", 1, "--output", file)
    found = json.loads(file.read_text())
    assert found["codecs"]["ternary-g64"].pop("encode_owner") is None
    for name in ("nf4", "ternary-g64"):
        assert all(value > 0 for value in found["codecs"][name].values())
        assert f"| {name} |" in out
        assert all(found["steps"][backend][name]["ratio"] > 0 for backend in ("mlx", "torch"))
    assert found["steps"]["mlx"]["none"]["ratio"] == 1
    assert all(row["mb_per_s"] > 0 for row in found["conversions"].values())
    assert "| fuse on the base's grid |" in out


@pytest.mark.slow  # seven processes over 220 MB of weights
@pytest.mark.timeout(1800)
def test_conversions_stay_below_the_largest_shard_and_a_layer(tmp_path):
    file = tmp_path / "codecs.json"
    script("codecs.py", "--schemes", "int8", "--repeats", 1, "--no-steps", "--output", file)
    found = json.loads(file.read_text())["conversions"]
    over = {name: row for name, row in found.items() if not row["memory_bytes"] < row["bound_bytes"]}
    assert len(found) == 7
    assert not over


def test_fuzz_spoils_every_reader_and_none_breaks(tmp_path):
    file = tmp_path / "fuzz.json"
    out = script("fuzz.py", "--count", 1500, "--output", file)
    readers = json.loads(file.read_text())["readers"]
    assert sum(row["inputs"] for row in readers.values()) == 1500
    for name, row in readers.items():
        assert row["crashes"] == 0, out
        assert row["read"] > 0, f"{name}: nothing sound is left"
        assert row["refused"] or name == "metrics", f"{name}: nothing is spoilt"


@pytest.mark.slow
def test_bad_inputs_are_answered_as_promised_and_mlx_lm_stands_beside(tmp_path):
    file = tmp_path / "bad.json"
    out = script("bad_inputs.py", "--only", "config: rank 0", "--output", file)
    (row,) = json.loads(file.read_text())["cases"]
    assert (row["exit_code"], row["fault"], row["lines"]) == (2, "", 2)
    assert row["mlx_lm"]["kind"] == "accepted"
    assert "| config: rank 0 | 2 | 2 |" in out


@pytest.mark.slow  # PEFT, transformers and both backends: 20 s
def test_against_peft_ends_where_peft_does(stored_model, tmp_path):
    file = tmp_path / "against.json"
    model = stored_model("TinyStories-656K")
    rows = model.parent.parent / "data/wikisql"
    script("against_peft.py", "--model", model, "--data", rows, "--updates", 3, "--own-starts", 0, "--output", file)
    found = json.loads(file.read_text())
    assert abs(found["ours_minus_peft"]) < 1e-4
    assert found["curve_gap"] < 1e-5


@pytest.mark.slow
def test_generating_measures_both_ways_and_compares_their_tokens(tiny_model_folder, tmp_path):
    file = tmp_path / "generating.json"
    sizes = ["--prompts", 2, "--tokens", 5, "--answer", 4, "--runs", 2]
    script("generating.py", "--model", tiny_model_folder(), "--backend", "torch", *sizes, "--output", file)
    found = json.loads(file.read_text())["results"]["torch"]
    assert found["same_tokens"]
    assert all(len(found["wall"][key]) == 2 and min(found["wall"][key]) > 0 for key in ("alone_s", "together_s"))
