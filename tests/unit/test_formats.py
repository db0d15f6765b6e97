"""Every format gives the rows that JSONL gives, and every problem names its file and line."""

from __future__ import annotations

import csv
import json

import pyarrow
import pytest
from pyarrow import parquet

from shared.data.formats import read_values
from shared.data.rows import read_rows
from shared.errors import DataError

ROWS = [
    {"prompt": 'q, with "quotes"\nand a line', "completion": "naïve 🦊\tend"},
    {"prompt": "", "completion": " x "},
    {"prompt": "third", "completion": "3"},
]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "two"},
]
SHAREGPT = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "1+1?"},
    {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
    {"from": "observation", "value": "2"},
    {"from": "gpt", "value": "two"},
]
TOOLS = [{"name": "add"}]


def write_json(file, rows):
    file.write_text(json.dumps(rows, indent=1), encoding="utf-8-sig")


def write_lines(file, rows):
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def write_table(file, rows):
    with file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, rows[0], delimiter="\t" if file.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(file, rows):
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)


WRITERS = {
    "rows.jsonl": write_lines, "rows.json": write_json, "lines.json": write_lines, "rows.csv": write_table,
    "rows.tsv": write_table, "rows.parquet": write_parquet,
}  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_rows(tmp_path, name):
    WRITERS[name](tmp_path / name, ROWS)
    found = read_rows(tmp_path / name)
    assert [row.fields for row in found] == ROWS
    assert [row.source.rpartition(":")[0] for row in found] == [name] * 3


@pytest.mark.parametrize("name", [name for name in WRITERS if not name.endswith(("csv", "tsv"))])
def test_every_nested_format_gives_conversations_and_tools(tmp_path, name):
    WRITERS[name](tmp_path / name, [{"messages": TALK, "tools": TOOLS}])
    assert read_rows(tmp_path / name)[0].fields == {"messages": TALK, "tools": TOOLS}


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet"])
def test_a_conversation_may_stand_in_a_cell_as_json(tmp_path, name):
    WRITERS[name](tmp_path / name, [{"messages": json.dumps(TALK), "tools": json.dumps(TOOLS)}])
    assert read_rows(tmp_path / name)[0].fields == {"messages": TALK, "tools": TOOLS}


def test_places_are_the_lines_where_rows_begin(tmp_path):
    write_table(tmp_path / "rows.csv", ROWS)
    write_json(tmp_path / "rows.json", ROWS)
    assert [source for _, source in read_values(tmp_path / "rows.csv")] == [f"rows.csv:{n}" for n in (2, 4, 5)]
    assert [source for _, source in read_values(tmp_path / "rows.json")] == [f"rows.json:{n}" for n in (2, 6, 10)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"text": "a"},\n{"text": "b"', r"^a.json:2: not JSON: the array does not end"),
        ("a.json", '[{"text": "a"},\n{"text": "b', r"^a.json:2: not JSON: the array does not end"),
        ("a.json", '[{"text": "a"},\n', r"^a.json:2: not JSON: the array does not end"),
        ("a.json", '[{"text" "a"}]', r"(?s)^a.json:1: not JSON: Expecting.*an array of JSON objects"),
        ("a.json", '[{"text": "a"}\n{"text": "b"}]', r"^a.json:1: not JSON: a value is followed by '{'"),
        ("a.json", '[{"text": "a"},\n]', r"^a.json:2: not JSON"),
        ("a.json", '[{"text": "a"},\n[1]]', r"^a.json:2: a list"),
        ("a.json", '[{"text": "a"}', r"^a.json:1: not JSON: the array does not end"),
        ("a.json", "[" * 100_000, r"^a.json:1: nested too deeply"),
        ("a.json", "[]", r"^a.json has no rows"),
        ("a.csv", "", r"^a.csv has no rows"),
        ("a.csv", "text\n", r"^a.csv has no rows"),
        ("a.csv", "text,text\na,b\n", r"^a.csv:1: a column stands twice"),
        ("a.csv", "text\n\na,b\n", r"^a.csv:3: 2 cells, the header has 1"),
        ("a.csv", 'text\n"a\nb', r"^a.csv:2: not CSV"),
        ("a.csv", "question\na\n", r'^a.csv:2: unknown row, its keys are: "question"'),
        ("a.csv", b"text\n\xff\n", r"^a.csv:\d: not UTF-8"),
        ("a.parquet", "PAR1", r"^a.parquet: not a Parquet file"),
        ("a.parquet", "", r"^a.parquet: not a Parquet file"),
    ],
)
def test_what_is_damaged_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message) as caught:
        read_rows(tmp_path / name)
    assert str(caught.value).count("\n") <= 2


def test_what_stands_behind_an_array_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('[{"text": "a"}]\n{"text": "b"}')
    with pytest.raises(DataError, match=r"^a.json: not JSON: more behind the array"):
        read_rows(tmp_path / "a.json")


# what others call their columns


def test_sharegpt_becomes_messages(write_jsonl):
    rows = [{"conversations": SHAREGPT, "tools": json.dumps(TOOLS)}, {"messages": SHAREGPT, "tools": TOOLS}]
    rows.append({"system": "Be brief.", "conversations": SHAREGPT[1:], "tools": TOOLS, "id": 3})
    for row in read_rows(write_jsonl(*rows)):
        assert row.fields == {"messages": TALK, "tools": TOOLS}


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"instruction": "Add.", "input": "1, 2", "output": "3"}, "Add.\n\n1, 2"),
        ({"instruction": "Say 3.", "input": "", "output": "3", "text": "Below is ..."}, "Say 3."),
        ({"instruction": "Say 3.", "output": "3"}, "Say 3."),
    ],
)
def test_alpaca_becomes_a_question_and_an_answer(write_jsonl, row, asked):
    talk = [{"role": "user", "content": asked}, {"role": "assistant", "content": "3"}]
    assert read_rows(write_jsonl(row))[0].fields == {"messages": talk}
    told = read_rows(write_jsonl({**row, "system": "s"}))[0].fields["messages"]
    assert told == [{"role": "system", "content": "s"}, *talk]


def test_columns_of_other_names_are_taken_as_told(write_jsonl):
    file = write_jsonl({"question": "q", "answer": "a", "text": "not this"})
    assert read_rows(file, columns={"prompt": "question", "completion": "answer"})[0].fields == {
        "prompt": "q", "completion": "a",
    }  # fmt: skip
    dialogue = write_jsonl({"dialogue": SHAREGPT, "functions": TOOLS})
    found = read_rows(dialogue, columns={"messages": "dialogue", "tools": "functions"})
    assert found[0].fields == {"messages": TALK, "tools": TOOLS}


def test_a_column_that_is_absent_is_named_with_the_nearest(write_jsonl):
    with pytest.raises(DataError, match=r'(?s)^train.jsonl:1: no column "anser".*did you mean "answer"'):
        read_rows(write_jsonl({"question": "q", "answer": "a"}), columns={"prompt": "question", "completion": "anser"})
