"""`mlxlora convert` on whole models: files, JSON, short answers."""

from __future__ import annotations

import json

import pytest

from mlxlora.cli.main import run
from tests.exports import save_family


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_family(tmp_path_factory.mktemp("model") / "model", "mistral")


@pytest.mark.parametrize(
    ("to", "files"),
    [("gguf", ["model.gguf"]), ("ollama", ["Modelfile", "model.gguf"]), ("hf", ["config.json", "model.safetensors"])],
)
def test_a_model_becomes_the_files_of_another_program(model, tmp_path, capsys, to, files):
    assert run(["convert", str(model), "--to", to, "--output", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["ok"]
    assert set(files) <= set(found["files"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == found["files"]


def test_an_output_named_as_a_file_is_told_to_be_a_folder(model, tmp_path, capsys):
    assert run(["convert", str(model), "--to", "gguf", "--output", str(tmp_path / "t.gguf")]) == 0
    assert f"note: --output names a folder: the file is {tmp_path}/t.gguf/model.gguf" in capsys.readouterr().err
    assert (tmp_path / "t.gguf/model.gguf").is_file()


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--to", "guff"], 2, 'did you mean "gguf"'),
        (["--to", "gguf", "--weights", "q4_1"], 4, "never rounded to"),
        (["--to", "gguf", "--weights", "q5"], 2, "--weights"),
        (["--to", "hf", "--dtype", "float23"], 2, "--dtype"),
        (["--to", "peft"], 2, "is a whole model"),
    ],
)
def test_mistakes_get_a_short_answer_and_leave_nothing(model, tmp_path, capsys, options, code, words):
    assert run(["convert", str(model), *options, "--output", str(tmp_path / "out")]) == code
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) <= 3
    assert not list(tmp_path.iterdir())
