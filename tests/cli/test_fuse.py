"""`mlxlora fuse` as a user meets it: reports, exit codes, short answers, nothing left behind."""

from __future__ import annotations

import json
import shutil

import pytest

from mlxlora.cli.main import run
from tests.adapters import save_adapter


@pytest.fixture(scope="module")
def packed_folder(tiny_model_folder, tmp_path_factory):
    import mlx_lm

    target = tmp_path_factory.mktemp("packed") / "model"
    mlx_lm.convert(
        str(tiny_model_folder()), mlx_path=str(target), quantize=True, q_bits=4, q_group_size=32, dtype="float32"
    )
    return target


def test_a_fused_model_generates_what_base_and_adapter_do(tiny_model_folder, tmp_path, capsys):
    base = tiny_model_folder()
    adapter = save_adapter(tmp_path / "adapter", base)
    assert run(["fuse", str(base), "--adapter", str(adapter), "--output", str(tmp_path / "out")]) == 0
    assert f"wrote {tmp_path / 'out'}" in capsys.readouterr().out
    ask = ["--prompt", "hello", "--max-tokens", "12", "--backend", "torch", "--json"]
    texts = []
    for target in ([str(base), "--adapter", str(adapter)], [str(tmp_path / "out")]):
        assert run(["generate", *target, *ask]) == 0
        texts.append(json.loads(capsys.readouterr().out)["tokens"])
    assert texts[0] == texts[1]


def test_the_report_comes_before_the_refusal(packed_folder, tmp_path, capsys):
    adapter = save_adapter(tmp_path / "adapter", packed_folder, size=0.001)
    command = ["fuse", str(packed_folder), "--adapter", str(adapter), "--output", str(tmp_path / "out")]
    assert run([*command, "--scheme", "same", "--backend", "torch"]) == 3
    out, error = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == ["cosine", "layer", "layer", "all", "log-probabilities"]
    assert error.splitlines()[-3].startswith("error E313: fusing would lose the adapter")
    assert len(error.splitlines()) == 3
    assert not (tmp_path / "out").exists()
    assert run([*command, "--scheme", "same", "--backend", "torch", "--json"]) == 3
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["ok"], found["exit_code"]) == (False, 3)
    assert run([*command, "--scheme", "same", "--backend", "torch", "--accept-loss", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["ok"]
    assert found["cosine"] < 0.9
    assert {part["name"] for part in found["layers"]} == {"layer 0", "layer 1"}
    assert run(command) == 2
    assert "exists" in capsys.readouterr().err
    assert run([*command, "--force"]) == 0


CASES = {
    "the base as target": (lambda base, adapter, out: [base, adapter, base], 2, "never changed"),
    "a target in the base": (lambda base, adapter, out: [base, adapter, f"{base}/out"], 2, "never changed"),
    "a target in the adapter": (lambda base, adapter, out: [base, adapter, f"{adapter}/out"], 2, "never changed"),
    "no base": (lambda base, adapter, out: ["nowhere", adapter, out], 3, "no model folder"),
    "no adapter": (lambda base, adapter, out: [base, "nowhere", out], 3, "no adapter folder"),
    "a model as adapter": (lambda base, adapter, out: [base, base, out], 3, "not an adapter"),
    "an unknown scheme": (lambda base, adapter, out: [base, adapter, out, "--scheme", "sme"], 2, '"same"'),
    "an unknown dtype": (lambda base, adapter, out: [base, adapter, out, "--dtype", "float61"], 2, "float16"),
    "an unknown backend": (lambda base, adapter, out: [base, adapter, out, "--backend", "jax"], 2, "jax"),
    "rows that are not there": (
        lambda base, adapter, out: [base, adapter, out, "--scheme", "same", "--data", "nowhere"], 2, "nowhere",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_mistakes_get_a_short_answer_and_leave_nothing(packed_folder, tmp_path, capsys, name):
    make, code, words = CASES[name]
    base = tmp_path / "base"
    shutil.copytree(packed_folder, base)
    adapter = save_adapter(tmp_path / "adapter", base)
    model, source, output, *more = make(str(base), str(adapter), str(tmp_path / "out"))
    before = sorted(tmp_path.rglob("*"))
    assert run(["fuse", model, "--adapter", source, "--output", output, *more]) == code
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) <= 3
    assert sorted(tmp_path.rglob("*")) == before
