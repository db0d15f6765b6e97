"""Rows that stay in their files are the same rows: same tokens, order, names and counts, whatever is asked of them."""

from __future__ import annotations

import json
import os
import resource
import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest

from shared.config_file import build_config
from shared.data.batch import update_batches
from shared.data.index import MOST_OPEN, Part, open_index, stamp
from shared.data.layout import Layout
from shared.data.stream import Stream, streams, told_first
from shared.errors import CheckpointError, ConfigError, DataError
from shared.estimate.report import read_lengths
from shared.folder import open_folder
from shared.jobs.prepare import prepare
from shared.jobs.train import train
from shared.running.checkpoint import Checkpoint
from shared.running.run_folder import Identity, as_begun

ROWS = [{"prompt": f"what is {n}? ", "completion": f"hello {'x' * (n % 7)} {n}"} for n in range(61)]


def write(folder, rows, name="train.jsonl"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(folder)


@pytest.fixture
def base(tiny_model_folder):
    return tiny_model_folder()


def both(base, data, **settings):
    """Return what is prepared in memory and streamed."""
    data = data if isinstance(data, dict) else {"path": data}
    values = {"model": str(base), "train": {"batch_size": 7, "epochs": 2}, **settings}
    return [prepare(build_config({**values, "data": {**data, "streaming": on}})) for on in (False, True)]


def assert_same(memory, streamed):
    assert isinstance(streamed.train, Stream)
    assert memory.plan == streamed.plan
    assert (memory.kind, memory.dropped, memory.leaks) == (streamed.kind, streamed.dropped, streamed.leaks)
    assert memory.data_files == streamed.data_files
    assert len(memory.valid) == len(streamed.valid)
    for one, other in [
        *zip(memory.train, streamed.train, strict=True),
        *zip(memory.valid, streamed.valid, strict=True),
    ]:
        assert one.source == other.source
        assert np.array_equal(one.tokens, other.tokens)
        assert np.array_equal(one.supervised, other.supervised)


def test_streamed_rows_are_the_rows_and_every_update_takes_the_same(base, tmp_path):
    memory, streamed = both(base, write(tmp_path / "d", ROWS))
    assert_same(memory, streamed)
    for step in range(1, 2 * memory.plan.updates_per_epoch + 1):
        pair = (update_batches(one.train, one.plan, step, Layout(64)) for one in (memory, streamed))
        for one, other in zip(*pair, strict=True):
            assert np.array_equal(one.tokens_BT, other.tokens_BT)
            assert np.array_equal(one.positions_N, other.positions_N)


def test_sources_weights_parts_blank_lines_and_marks_of_the_file_are_as_in_memory(base, tmp_path):
    one = write(tmp_path / "a", ROWS[:20], "train-00000.jsonl")
    write(tmp_path / "a", ROWS[20:30], "train-00001.jsonl")
    write(tmp_path / "a", ROWS[3:5], "valid.jsonl")
    two = tmp_path / "b.jsonl"
    two.write_bytes(b"\xef\xbb\xbf" + b"\n\r\n".join(json.dumps(row).encode() for row in ROWS[30:]))  # no last newline
    memory, streamed = both(base, {"path": [{"path": one, "weight": 0.5}, {"path": str(two), "weight": 2}]})
    assert_same(memory, streamed)
    assert list(memory.leaks.values() if isinstance(memory.leaks, dict) else [memory.leaks]) == [2]


def test_a_mark_of_the_file_alone_on_its_line_is_a_blank_line(base, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\xef\xbb\xbf\r\n" + b"\r\n".join(json.dumps(row).encode() for row in ROWS))
    memory, streamed = both(base, str(file))
    assert_same(memory, streamed)
    assert streamed.train[0].source == "a.jsonl:2"


def test_what_is_dropped_and_parted_is_as_in_memory(base, tmp_path):
    rows = [*ROWS, {"prompt": "q", "completion": "  "}, {"prompt": "q", "completion": None}]
    data = {"path": write(tmp_path / "d", rows), "drop": ["empty"], "valid_split": 0.3}
    memory, streamed = both(base, data)
    assert_same(memory, streamed)
    assert streamed.dropped == {"empty": 2}
    assert 5 < len(streamed.valid) < 40
    memory, streamed = both(base, data, evaluation={"batches": 1})
    assert_same(memory, streamed)


def test_leaks_of_evaluation_sets_are_counted_as_in_memory(base, tmp_path):
    write(tmp_path / "a", ROWS)
    write(tmp_path / "a", [ROWS[1], {"prompt": "q", "completion": "z"}], "valid.jsonl")
    write(tmp_path / "sets", [*ROWS[3:6], {"prompt": "p", "completion": " "}], "own.jsonl")
    settings = {"evaluation": {"sets": {"own": str(tmp_path / "sets/own.jsonl")}, "batches": 1}}
    memory, streamed = both(base, {"path": str(tmp_path / "a"), "drop": ["empty"]}, **settings)
    assert_same(memory, streamed)
    assert streamed.leaks == {"valid.jsonl": 1, "own": 3}
    assert streamed.dropped == {"empty": 1}


def test_other_formats_of_rows_and_columns_are_as_in_memory(base, tmp_path):
    chats = [
        {"conversations": [{"from": "human", "value": f"q{n}"}, {"from": "gpt", "value": f"a {n}"}]} for n in range(5)
    ]
    assert_same(*both(base, write(tmp_path / "chats", chats)))
    renamed = [{"question": row["prompt"], "answer": row["completion"]} for row in ROWS]
    columns = {"prompt": "question", "completion": "answer"}
    assert_same(*both(base, {"path": write(tmp_path / "renamed", renamed), "columns": columns}))


def test_an_index_is_kept_and_made_again_where_the_file_changed(base, tmp_path, monkeypatch):
    monkeypatch.setenv("MLXLORA_CACHE", str(tmp_path / "cache"))
    folder = write(tmp_path / "d", ROWS)
    first = both(base, folder)[1]
    kept = sorted((file.name, file.stat().st_ino) for file in (tmp_path / "cache/rows").iterdir())
    assert both(base, folder)[1].data_hash == first.data_hash
    assert sorted((file.name, file.stat().st_ino) for file in (tmp_path / "cache/rows").iterdir()) == kept
    write(tmp_path / "d", [*ROWS, ROWS[0]])
    again = both(base, folder)[1]
    assert (len(again.train), again.data_hash == first.data_hash) == (62, False)
    for file in (tmp_path / "cache/rows").glob("*.rows"):
        file.write_bytes(file.read_bytes()[:-1])  # cut off
    assert len(both(base, folder)[1].train) == 62


def test_without_a_cache_nothing_stays(base, tmp_path, monkeypatch):
    monkeypatch.setenv("MLXLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = write(tmp_path / "d", ROWS)
    assert_same(*both(base, {"path": folder, "cache": False}))
    assert [item.name for item in tmp_path.iterdir()] == ["d"]
    write(tmp_path / "d", [*ROWS, {"prompt": "no completion"}])
    with pytest.raises(DataError, match=r"train\.jsonl:62"):
        prepare(build_config({"model": str(base), "data": {"path": folder, "cache": False, "streaming": True}}))
    assert [item.name for item in tmp_path.iterdir()] == ["d"]


def test_a_pointer_of_git_lfs_is_told_as_in_memory(base, tmp_path):
    (tmp_path / "train.jsonl").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    for on in (True, False):
        with pytest.raises(DataError, match="is a pointer of Git LFS"):
            prepare(build_config({"model": str(base), "data": {"path": str(tmp_path), "streaming": on}}))


def test_a_file_that_changes_while_the_run_reads_it_is_an_error(base, tmp_path):
    folder = write(tmp_path / "d", ROWS)
    rows = both(base, folder)[1].train
    write(tmp_path / "d", [*ROWS, ROWS[0]])
    with pytest.raises(DataError, match=r"train\.jsonl was changed while the run reads it"):
        rows[0]


def test_a_file_put_in_the_place_of_the_old_one_does_not_get_into_the_run(base, tmp_path):
    rows = both(base, write(tmp_path / "d", ROWS))[1].train
    before = rows[5].tokens
    write(tmp_path / "new", ROWS[::-1])
    os.replace(tmp_path / "new/train.jsonl", tmp_path / "d/train.jsonl")
    assert np.array_equal(rows[5].tokens, before)


def test_more_files_than_a_process_may_open_are_read_a_few_at_a_time(base, tmp_path):
    for number in range(300):
        write(tmp_path / "d", [{"prompt": f"{number}", "completion": f"c{number}"}], f"train-{number:05}.jsonl")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        memory, streamed = both(base, str(tmp_path / "d"))
        assert_same(memory, streamed)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    files = streamed.train.rows.files
    assert len(files.opened) == MOST_OPEN
    closed = next(number for number in range(300) if number not in files.opened)
    files.paths[closed].unlink()
    with pytest.raises(DataError, match=rf"cannot read .*train-{closed:05}\.jsonl: No such file"):
        streamed.train[closed]
    held = next(reversed(files.opened))
    files.paths[held].unlink()
    assert streamed.train[held].source == memory.train[held].source


def test_what_a_killed_process_left_of_an_index_goes_and_what_another_one_writes_stays(base, tmp_path, monkeypatch):
    monkeypatch.setenv("MLXLORA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache/rows").mkdir(parents=True)
    old, new = tmp_path / "cache/rows/a.1.tmp", tmp_path / "cache/rows/b.2.tmp"
    for file in (old, new):
        file.write_bytes(b"half")
    os.utime(old, (0, 0))
    both(base, write(tmp_path / "d", ROWS))
    assert (old.exists(), new.exists()) == (False, True)


def test_an_index_is_made_while_another_process_renames_its_own(base, tmp_path, monkeypatch):
    monkeypatch.setenv("MLXLORA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache/rows").mkdir(parents=True)
    (tmp_path / "cache/rows/gone.rows").symlink_to(tmp_path / "nothing")  # listed, and not there when it is looked at
    assert len(both(base, write(tmp_path / "d", ROWS))[1].train) == len(ROWS)


def test_a_file_that_grows_while_it_is_indexed_is_an_error_and_leaves_no_index(base, tmp_path, monkeypatch):
    monkeypatch.setenv("MLXLORA_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "d", ROWS)
    file = tmp_path / "d/train.jsonl"
    part = Part(file, 0, "", "train.jsonl", stamp(file.stat()))
    write(tmp_path / "d", [*ROWS, ROWS[0]])
    with pytest.raises(DataError, match=r"train\.jsonl was changed while the run reads it"):
        open_index([part], build_config({"model": str(base), "data": {"path": str(tmp_path / "d")}}).data, valid=set())
    assert not list((tmp_path / "cache/rows").iterdir())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', r"train\.jsonl:62: not JSON"),
        ('{"promt": "a", "completion": "b"}', r'train\.jsonl:62: "prompt" is null or missing'),
        ('{"completion": "b", "prompt": 3}', r'train\.jsonl:62: "prompt" is a number'),
        ('{"prompt": "a", "completion": "\udcff"}', r"train\.jsonl:62: not UTF-8 at byte 31"),
    ],
)
def test_a_bad_row_is_named_before_the_run(base, tmp_path, line, message):
    folder = write(tmp_path / "d", ROWS)
    with (tmp_path / "d/train.jsonl").open("a", errors="surrogateescape") as out:
        out.write(line)
    for on in (True, False):
        config = build_config({"model": str(base), "data": {"path": folder, "streaming": on}})
        with pytest.raises(DataError, match=message):
            prepare(config)


def test_a_row_without_a_supervised_token_is_an_error_when_it_is_due(base, tmp_path):
    rows = [*ROWS, {"prompt": "long" * 9, "completion": "a"}]
    train = both(base, write(tmp_path / "d", rows))[1].train
    short = replace(train.encoding, max_length=24)
    with pytest.raises(DataError, match=r"train\.jsonl:62: no supervised token within data.max_length 24"):
        Stream(train.rows, short)[61]
    assert Stream(train.rows, short)[60].supervised.any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": {"drop": ["duplicate"]}}, "data.drop duplicate: every row would have to be remembered"),
        ({"data": {"drop": ["too_long"]}}, "data.drop too_long"),
        ({"train": {"compile": True}}, "train.compile true: its shapes come from the lengths of all rows"),
    ],
)
def test_what_needs_all_rows_first_is_refused_by_name_and_auto_does_without(
    base, tmp_path, monkeypatch, settings, message
):
    data = {"path": write(tmp_path / "d", ROWS), **settings.get("data", {})}
    values = {"model": str(base), **{key: value for key, value in settings.items() if key != "data"}}
    with pytest.raises(ConfigError, match=message):
        prepare(build_config({**values, "data": {**data, "streaming": True}}))
    assert not streams(build_config({**values, "data": data}), least=0)


