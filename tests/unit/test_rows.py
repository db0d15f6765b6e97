"""A bad row is one sentence that starts with its file and line."""

from __future__ import annotations

import datetime
import json
import re
from pathlib import Path

import pytest
import yaml

from shared.config import DataConfig
from shared.data.formats import count_values
from shared.data.rows import Row, content_hash, find_data, make_row, other_valid, read_rows, split_files
from shared.errors import DataError
from shared.hub import near_paths

GOOD = {"text": "fine"}
USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
BAD = {
    "half an object": ('{"text": "a"', "not JSON: .* at column"),
    "single quotes": ("{'text': 'a'}", "not JSON"),
    "a list": ("[1, 2]", "a list"),
    "a text": ('"a"', "a text"),
    "null": ("null", ": null"),
    "two objects": ('{"text": "a"} {"text": "b"}', "not JSON: Extra data"),
    "a comma behind it": ('{"text": "a"},', "not JSON"),
    "no UTF-8": (b'{"text": "\xff"}', "not UTF-8 at byte 10"),
    "UTF-16": ('{"text": "a"}'.encode("utf-16"), "not UTF-8"),
    "nested too deeply": ("[" * 100_000, "nested too deeply"),
    "an empty object": ({}, "unknown row, its keys are: none"),
    "unknown keys": ({"question": "q", "answer": "a"}, 'unknown row, its keys are: "answer", "question"'),
    "a typo": ({"mesages": []}, r'(?s)unknown row.*did you mean "messages"\?'),
    "ShareGPT without turns": ({"conversations": []}, '"messages" is empty or not a list'),
    "ShareGPT with an unknown speaker": (
        {"conversations": [{"from": "martian", "value": "a"}]},
        r'message 0 has role "martian" in "from"\n.*known: .*gpt, human.*system',
    ),
    "ShareGPT's speaker, mistyped": (
        {"conversations": [{"from": "humn", "value": "a"}, {"from": "gpt", "value": "b"}]}, r'did you mean "human"',
    ),
    "Alpaca without an answer": (
        {"instruction": "x"}, r'"instruction" \(this looks like Alpaca, "output" is missing\)',
    ),
    "a prompt and its answer under another name": (
        {"prompt": "q", "reply": "a", "id": 1}, r"data.columns: {prompt: prompt, completion: reply}",
    ),
    "a completion without its prompt": (
        {"completion": "q", "asked": "a", "who": "b"},
        r'data.columns: {prompt: NAME, completion: completion}, NAME one of "asked", "who"',
    ),
    "a prompt whose completion is null": ({"prompt": "q", "completion": None, "id": "x7"}, r'"completion" is null'),
    "an array over one line": ([{"text": "a"}], r"a JSON array: name the file .json, or write one object per line"),
    "an array that begins": ('[{"text": "a"},', r"a JSON array: name the file .json, or write one object per line"),
    "ShareGPT with a list as speaker": ({"conversations": [{"from": [], "value": "a"}]}, "message 0 has no role"),
    "a call that is none": (
        {"conversations": [{"from": "function_call", "value": "[1]"}]}, "a function_call that is no call",
    ),
    "Alpaca without an output": ({"instruction": "i", "input": "o"}, r"this looks like Alpaca"),
    "Alpaca with a number": ({"instruction": "i", "output": 3}, 'message 1: "content" is a number'),
    "a preference set": ({"chosen": "a", "rejected": "b"}, r"this looks like a preference set"),
    "text null": ({"text": None}, '"text" is null or missing'),
    "text a number": ({"text": 3}, '"text" is a number'),
    "text empty": ({"text": ""}, '"text" is empty'),
    "half a surrogate pair": ('{"text": "a\\ud83d"}', "half a surrogate pair at 1"),
    "no completion": ({"prompt": "p"}, '"completion" is null or missing'),
    "no prompt": ({"completion": "c"}, '"prompt" is null or missing'),
    "completion empty": ({"prompt": "p", "completion": ""}, '"completion" is empty'),
    "completion a list": ({"prompt": "p", "completion": ["c"]}, '"completion" is a list'),
    "text and a prompt": (
        {"text": "a", "prompt": "p", "completion": "c"}, r'both "prompt" \+ "completion" and "text".*\n.*data.columns',
    ),
    "messages empty": ({"messages": []}, '"messages" is empty or not a list'),
    "messages a text": ({"messages": "hi"}, '"messages" is empty or not a list'),
    "messages null": ({"messages": None}, '"messages" is empty or not a list'),
    "a message that is a text": ({"messages": ["hi"]}, "message 0 is a text"),
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
    "content null of a user": ({"messages": [{"role": "user", "content": None}, ASSISTANT]}, "null or missing"),
    "a part that is an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ASSISTANT]},
        'message 0: "content" has a part of type "image_url"',
    ),
    "a weight of a half": ({"messages": [USER, {**ASSISTANT, "weight": 0.5}]}, '"weight" is a number'),
    "a role of ShareGPT's": (
        {"messages": [{"role": "human", "content": "a"}, ASSISTANT]}, r'(?s)role "human".*did you mean "user"',
    ),
    "messages in Python's words": ({"messages": "[{'role': 'user'}]"}, r"(?s)a text.*JSON has double quotes"),
    "a completion that is a text, of a prompt of messages": (
        {"prompt": [USER], "completion": "a"}, r'(?s)"prompt" is a list of messages, "completion" is not.*two lists',
    ),
    "a text alone": ('"a"', r'(?s)a text\n.*{"text": "..."}'),
    "messages alone": ([USER, ASSISTANT], r'(?s)a list\n.*{"messages": \[...\]}'),
    "a key twice": ('{"text": "a", "text": "b"}', 'the key "text" stands twice'),
    "a key twice, inside": (
        '{"messages": [{"role": "user", "role": "assistant", "content": "a"}]}', 'the key "role" stands twice',
    ),
    "a prompt and messages": (
        {"prompt": "p", "completion": "c", "messages": [USER, ASSISTANT]},
        r'(?s)both "messages" and "prompt" \+ "completion".*data.columns: {messages: messages}',
    ),
    "a text and messages": ({"text": "t", "messages": [USER, ASSISTANT]}, 'both "messages" and "text"'),
    "messages twice": (
        {"conversations": [{"from": "gpt", "value": "a"}], "messages": [ASSISTANT]},
        'both "messages" and "conversations"',
    ),
    "a preference set with a prompt": (
        {"prompt": "p", "chosen": "a", "rejected": "b"}, r"(?s)preference set.*{prompt: prompt, completion: chosen}",
    ),
    "other names": ({"question": "q", "answer": "a"}, r"data.columns: {prompt: question, completion: answer}"),
    "a response": ({"prompt": "q", "response": "a"}, r"data.columns: {prompt: prompt, completion: response}"),
    "blanks around a name": ({"prompt": "q", " completion": "a"}, r'the name " completion" has blanks'),
    "rows inside a row": ({"data": [GOOD, GOOD]}, 'write the list of "data" alone'),
    "a number as an answer": ({"messages": [USER, {"role": "assistant", "content": 4}]}, r'write it as a text: "4"'),
    "a comma inside, behind": ('{"text": "a",}', "remove the comma before }"),
    "a comma behind, told": ('{"text": "a"},', "remove the comma at the end"),
    "two objects, told": ('{"text": "a"} {"text": "b"}', "a line for each object"),
    "Python's quotes": ("{'text': 'a'}", "JSON has double quotes"),
    "the beginning of an object": ("{", "write every row on one line"),
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


