"""`mlxlora quantize` on the command line: what it prints, writes and refuses."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from mlxlora.cli.main import run


def test_a_folder_is_written_and_told_of_in_json(tiny_model_folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(["quantize", str(tiny_model_folder()), "--scheme", "nvfp4", "--output", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["ok"]
    assert told["output"] == str(out)
    assert told["loads_with"] == "mlx-lm"
    assert told["bits_per_weight"] == 4.5
    assert {layer["scheme"] for layer in told["layers"]} == {"nvfp4"}
    assert (out / "config.json").is_file()
    assert run(["quantize", str(tiny_model_folder()), "--scheme", "nvfp4", "--output", str(out)]) == 2
    assert "--force to replace it" in capsys.readouterr().err


def test_nothing_is_said_of_a_model_that_nobody_may_load(tiny_model_folder, tmp_path, capsys):
    source = tmp_path / "model"
    shutil.copytree(tiny_model_folder(), source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "unheard"}))
    assert run(["quantize", str(source), "--scheme", "nf4", "--output", str(tmp_path / "out")]) == 0
    said = f"wrote {tmp_path / 'out'} in the format of bitsandbytes, which both backends here read too"
    summary, last = capsys.readouterr().out.splitlines()[-2:]
    assert last == said
    assert re.search(r"bits per weight, [\d.]+ MB became [\d.]+ MB$", summary)


def test_a_plan_prints_a_row_per_matrix_and_writes_nothing(tiny_model_folder, tmp_path, capsys):
    options = ["--override", "*.down_proj=mxfp8", "--keep", "lm_head", "--plan"]
    assert run(["quantize", str(tiny_model_folder()), "--scheme", "affine-4bit-g64", *options]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].split() == ["module", "shape", "scheme", "bits", "error"]
    down = next(row for row in rows if "layers.1.mlp.down_proj" in row)
    assert "mxfp8" in down
    assert "8.25" in down
    assert "%" in down
    assert next(row for row in rows if row.startswith("lm_head")).endswith("(asked for)")
    assert rows[-1].startswith("15 of 16 matrices in affine-4bit-g64")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--scheme", "nf4"], 2, "--plan to see what it costs"),
        (["--scheme", "nf5", "--plan"], 2, 'did you mean "nf4"?'),
        (["--scheme", "mxfp4", "--override", "*.q_proj=int8", "--plan"], 2, 'has no "int8"'),
        (["--output", "x"], 2, "--scheme"),
    ],
)
def test_wrong_usage_is_three_lines_at_most(tiny_model_folder, capsys, options, code, words):
    assert run(["quantize", str(tiny_model_folder()), *options]) == code
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) <= 3


def test_a_model_that_is_not_there_is_exit_code_3(tmp_path, capsys):
    assert run(["quantize", str(tmp_path / "none"), "--scheme", "nf4", "--output", str(tmp_path / "out")]) == 3
    assert "no model folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "remedy"),
    [
        (["quantize", "{}", "--scheme", "same", "--plan"], 2, "`mlxlora doctor` lists them, e.g. affine-4bit-g64"),
        (["quantize", "{}", "--scheme", "affine-4bit", "--plan"], 2, 'did you mean "affine-4bit-g64"?'),
        (["quantize", "{}", "--frob"], 2, "mlxlora quantize --help lists what it takes"),
        (["frob"], 2, "mlxlora --help lists what it takes"),
        (["convert", "{}", "--to", "peft", "--output", "{}-peft"], 2, "--to hf, mlx, gguf, ollama"),
    ],
)
def test_a_remedy_is_one_that_the_command_has(tiny_model_folder, capsys, arguments, code, remedy):
    folder = str(tiny_model_folder())
    assert run([argument.format(folder) for argument in arguments]) == code
    assert f"fix: {remedy}" in capsys.readouterr().err