def test_a_file_without_lines_is_refused_by_name_and_auto_takes_jsonl_of_a_gigabyte(base, tmp_path):
    table = tmp_path / "rows.csv"
    table.write_text("prompt,completion\nq,a\n")
    with pytest.raises(ConfigError, match=r"rows\.csv has no lines to be read one by one"):
        prepare(build_config({"model": str(base), "data": {"path": str(table), "streaming": True}}))
    folder = write(tmp_path / "d", ROWS)
    values = {"model": str(base), "data": {"path": folder}}
    assert isinstance(prepare(build_config(values)).train, list)
    size = (tmp_path / "d/train.jsonl").stat().st_size
    assert [streams(build_config(values), least=least) for least in (size, size + 1)] == [True, False]


def test_of_large_files_it_is_told_how_they_are_read_and_why(base, tmp_path):
    (tmp_path / "t.csv").write_text("prompt,completion\nq,a\n")
    values = {"model": str(base), "data": {"path": write(tmp_path / "d", ROWS)}}
    told = {
        "": "are streamed; each is checked once before the first update",
        "data.streaming=false": "are read into memory: data.streaming false",
        "data.drop=[duplicate]": "are read into memory: data.drop duplicate: every row would have to be remembered",
        f"data.path={tmp_path / 't.csv'}": "are read into memory: t.csv has no lines to be read one by one",
    }
    for setting, words in told.items():
        config = build_config(values, overrides=[setting] if setting else [])
        assert told_first(config) is None
        assert f"0.0 GB of training rows {words}" in told_first(config, least=1)