@pytest.mark.parametrize(
    ("row", "fields", "unread"),
    [
        (
            {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT], "tools": [{"name": "f"}], "id": 1},
            {"messages": [USER, {**ASSISTANT, "weight": 0}, USER, ASSISTANT], "tools": [{"name": "f"}]}, ("id",),
        ),
        ({"messages": None, "prompt": "p", "completion": "c"}, {"prompt": "p", "completion": "c"}, ()),
        ({"prompt": "p", "messages": [USER, ASSISTANT]}, {"messages": [USER, ASSISTANT]}, ("prompt",)),
        (
            {"instruction": "q", "output": "a", "text": "q a", "id": 3}, {"messages": [USER, ASSISTANT]},
            ("text", "id"),
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ASSISTANT]},
            {"messages": [USER, ASSISTANT]}, (),
        ),
        (
            {
                "messages": [USER, {"role": "assistant", "content": None, "function_call": {"name": "f"}},
                             {"role": "function", "name": "f", "content": "3"}, ASSISTANT],
                "functions": [{"name": "f"}],
            },
            {
                "messages": [
                    USER, {"role": "assistant", "content": None,
                           "tool_calls": [{"type": "function", "function": {"name": "f"}}]},
                    {"role": "tool", "name": "f", "content": "3"}, ASSISTANT],
                "tools": [{"type": "function", "function": {"name": "f"}}],
            },
            (),
        ),
    ],
)  # fmt: skip
def test_what_a_row_means_is_read_and_the_rest_is_known(row, fields, unread):
    assert make_row(row, source="a.jsonl:1") == Row(next(iter(fields)), fields, "a.jsonl:1", unread)


