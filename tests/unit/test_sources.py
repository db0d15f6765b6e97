"""Sources are mixed as their weights say, what is dropped is counted, and a split never parts equal rows."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from shared.config import DataConfig
from shared.config_file import build_config
from shared.data.batch import Plan
from shared.data.rows import content_hash
from shared.data.sources import load_rows, num_drawn
from shared.errors import ConfigError, DataError
from shared.jobs.prepare import prepare
from shared.seeds import row_order


def write(folder, *rows, name="train.jsonl"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def texts(rows):
    return [row.fields["text"] for row in rows]


ROWS = [{"text": f"row {n % 300}"} for n in range(400)]  # a hundred stand twice


# sources and weights


def test_an_epoch_takes_of_each_source_as_often_as_its_weight_says():
    plan = Plan(sum(num_drawn(((10, 0.5), (4, 2.0)))), 13, seed=3, weights=((10, 0.5), (4, 2.0)))
    first, second = (Counter(plan.rows(epoch).tolist()) for epoch in (1, 2))
    for epoch in (first, second):
        assert sum(count for row, count in epoch.items() if row < 10) == 5
        assert {row: count for row, count in epoch.items() if row >= 10} == dict.fromkeys(range(10, 14), 2)
    assert {row for row in first + second if row < 10} == set(range(10))  # the other half in the next epoch


def test_rows_of_an_update_are_a_function_of_seed_and_step():
    weights = ((100, 0.3), (50, 1.5))
    one, other, else_ = (Plan(105, 16, seed, weights) for seed in (5, 5, 6))
    assert all(np.array_equal(one.rows(step), other.rows(step)) for step in (19, 2, 7))
    assert not np.array_equal(one.rows(2), else_.rows(2))


def test_weights_of_one_change_no_batch():
    assert np.array_equal(Plan(50, 50, 1).rows(3), row_order(seed=1, epoch=2, num_rows=50))


def test_several_sources_stand_one_behind_the_other_and_are_named(tmp_path):
    paths = [write(tmp_path / name, *[{"text": f"{name} {n}"} for n in range(3)]) for name in ("a", "b")]
    found = load_rows(DataConfig.model_validate({"path": [{"path": paths[0]}, {"path": paths[1], "weight": 0.5}]}))
    assert (found.counts, [row.source for row in found.train][2:4]) == ((3, 3), ["a/train.jsonl:3", "b/train.jsonl:1"])
    assert list(found.files) == ["a/train.jsonl", "b/train.jsonl"]
    write(tmp_path / "b", {"text": 3})
    with pytest.raises(DataError, match=r"^b/train.jsonl:1: "):
        load_rows(DataConfig.model_validate({"path": [{"path": path} for path in paths]}))


def test_a_weight_of_nothing_is_refused(tmp_path):
    for wrong in ([], [{"path": "a", "weight": 0}], [{"weight": 1}]):
        with pytest.raises(ConfigError, match=r"data\.path"):
            build_config({"model": "m", "data": {"path": wrong}})


# filters


def test_what_is_dropped_is_counted(tmp_path):
    empty = [
        {"text": ""}, {"text": " \n"}, {"prompt": "q", "completion": None}, {"messages": []}, {"conversations": []},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": " "}]},
    ]  # fmt: skip
    path = write(tmp_path / "a", *empty[:3], {"text": "x"}, *empty[3:], {"text": "y"}, {"text": "x"})
    found = load_rows(DataConfig(path=path, drop=["empty", "duplicate"]))
    assert (texts(found.train), found.dropped) == (["x", "y"], {"empty": 6, "duplicate": 1})
    with pytest.raises(DataError, match=r"train.jsonl:1: .*is empty"):
        load_rows(DataConfig(path=path))


def test_a_damaged_row_is_an_error_whatever_is_dropped(tmp_path):
    path = write(tmp_path / "a", {"text": "x"}, {"text": 3})
    with pytest.raises(DataError, match=r"train.jsonl:2: "):
        load_rows(DataConfig(path=path, drop=["empty", "duplicate", "too_long"]))


def test_long_rows_are_left_out_whole_or_cut(tmp_path, tiny_model_folder):
    path = write(tmp_path / "a", {"text": "xyz" * 9}, {"text": "xyz"}, {"prompt": "p" * 50, "completion": "late"})
    settings = {"model": str(tiny_model_folder()), "data": {"path": path, "max_length": 20}, "train": {"batch_size": 1}}
    found = prepare(build_config(settings, overrides=["data.drop=[too_long]"]))
    assert ([example.source for example in found.train], found.dropped) == (["train.jsonl:2"], {"too_long": 2})
    assert found.plan.num_rows == 1
    with pytest.raises(DataError, match=r"train.jsonl:3: no supervised token"):
        prepare(build_config(settings))
    with pytest.raises(DataError, match=r"all rows of a source have more than 3 tokens"):
        prepare(build_config(settings, overrides=["data.drop=[too_long]", "data.max_length=3"]))


# the split


def test_the_split_is_the_content_s_and_never_parts_equal_rows(tmp_path):
    config = DataConfig(path=write(tmp_path / "a", *ROWS), valid_split=0.2)
    found = load_rows(config)
    assert not set(texts(found.train)) & set(texts(found.valid))
    assert 0.1 < len(found.valid) / len(ROWS) < 0.3
    write(tmp_path / "a", *reversed(ROWS), {"text": "one more"})
    again = load_rows(config)
    assert set(texts(found.valid)) <= set(texts(again.valid)) <= {*texts(found.valid), "one more"}


def test_a_split_of_the_whole_is_refused_and_so_is_a_second_one(tmp_path):
    path = write(tmp_path / "a", {"text": "x"})
    share = int(content_hash(load_rows(DataConfig(path=path)).train)[:16], 16) / 2**64
    with pytest.raises(DataError, match=r"leaves no row"):
        load_rows(DataConfig(path=path, valid_split=min(share * 1.01, 0.999999)))
    write(tmp_path / "a", {"text": "y"}, name="valid.jsonl")
    with pytest.raises(ConfigError, match=r"valid_split, but there is valid.jsonl"):
        load_rows(DataConfig(path=path, valid_split=0.5))


@pytest.mark.parametrize(
    ("content", "message"), [(b"{", r"^b/t\.jsonl:1: not JSON"), (b"\xff", r"^b/t\.jsonl:1: not UTF-8")]
)
def test_a_line_that_cannot_be_read_is_named_with_its_source(tmp_path, content, message):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "t.jsonl").write_bytes(b'{"text": "x"}' if name == "a" else content)
    sources = [{"path": str(tmp_path / name / "t.jsonl")} for name in ("a", "b")]
    with pytest.raises(DataError, match=message):
        load_rows(DataConfig(path=sources))
