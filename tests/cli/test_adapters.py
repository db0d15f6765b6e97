"""`convert`, `merge` and `--adapter` as a user meets them: exit codes, short answers, one JSON object."""

from __future__ import annotations

import json

import pytest

from mlxlora.cli.main import run
from tests.adapters import save_adapter


@pytest.fixture(scope="module")
def adapters(tiny_model_folder, tmp_path_factory):
    """Return the base and two adapters of it."""
    base, root = tiny_model_folder(), tmp_path_factory.mktemp("adapters")
    return base, save_adapter(root / "one", base), save_adapter(root / "two", base, seed=1)


def answer(capsys, *arguments):
    """Return the exit code and the JSON object of a command."""
    code = run([*map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_convert_there_and_back(adapters, tmp_path, capsys):
    _, one, _ = adapters
    code, found = answer(capsys, "convert", one, "--to", "mlx", "--output", tmp_path / "mlx")
    assert (code, found["source"], found["to"], found["restored"]) == (0, "peft", "mlx", False)
    assert run(["convert", str(tmp_path / "mlx"), "--to", "peft", "--output", str(tmp_path / "peft")]) == 0
    assert "the bytes it once came from" in capsys.readouterr().out
    assert {file.name: file.read_bytes() for file in one.iterdir()} == {
        file.name: file.read_bytes() for file in (tmp_path / "peft").iterdir()
    }


def test_several_adapters_are_what_their_merge_is(adapters, tmp_path, capsys):
    base, one, two = adapters
    parts = [f"{one}=0.7", f"{two}=0.3"]
    code, found = answer(capsys, "merge", *parts, "--output", tmp_path / "both")
    assert (code, found["rank"], [part["weight"] for part in found["adapters"]]) == (0, 8, [0.7, 0.3])
    ask = ["generate", base, "--prompt", "hello", "--max-tokens", "12", "--backend", "torch"]
    texts = [
        answer(capsys, *ask, *(word for part in chosen for word in ("--adapter", part)))[1]["tokens"]
        for chosen in (parts, [tmp_path / "both"], [one])
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["convert", "nowhere", "--to", "mlx"], 3, "nowhere"),
        (["merge", "nowhere"], 3, "no adapter folder at nowhere"),
        (["merge", "{one}=much"], 2, "no number"),
        (["merge", "{one}", "--method", "mean"], 2, "unknown value"),
        (["merge", "{one}", "--method", "svd"], 2, "--rank"),
        (["convert", "{one}", "--to", "peft"], 2, "peft already"),
        (["convert", "{base}", "--to", "peft"], None, "adapter"),
    ],
)
def test_mistakes_get_a_short_answer_and_leave_nothing(adapters, tmp_path, capsys, arguments, code, word):
    base, one, _ = adapters
    arguments = [text.format(one=one, base=base) for text in arguments]
    found = run([*arguments, "--output", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert found in ((code,) if code else (2, 3, 4)), error
    assert word in error
    assert "Traceback" not in error
    assert len(error.splitlines()) <= 3
    assert not (tmp_path / "out").exists()
