"""Tokenized rows are kept under a hash of all that decides them; what is damaged or cannot be kept is made anew."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shared.config import validate
from shared.data.cache import cache_folder, make_key, shrink, tokenize_cached
from shared.data.rows import Row, read_rows
from shared.data.tokenize import load_tokenizer, tokenize_rows
from shared.errors import DataError
from shared.jobs.prepare import prepare
from tests.conftest import CHATML, save_tokenizer

ROOT = Path(__file__).resolve().parents[2]
ROWS = [
    {"text": "hello world"},
    {"prompt": "he", "completion": "llo"},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "naïve 🦊"}]},
    {"text": "x" * 300},
]


class Maker:
    """Tokenizes rows, and counts how often it is asked to."""

    def __init__(self, rows, tokenizer, **options):
        self.rows, self.tokenizer, self.options, self.calls = rows, tokenizer, options, 0

    def __call__(self):
        self.calls += 1
        return tokenize_rows(self.rows, self.tokenizer, **self.options)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Return the folder of a cache of its own."""
    monkeypatch.setenv("MLXLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def folder(tmp_path):
    return save_tokenizer(tmp_path / "model")


@pytest.fixture
def rows(write_jsonl):
    return read_rows(write_jsonl(*ROWS))


def ask(rows, folder, *, train_on="completion", max_length=200):
    """Return the examples, and whether they came from the cache."""
    options = {"train_on": train_on, "max_length": max_length}
    make = Maker(rows, load_tokenizer(folder), **options)
    found = tokenize_cached(rows, model=folder, make=make, **options)
    return found, not make.calls


def same(some, others):
    return len(some) == len(others) and all(
        a.source == b.source
        and np.array_equal(a.tokens, b.tokens)
        and np.array_equal(a.supervised, b.supervised)
        and (a.tokens.dtype, a.supervised.dtype) == (b.tokens.dtype, b.supervised.dtype)
        for a, b in zip(some, others, strict=True)
    )


@pytest.mark.parametrize("train_on", ["completion", "all"])
def test_what_comes_from_the_cache_is_what_was_made(cache, folder, rows, train_on):
    cold, hit = ask(rows, folder, train_on=train_on)
    assert not hit
    warm, hit = ask(rows, folder, train_on=train_on)
    assert hit
    assert same(cold, warm)
    assert len(list(cache.iterdir())) == 1


def test_rows_are_named_after_the_file_they_are_read_from_now(cache, folder, rows):
    ask(rows, folder)
    moved = [replace(row, source=f"other.jsonl:{n}") for n, row in enumerate(rows)]
    warm, hit = ask(moved, folder)
    assert hit
    assert [example.source for example in warm] == [row.source for row in moved]


def test_any_change_of_rows_is_a_miss(cache, folder, rows):
    ask(rows, folder)
    call = {"function": {"name": "f", "arguments": {"a": 1, "b": 2}}}
    turned = {"function": {"name": "f", "arguments": {"b": 2, "a": 1}}}
    variants = [rows[:-1], [*rows, rows[0]], rows[::-1], [Row("text", {"text": "hello worlD"}, "t:1"), *rows[1:]]]
    for some in variants:
        assert not ask(some, folder)[1]
    keys = [
        make_key(
            [Row("messages", {"messages": [{"role": "assistant", "content": None, "tool_calls": [found]}]}, "t:1")],
            folder,
            train_on="all",
            max_length=9,
        )
        for found in (call, turned)
    ]
    assert keys[0] != keys[1]  # a template may print the arguments in their order


def test_any_change_of_settings_template_or_tokenizer_is_a_miss(cache, folder, rows, tmp_path):
    ask(rows, folder)
    assert not ask(rows, folder, max_length=199)[1]
    assert not ask(rows, folder, train_on="all")[1]
    for number, change in enumerate((change_template, change_tokenizer, add_template_file, change_family)):
        other = shutil.copytree(folder, tmp_path / f"other{number}")
        assert ask(rows, other)[1], "the same files elsewhere are the same tokenizer"
        change(other)
        assert not ask(rows, other)[1]
    assert ask(rows, folder)[1]


def change_template(folder):
    file = folder / "chat_template.jinja"
    file.write_text(CHATML.replace("<|im_end|>", "<|im_end|> "))


def change_tokenizer(folder):
    file = folder / "tokenizer.json"
    file.write_text(file.read_text() + "\n")


def add_template_file(folder):
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(CHATML)


def change_family(folder):
    (folder / "config.json").write_text('{"model_type": "llama"}')


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
        lambda file: file.write_bytes(file.read_bytes()[:40]),
        lambda file: file.write_bytes(file.read_bytes() + b"x"),
        lambda file: flip(file, 0),
        lambda file: flip(file, 60),
        lambda file: flip(file, -1),
        lambda file: (file.unlink(), file.mkdir()),
    ],
)
def test_a_damaged_file_is_made_anew(cache, folder, rows, damage):
    cold, _ = ask(rows, folder)
    (file,) = cache.iterdir()
    damage(file)
    again, hit = ask(rows, folder)
    assert not hit
    assert same(cold, again)
    if file.is_file():
        assert ask(rows, folder)[1], "and it is whole again"