def test_rows_are_read_rightly_from_two_threads(base, tmp_path):
    memory, streamed = both(base, write(tmp_path / "d", ROWS))
    wrong: list[int] = []

    def compare():
        for number, example in enumerate(memory.train):
            if not np.array_equal(streamed.train[number].tokens, example.tokens):
                wrong.append(number)

    threads = [threading.Thread(target=compare) for _ in range(2)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert wrong == []


class Break(Exception):
    """What ends a run without a word."""


class Breaker:
    """Ends a run behind an update."""

    def on_update(self, step):
        if step == 7:
            raise Break


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_a_run_that_breaks_goes_on_streamed_or_in_memory_to_the_same_bytes(base, tmp_path, backend):
    folder = write(tmp_path / "d", ROWS)

    def config(output, *, on):
        values = {"model": str(base), "data": {"path": folder, "streaming": on}, "output": str(tmp_path / output)}
        settings = {"updates": 12, "batch_size": 8, "dtype": "float32"}
        return build_config(
            {**values, "backend": backend, "device": "cpu", "train": settings, "checkpoint": {"every": 4}}
        )

    def adapter(result):
        return (result.adapter / "adapter_model.safetensors").read_bytes()

    whole = adapter(train(config("whole", on=False)))
    for first, then in ((True, True), (True, False), (False, True)):
        name = f"{first}-{then}"
        with pytest.raises(Break):
            train(config(name, on=first), callbacks=[Breaker()])
        again = train(config(name, on=then))
        assert [one["step"] for one in json_lines(again.output / "metrics.jsonl")] == [10, 12]
        assert adapter(again) == whole
        assert train(config(name, on=first)).already_complete


def test_a_run_does_not_go_on_where_rows_changed_and_are_read_another_way(base, tmp_path):
    def config(*, on):
        data = {"path": str(tmp_path / "d"), "streaming": on}
        settings = {"updates": 2, "batch_size": 4, "dtype": "float32"}
        values = {"model": str(base), "data": data, "output": str(tmp_path / "run"), "train": settings}
        return build_config({**values, "backend": "torch", "device": "cpu"})

    write(tmp_path / "d", ROWS)
    train(config(on=True))
    for on in (False, True):  # of the second, the checkpoint is streamed as well
        write(tmp_path / "d", [*ROWS[1:], ROWS[0]])
        with pytest.raises(CheckpointError, match="data: the training rows"):
            train(config(on=on))


def test_an_older_checkpoint_that_does_not_say_how_rows_were_read_is_compared_both_ways(base, tmp_path):
    memory, streamed = both(base, write(tmp_path / "d", ROWS))
    assert streamed.other_hash() == memory.data_hash
    assert memory.other_hash() == streamed.data_hash
    state = {"identity": {"settings": {}, "data": memory.data_hash, "base": "b"}}
    found = Checkpoint(step=1, adapter={}, optimizer={}, state=state)
    own = Identity({}, streamed.data_hash, "b", streamed=True, other_data=streamed.other_hash)
    told = []
    assert as_begun(own, found, told.append).data == memory.data_hash
    assert told == ["training rows are streamed now and were in memory before: all of them are compared first"]


def json_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_estimate_takes_the_lengths_of_streamed_rows(base, tmp_path):
    data = {"path": write(tmp_path / "d", ROWS), "streaming": True}
    lengths, notes = read_lengths(build_config({"model": str(base), "data": data}), open_folder(base))
    assert (len(lengths.tokens), notes) == (61, ())


def test_a_template_that_touches_no_row_of_the_sample_is_another_identity(base, tmp_path):
    data = write(tmp_path / "d", ROWS)
    base = shutil.copytree(base, tmp_path / "model")  # other tests have the folder too
    _, before = both(base, data)
    (base / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    _, after = both(base, data)
    assert before.data_hash != after.data_hash


def test_an_index_leaves_nothing_behind_where_the_cache_cannot_be_used(base, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("MLXLORA_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    both(base, write(tmp_path / "d", ROWS))
    assert not list((tmp_path / "tmp").glob("mlxlora-rows-*"))
