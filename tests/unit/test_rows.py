"""A bad row is one sentence that starts with its file and line."""

from __future__ import annotations

import datetime
import json

import pytest

from shared.data.rows import Row, content_hash, find_data, make_row, read_rows, split_files
from shared.errors import DataError

GOOD = {"text": "fine"}
USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
BAD = {
    "half an object": ('{"text": "a"', "not JSON: .* at column"),
    "single quotes": ("{'text': 'a'}", "not JSON"),
    "a list": ("[1, 2]", "a list"),
    "a text": ('"a"', "a str"),
    "null": ("null", "a NoneType"),
    "two objects": ('{"text": "a"} {"text": "b"}', "not JSON: Extra data"),
    "a comma behind it": ('{"text": "a"},', "not JSON"),
    "no UTF-8": (b'{"text": "\xff"}', "not UTF-8 at byte 10"),
    "UTF-16": ('{"text": "a"}'.encode("utf-16"), "not UTF-8"),
    "nested too deeply": ("[" * 100_000, "nested too deeply"),
    "an empty object": ({}, "unknown row, its keys are: none"),
    "unknown keys": ({"question": "q", "answer": "a"}, "unknown row, its keys are: answer, question"),
    "a typo": ({"mesages": []}, r'(?s)unknown row.*did you mean "messages"\?'),
    "ShareGPT without turns": ({"conversations": []}, '"messages" is empty or not a list'),
    "ShareGPT with an unknown speaker": ({"conversations": [{"from": "martian", "value": "a"}]}, 'has role "martian"'),
    "ShareGPT with a list as speaker": ({"conversations": [{"from": [], "value": "a"}]}, "message 0 has no role"),
    "a call that is none": (
        {"conversations": [{"from": "function_call", "value": "[1]"}]}, "a function_call that is no call",
    ),
    "Alpaca without an output": ({"instruction": "i", "input": "o"}, r"this looks like Alpaca"),
    "Alpaca with a number": ({"instruction": "i", "output": 3}, 'message 1: "content" is a int'),
    "a preference set": ({"chosen": "a", "rejected": "b"}, r"this looks like a preference set"),
    "text null": ({"text": None}, '"text" is null or missing'),
    "text a number": ({"text": 3}, '"text" is a int'),
    "text empty": ({"text": ""}, '"text" is empty'),
    "half a surrogate pair": ('{"text": "a\\ud83d"}', "half a surrogate pair at 1"),
    "no completion": ({"prompt": "p"}, '"completion" is null or missing'),
    "no prompt": ({"completion": "c"}, '"prompt" is null or missing'),
    "completion empty": ({"prompt": "p", "completion": ""}, '"completion" is empty'),
    "completion a list": ({"prompt": "p", "completion": ["c"]}, '"completion" is a list'),
    "text and a prompt": ({"text": "a", "prompt": "p", "completion": "c"}, 'both "text" and "prompt"'),
    "messages empty": ({"messages": []}, '"messages" is empty or not a list'),
    "messages a text": ({"messages": "hi"}, '"messages" is empty or not a list'),
    "messages null": ({"messages": None}, '"messages" is empty or not a list'),
    "a message that is a text": ({"messages": ["hi"]}, "message 0 has no role"),
    "a message without a role": ({"messages": [USER, {"content": "a"}]}, "message 1 has no role"),
    "a role that is a number": ({"messages": [{"role": 1, "content": "a"}]}, "message 0 has no role"),
    "an unknown role": (
        {"messages": [USER, {"role": "assitant", "content": "a"}]}, r'(?s)message 1 has role.*did you mean "assistant"',
    ),
    "content null": (
        {"messages": [USER, {"role": "assistant", "content": None}]}, 'message 1: "content" is null or missing',
    ),
    "content a list": ({"messages": [{"role": "user", "content": ["a"]}, ASSISTANT]}, 'message 0: "content" is a list'),
    "half a pair in content": (
        '{"messages": [{"role": "user", "content": "\\udc00"}, {"role": "assistant", "content": "a"}]}',
        "message 0: .*surrogate",
    ),
    "nobody answers": ({"messages": [USER, USER]}, "no assistant message, so nothing to learn"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_named_by_file_and_line(write_jsonl, kind):
    row, message = BAD[kind]
    with pytest.raises(DataError, match=message) as caught:
        read_rows(write_jsonl(GOOD, "", row, GOOD))
    assert str(caught.value).startswith("train.jsonl:3: ")
    assert str(caught.value).count("\n") <= 2


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"text": "a"}, "text"),
        ({"prompt": "p", "completion": "c"}, "prompt"),
        ({"prompt": "", "completion": "c"}, "prompt"),
        ({"messages": [USER, ASSISTANT]}, "messages"),
        ({"messages": [{"role": "system", "content": ""}, USER, ASSISTANT]}, "messages"),
        ({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{}]}]}, "messages"),
        ({"messages": [USER, ASSISTANT], "tools": [{"name": "f"}]}, "messages"),
    ],
)
def test_each_kind_of_row_is_told_by_its_keys(write_jsonl, row, kind):
    found = read_rows(write_jsonl(row))
    assert found == [Row(kind, row, "train.jsonl:1")]


def test_extra_columns_are_left_out(write_jsonl):
    row = {"prompt": "p", "completion": "c", "id": 7, "source": "x"}
    assert read_rows(write_jsonl(row))[0].fields == {"prompt": "p", "completion": "c"}