def flip(file, at):
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(folder, rows, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("MLXLORA_CACHE", str(tmp_path / "file"))
    first, hit = ask(rows, folder)
    again, hit_again = ask(rows, folder)
    assert not hit
    assert not hit_again
    assert same(first, again)


def test_errors_are_not_kept(cache, folder, write_jsonl):
    bad = read_rows(write_jsonl({"text": "fine"}, {"prompt": "p" * 50, "completion": "late"}))
    for _ in range(2):
        with pytest.raises(DataError, match=r"train.jsonl:2: no supervised token"):
            ask(bad, folder, max_length=20)
    assert not cache.exists()


def test_the_files_used_longest_ago_go_first(tmp_path):
    for n in range(4):
        (tmp_path / str(n)).write_bytes(b"x" * 10)
        os.utime(tmp_path / str(n), (n, n))
    os.utime(tmp_path / "0", (9, 9))  # used again
    shrink(tmp_path, most=25)
    assert {file.name for file in tmp_path.iterdir()} == {"0", "3"}
    shrink(tmp_path, most=9)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_used_becomes_the_last_to_go(cache, folder, rows):
    ask(rows, folder)
    (file,) = cache.iterdir()
    os.utime(file, (5, 5))
    assert ask(rows, folder)[1]
    assert file.stat().st_mtime > 5


def test_the_folder_is_the_systems_place_for_caches(monkeypatch, tmp_path):
    monkeypatch.delenv("MLXLORA_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # not allowed by its specification
    usual = tmp_path / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "mlxlora"
    assert cache_folder() == usual
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_folder() == (usual if sys.platform == "darwin" else tmp_path / "x" / "mlxlora")
    monkeypatch.setenv("MLXLORA_CACHE", "~/mine")
    assert cache_folder() == tmp_path / "mine"


def config_of(model, data, **values):
    return validate({"model": str(model), "data": {"path": str(data), "max_length": 64, **values}})


def facts(prepared):
    return prepared.data_hash, prepared.data_files, prepared.kind, prepared.leaks


def test_a_run_is_prepared_alike_cold_warm_and_without_a_cache(cache, tiny_model_folder, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (data / "valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*ROWS[:2], {"text": "other"}]))
    model = tiny_model_folder()
    found = [prepare(config_of(model, data, cache=kept)) for kept in (False, True, True)]
    assert len(list(cache.iterdir())) == 2
    for other in found[1:]:
        assert facts(other) == facts(found[0])
        assert same(other.train, found[0].train)
        assert same(other.valid, found[0].valid)
    assert found[0].leaks == {"valid.jsonl": 2}
    assert "inner" in vars(found[1].tokenizer)
    assert "inner" not in vars(found[2].tokenizer), "not loaded where nothing is tokenized"
    assert found[2].tokenizer.encode("hello") == found[0].tokenizer.encode("hello")
    config = config_of(model, data)
    assert facts(prepare(config.model_copy(update={"data": copy.copy(config.data)}))) == facts(found[0])


RUN = """
import sys, mlxlora
config = mlxlora.load_config(
    model=sys.argv[1], data={"path": sys.argv[2], "max_length": 64}, output=sys.argv[3], backend=sys.argv[4],
    train={"batch_size": 2, "updates": 4, "dtype": "float32"}, log={"every": 1}, adapter={"dropout": 0.1})
loaded = {}
class Look:
    def on_update(self, step):
        loaded.update(dict.fromkeys(name.split(".")[0] for name in sys.modules))
mlxlora.train(config, callbacks=[Look()])
print(*loaded)
"""


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_cold_and_warm_runs_give_the_same_bytes_and_load_no_more_than_they_need(
    cache, tiny_model_folder, tmp_path, backend
):
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    loaded, written = [], []
    for name in ("cold", "warm"):
        arguments = [str(tiny_model_folder()), str(data), str(tmp_path / name), backend]
        done = subprocess.run(
            [sys.executable, "-c", RUN, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
        loaded.append(set(done.stdout.split()))
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        adapter = (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()
        written.append(([(row["loss"], row["grad_norm"], row["tokens"]) for row in rows], adapter))
    assert written[0] == written[1]
    if backend == "mlx":
        assert "transformers" in loaded[0]
        assert "torch" not in loaded[0]
        assert not {"torch", "transformers", "tokenizers"} & loaded[1]