CALLED = {"messages": [USER, ASSISTANT], "tools": [{"name": "f"}]}
SHARED = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({**CALLED, "text": "t"}, CALLED),
        ({**SHARED, "text": "t"}, {"messages": [USER, ASSISTANT]}),
        ({**SHARED, "messages": [ASSISTANT]}, {"messages": [ASSISTANT]}),
        ({"prompt": "p", "completion": "c", "text": "t"}, {"prompt": "p", "completion": "c"}),
    ],
)
def test_the_columns_that_an_error_names_read_one_way_and_all_of_it(row, fields):
    with pytest.raises(DataError) as caught:
        make_row(row, source="a.jsonl:1")
    named = yaml.safe_load(caught.value.fix.removeprefix("choose: data.columns: "))
    columns = DataConfig(path="a.jsonl", columns=named).columns
    assert make_row(row, source="a.jsonl:1", columns=columns).fields == fields


@pytest.mark.parametrize(
    "row", [{**SHARED, "system": "s", "text": "t"}, {**CALLED, "functions": [{"name": "f"}], "text": "t"}]
)
def test_columns_that_would_lose_a_part_of_a_row_are_not_named(row):
    with pytest.raises(DataError, match=r"(?s)both .*take one out of the row"):
        make_row(row, source="a.jsonl:1")


def test_one_object_over_several_lines_of_json_is_one_row(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(GOOD, indent=2))
    assert read_rows(tmp_path / "a.json") == [Row("text", GOOD, "a.json:1")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "prompt;completion\na;b\n", r'(?s)a.csv:1: the file looks semicolon-separated.*save it'),
        ("a.csv", "prompt\tcompletion\na\tb\n", r"(?s)looks tab-separated.*rename it to .tsv"),
        ("a.tsv", "prompt,completion\na,b\n", r"(?s)looks comma-separated.*rename it to .csv"),
        ("a.csv", "prompt,completion\n", r"(?s)has no rows.*a header, and rows below it"),
        ("a.csv", "prompt,completion\na,b,c\n", r'(?s)a.csv:2: 3 cells, the header has 2.*into quotes'),
        ("a.csv", 'prompt,completion\n"a "b" c",d\n', r'(?s)a.csv:2: not CSV.*write "" for a quote'),
    ],
)  # fmt: skip
def test_a_table_that_looks_otherwise_says_how(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_a_pointer_of_git_lfs_is_told(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(DataError, match=r"(?s)is a pointer of Git LFS.*git lfs pull"):
        read_rows(tmp_path / name)
    with pytest.raises(DataError, match="is a pointer of Git LFS"):
        count_values(tmp_path / name)


@pytest.mark.parametrize(("name", "fix"), [("a.jsonl.gz", "gunzip"), ("a.txt", r'{"text": "..."}')])
def test_a_file_of_another_kind_says_what_to_make_of_it(tmp_path, name, fix):
    (tmp_path / name).touch()
    with pytest.raises(DataError) as caught:
        split_files(tmp_path / name, "train")
    assert fix in str(caught.value)


def test_a_csv_of_windows_with_a_mark_and_line_ends_in_cells_is_read(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbfprompt,completion\r\n"one\r\ntwo",b\r\nc,d\r\n')
    rows = read_rows(tmp_path / "a.csv")
    assert [row.fields["prompt"] for row in rows] == ["one\r\ntwo", "c"]
    assert [row.source for row in rows] == ["a.csv:2", "a.csv:4"]


def test_the_line_that_is_not_utf8_is_named_though_a_table_is_read_in_pieces(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"text\n" + b"fine\n" * 3000 + "na\u00efve\n".encode("cp1252"))
    with pytest.raises(DataError, match=r"(?s)a.csv:3002: not UTF-8 at byte 2.*CSV UTF-8"):
        read_rows(tmp_path / "a.csv")


def test_an_empty_cell_of_a_table_is_no_second_row(tmp_path):
    turns = '"[{""role"": ""assistant"", ""content"": ""a""}]"'
    (tmp_path / "a.csv").write_text(f"prompt,completion,messages,text\np,c,,\n,c,,\n,,{turns},\n,,,t\n")
    rows = read_rows(tmp_path / "a.csv")
    assert [row.kind for row in rows] == ["prompt", "prompt", "messages", "text"]
    assert not any(row.unread for row in rows)
    (tmp_path / "a.csv").write_text(f"prompt,completion,messages\n,c,{turns}\n")
    with pytest.raises(DataError, match="both"):
        read_rows(tmp_path / "a.csv")


def test_a_parquet_file_without_rows_is_told(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), str(tmp_path / "a.parquet"))
    with pytest.raises(DataError, match=r"(?s)a.parquet has no rows.*a table of rows"):
        read_rows(tmp_path / "a.parquet")


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


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("training.jsonl", "rename training.jsonl to train.jsonl, or data.splits: {train: training}"),
        ("Train.JSONL", "rename Train.JSONL to train.jsonl;"),
        ("train.txt", 'train.txt: write every text as {"text": "..."}'),
        ("train.jsonl.gz", "train.jsonl.gz: unpack it: gunzip"),
        ("sql.csv", "give the file itself: .*sql.csv"),
        ("notes.md", "^it holds: notes.md"),
    ],
)
def test_a_folder_without_train_jsonl_says_what_to_do_with_a_file_of_a_near_name(tmp_path, name, fix):
    (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"has no train.jsonl") as caught:
        split_files(tmp_path, "train")
    assert re.search(fix, caught.value.fix)
    assert f"it holds: {name}" in caught.value.fix