def test_blank_lines_count_but_are_passed_over(write_jsonl):
    rows = read_rows(write_jsonl("", GOOD, "   ", GOOD, ""))
    assert [row.source for row in rows] == ["train.jsonl:2", "train.jsonl:4"]


def test_windows_line_ends_and_a_byte_order_mark_are_read(write_jsonl):
    file = write_jsonl(b'\xef\xbb\xbf{"text": "a"}\r', b'{"text": "b"}\r')
    assert [row.fields["text"] for row in read_rows(file)] == ["a", "b"]


def test_line_separators_of_unicode_do_not_split_a_row(write_jsonl):
    text = "a\u2028b\u0085c"
    assert read_rows(write_jsonl(json.dumps({"text": text}, ensure_ascii=False)))[0].fields["text"] == text


def test_a_file_without_rows_is_refused(write_jsonl):
    with pytest.raises(DataError, match=r"train.jsonl has no rows"):
        read_rows(write_jsonl("", "  "))


def test_a_file_that_cannot_be_read_is_one_clear_error(tmp_path):
    with pytest.raises(DataError, match=r"cannot read"):
        read_rows(tmp_path / "absent.jsonl")


# folders and names


def test_a_folder_gives_the_splits_it_has(write_jsonl, tmp_path):
    train, valid = write_jsonl(GOOD), write_jsonl(GOOD, name="valid.jsonl")
    assert [split_files(tmp_path, split) for split in ("train", "valid", "test")] == [[train], [valid], []]


def test_a_single_file_is_its_own_train_split(write_jsonl):
    file = write_jsonl(GOOD, name="mine.jsonl")
    assert split_files(file, "train") == [file]
    assert split_files(file, "valid") == []


def test_a_folder_without_train_jsonl_says_what_it_holds(tmp_path):
    (tmp_path / "training.jsonl").touch()
    with pytest.raises(DataError, match=r"(?s)has no train.jsonl.*it holds: training.jsonl"):
        split_files(tmp_path, "train")


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "rows.xml").touch()
    with pytest.raises(DataError, match=r"(?s)rows.xml is no data file.*one of .jsonl, .json, .csv, .tsv, .parquet"):
        split_files(tmp_path / "rows.xml", "train")


@pytest.mark.parametrize(
    "names",
    [
        ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "validation-00000-of-00001.jsonl"),
        ("data/train-0.csv", "data/train-1.csv", "data/validation-0.csv"),
        ("train/0.parquet", "train/1.parquet", "valid/0.parquet"),
    ],
)
def test_a_split_may_be_in_parts_as_the_hub_has_them(tmp_path, names):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [str(file.relative_to(tmp_path)) for file in split_files(tmp_path, "train")] == list(names[:2])
    assert [str(file.relative_to(tmp_path)) for file in split_files(tmp_path, "valid")] == list(names[2:])


def test_two_kinds_of_one_split_are_refused(tmp_path):
    (tmp_path / "train.jsonl").touch()
    (tmp_path / "train.csv").touch()
    with pytest.raises(DataError, match=r"has train.csv and train.jsonl"):
        split_files(tmp_path, "train")


def test_a_copy_of_a_split_under_another_name_is_not_read(tmp_path, write_jsonl):
    old, train = write_jsonl(GOOD, name="train.old.jsonl"), write_jsonl(GOOD)
    assert old not in split_files(tmp_path, "train") == [train]


def test_a_path_that_is_absent_is_not_looked_up_on_the_hub():
    with pytest.raises(DataError, match=r"no data at"):
        find_data("./absent/rows")
    with pytest.raises(DataError, match=r"is not downloaded"):
        find_data("no-such-org/no-such-set")


def test_the_content_hash_sees_order_and_content_but_not_the_files_name():
    one, two = Row("text", {"text": "a"}, "x:1"), Row("text", {"text": "b"}, "x:2")
    assert content_hash([one, two]) == content_hash([Row("text", {"text": "a"}, "y:9"), two])
    assert len({content_hash([one, two]), content_hash([two, one]), content_hash([one]), content_hash([])}) == 4


def test_a_date_inside_of_messages_is_an_error_with_its_row():
    turn = {"role": "assistant", "content": "hi", "at": datetime.date(2026, 11, 20)}
    with pytest.raises(DataError, match='1: "messages": Object of type date'):
        make_row({"messages": [turn]}, source="a.parquet:1")


@pytest.mark.parametrize("name", ["data/trian.jsonl", "org/rows.csv"])
def test_a_mistyped_file_is_not_taken_for_a_hub_id(tmp_path, monkeypatch, name):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        find_data(name)
    assert str(caught.value).startswith(f"no such file: {name}; not a hub id either")
    if name.startswith("data"):
        assert 'did you mean "data/train.jsonl"?' in str(caught.value)


def test_splits_of_other_names_are_told_and_have_to_be_there(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("train_sft-00000-of-00001", "train_gen-00000-of-00001", "test_sft-00000-of-00001"):
        (tmp_path / f"data/{name}.jsonl").write_text('{"text": "a"}\n')
    names = {"train": "train_sft", "valid": "test_sft"}
    found = [[file.name for file in split_files(tmp_path, split, names=names)] for split in ("train", "valid")]
    assert found == [["train_sft-00000-of-00001.jsonl"], ["test_sft-00000-of-00001.jsonl"]]
    with pytest.raises(DataError, match=r"has no nothing\.jsonl"):
        split_files(tmp_path, "valid", names={"valid": "nothing"})
