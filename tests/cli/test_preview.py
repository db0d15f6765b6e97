"""`mlxlora preview` shows the tokens that training would use, all of them, and counts what training would meet."""

from __future__ import annotations

import html
import json
import re

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from mlxlora.cli.main import run
from shared.config_file import build_config
from shared.data.rows import Row
from shared.data.tokenize import tokenize_row
from shared.errors import DataError
from shared.jobs.prepare import prepare
from shared.jobs.preview import count_updates, pieces, preview

ROWS = [
    {"prompt": "hello? ", "completion": "hello wor 🦊\nnaïve"},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes <b>\x1b[2J"}]},
    {"text": "hello hello hello hello hello hello"},
    {"prompt": "hello? ", "completion": "hello wor 🦊\nnaïve"},
]
VALID = [{"text": "hello world"}, ROWS[1]]


@pytest.fixture
def config(tiny_model_folder, write_jsonl, tmp_path):
    write_jsonl(*ROWS)
    write_jsonl(*VALID, name="valid.jsonl")
    return build_config({"model": str(tiny_model_folder()), "data": {"path": str(tmp_path), "max_length": 30}})


@pytest.fixture
def file(config, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(config.model_dump(mode="json", exclude_defaults=True)))
    return file


def test_the_pieces_are_the_rows_that_training_gets_token_by_token(config):
    found, prepared = preview(config, rows=9), prepare(config)
    assert len(found.shown) == len(ROWS)
    for shown, example in zip(found.shown, prepared.train, strict=True):
        ids = [token for piece in shown.pieces for token in piece.ids]
        mask = [piece.supervised for piece in shown.pieces for _ in piece.ids]
        assert ids == example.tokens.tolist()
        assert np.array_equal(mask, example.supervised)
        assert (shown.source, shown.supervised) == (example.source, example.supervised.sum())
        whole = prepared.tokenizer.inner.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert "".join(piece.text for piece in shown.pieces) == whole


@pytest.mark.parametrize(("name", "one"), [("TinyStories-656K", "upon a tim"), ("stories260K", " upon")])
def test_blanks_and_characters_of_several_tokens_stay_whole(stored_model, name, one):
    from shared.data.tokenize import load_tokenizer

    tokenizer = load_tokenizer(stored_model(name))
    row = Row("text", {"text": "Once upon a time 🦊 naïve  end\n"}, "train.jsonl:1")
    example = tokenize_row(row, tokenizer, train_on="all", max_length=99)
    found = list(pieces(example, tokenizer))
    assert (
        "".join(piece.text for piece in found if not piece.special).strip() == tokenizer.decode(example.tokens).strip()
    )
    assert one in [piece.text for piece in found]


def test_counts_truncation_duplicates_and_leaks(config):
    train, valid = preview(config, rows=0).splits
    assert (train.rows, train.kinds) == (4, {"prompt": 2, "messages": 1, "text": 1})
    assert (train.duplicates, train.leaks, valid.duplicates, valid.leaks) == (1, 0, 0, 1)
    whole = preview(config.model_copy(update={"data": config.data.model_copy(update={"max_length": 999})})).splits[0]
    assert (whole.cut_rows, whole.cut_tokens) == (0, 0)
    assert train.tokens == whole.tokens - train.cut_tokens
    assert train.cut_rows > 0
    assert sum(bar.rows for bar in train.lengths) == 4
    assert train.lengths[-1].low <= train.longest <= train.lengths[-1].high


def test_rows_that_training_refuses_are_named_and_do_not_end_it(config):
    short = config.model_copy(update={"data": config.data.model_copy(update={"max_length": 8})})
    found = preview(short)
    assert found.splits[0].num_problems > 0
    assert re.match(r"train.jsonl:2: no supervised token within data.max_length 8", found.splits[0].problems[0])
    assert found.padding is None


def test_rows_of_which_none_can_be_used_are_the_error_of_training(file, write_jsonl, capsys):
    assert run(["preview", str(file), "--set", "data.max_length=8"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "1 of 4 rows are refused, at which training stops" in said
    assert run(["preview", str(file)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "an update takes 1 micro-batch of 4,096 tokens with rows packed, no padding; with rows sorted by" in said
    write_jsonl(*[{"prompt": "hello? ", "completion": "hello"}] * 3)
    none = ["--set", "data.max_length=2"]
    assert run(["preview", str(file), *none]) == 2
    said = capsys.readouterr().err
    assert re.search(
        r"train.jsonl:1: no supervised token within data.max_length 2 .*\(2 more rows have a problem", said
    )
    assert run(["train", str(file), *none, "--output", str(file.parent / "run")]) == 2
    assert capsys.readouterr().err == said


def test_rows_beyond_the_models_positions_are_told(file, write_jsonl, capsys):
    write_jsonl({"text": "hello " * 300})
    assert run(["preview", str(file), "--set", "data.max_length=512"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "rows of up to 512 tokens, but the model was made for 256; data.max_length: 256 cuts them" in said


def test_the_command_prints_a_page_and_json(file, tmp_path, capsys):
    page = tmp_path / "out.html"
    assert run(["preview", str(file), "--rows", "2", "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert "train.jsonl:1: " in out
    assert "train.jsonl:3: " not in out
    assert "\x1b[2J" not in out
    text = page.read_text()
    assert "yes <b>" in html.unescape(re.sub(r"<[^>]*>", "", text))
    assert not re.search(r"<script|https?:|src=", text)
    assert run(["preview", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["ok"], found["splits"][0]["rows"]) == (True, 4)


def test_a_page_that_cannot_be_written_is_one_clear_error(file, tmp_path, capsys):
    assert run(["preview", str(file), "--html", str(tmp_path / "absent" / "out.html")]) == 7
    assert "cannot use" in capsys.readouterr().err


def test_the_schedule_is_drawn_and_given_as_json(file, capsys):
    assert run(["preview", str(file), "--schedule", "--set", "schedule.name=warmup_stable_decay"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "warmup_stable_decay, warmup 0.03, final 0, 500 updates"
    assert lines[1].startswith("   0.0001")
    assert lines[1].count("█") > 50
    assert lines[-1].split() == ["1", "500", "update"]
    assert (
        run(["preview", str(file), "--schedule", "--json", "--set", "train.updates=null", "--set", "train.epochs=3"])
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["updates"] == len(found["lr"]) == 3


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["data.valid_split=0.4"],
        ["data.drop=[empty]"],
        ["data.drop=[duplicate, empty]", "data.valid_split=0.2"],
        ["data.drop=[too_long, empty]", "data.max_length=12"],
        ["data.path=[{path: PATH, weight: 0.5}, {path: PATH, weight: 3}]"],
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_the_schedule_has_the_updates_of_the_run(tiny_model_folder, tmp_path, settings, kind):
    rows = [{"prompt": f"q{n % 30}", "completion": "a" * (n % 9 + 1)} for n in range(40)]
    rows += [{"prompt": "q", "completion": " "}] * ("empty" in str(settings))
    file = tmp_path / f"train.{kind}"
    write_as(file, rows)
    overrides = [text.replace("PATH", str(file)) for text in settings]
    values = {"model": str(tiny_model_folder()), "data": {"path": str(file)}, "train": {"batch_size": 3, "epochs": 2}}
    config = build_config(values, overrides=overrides)
    assert count_updates(config) == 2 * prepare(config).plan.updates_per_epoch


@pytest.mark.parametrize("setting", ["data.drop=[empty]", "data.valid_split=0.999999"])
def test_a_schedule_of_no_rows_says_what_training_would(tiny_model_folder, tmp_path, setting):
    write_as(tmp_path / "train.jsonl", [{"prompt": "q", "completion": " "}])
    values = {"model": str(tiny_model_folder()), "data": {"path": str(tmp_path)}, "train": {"epochs": 2}}
    config = build_config(values, overrides=[setting])
    said = []
    for call in (count_updates, prepare):
        with pytest.raises(DataError) as caught:
            call(config)
        said.append(str(caught.value))
    assert said[0] == said[1]


def write_as(file, rows):
    """Write rows as a file of its suffix's kind."""
    lines = [json.dumps(row) for row in rows]
    if file.suffix == ".jsonl":
        file.write_text("\n\n".join(lines))
    elif file.suffix == ".json":
        file.write_text(f"[{','.join(lines)}]")
    elif file.suffix == ".csv":
        file.write_text("".join(f"{one},{other}\n" for one, other in [rows[0].keys(), *map(dict.values, rows)]))
    else:
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)


def test_the_schedule_of_rows_that_are_only_counted_keeps_and_reads_none(tiny_model_folder, tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text('{"text": "not looked at"\n' * 40)
    values = {"model": str(tiny_model_folder()), "data": {"path": str(file)}, "train": {"batch_size": 8, "epochs": 2}}
    assert count_updates(build_config(values)) == 10