@pytest.mark.parametrize(
    ("name", "found"), [("dev", "dev"), ("Validation", "Validation"), ("test", None), ("validation", None)]
)
def test_rows_to_evaluate_on_are_known_by_the_names_that_others_give_them(tmp_path, name, found):
    for file in ("train.jsonl", f"{name}.jsonl", "dev.md"):
        (tmp_path / file).touch()
    assert other_valid(tmp_path) == found


def test_an_empty_folder_is_called_empty(tmp_path):
    with pytest.raises(DataError, match=r"(?s)has no train.jsonl.*this folder is empty"):
        split_files(tmp_path, "train")


@pytest.mark.parametrize(
    ("row", "advised"),
    [({"Customer Question": "why?", "id": "1", "the_reply": "so"}, True), ({"a": "b", "n": 3}, False)],
)
def test_columns_of_other_names_are_told_how_to_be_named(write_jsonl, row, advised):
    with pytest.raises(DataError, match="unknown row") as caught:
        list(read_rows(write_jsonl(row)))
    assert ("data.columns={prompt: NAME" in str(caught.value)) == advised


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


@pytest.mark.parametrize("name", ["data/trian.jsonl", "dat/train.jsnl", "org/rows.csv"])
def test_a_mistyped_file_is_not_taken_for_a_hub_id(tmp_path, monkeypatch, name):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        find_data(name)
    assert str(caught.value).startswith(f"no such file: {name}; not a hub id either")
    if name.startswith("dat"):
        assert 'did you mean "data/train.jsonl"?' in str(caught.value)


def test_a_mistyped_folder_is_told_beside_what_the_hub_says(tmp_path, monkeypatch):
    (tmp_path / "data/wikisql").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r'(?s)"data/wikisq" is no folder here.*did you mean "data/wikisql".*Else:'):
        find_data("data/wikisq")


def test_names_near_a_mistyped_path_are_found_in_folders_of_similar_names_too(tmp_path, monkeypatch):
    for name in ("data/train.jsonl", "data/valid.jsonl", "dat/other.txt", "models/llama/config.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    named = ("dat/train.jsnl", "data/trai", "modls/lama", "nowhere/x", "train.jsonl")
    found = {name: near_paths(Path(name))[:1] for name in named}
    assert found == {
        "dat/train.jsnl": ["data/train.jsonl"], "data/trai": ["data/train.jsonl"], "modls/lama": ["models/llama"],
        "nowhere/x": [], "train.jsonl": [],
    }  # fmt: skip


def test_splits_of_other_names_are_told_and_have_to_be_there(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("train_sft-00000-of-00001", "train_gen-00000-of-00001", "test_sft-00000-of-00001"):
        (tmp_path / f"data/{name}.jsonl").write_text('{"text": "a"}\n')
    names = {"train": "train_sft", "valid": "test_sft"}
    found = [[file.name for file in split_files(tmp_path, split, names=names)] for split in ("train", "valid")]
    assert found == [["train_sft-00000-of-00001.jsonl"], ["test_sft-00000-of-00001.jsonl"]]
    with pytest.raises(DataError, match=r"has no nothing\.jsonl"):
        split_files(tmp_path, "valid", names={"valid": "nothing"})
