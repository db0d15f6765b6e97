"""Files that are whole or absent."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from shared.durable import write_json, write_whole


def test_a_file_is_replaced_whole_and_nothing_lies_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    write_whole(file, b"old")
    write_json(file, {"b": 1, "a": "é"}, sort=True)
    assert json.loads(file.read_text()) == {"a": "é", "b": 1}
    assert file.read_text().endswith("}\n")
    assert os.listdir(tmp_path) == ["config.json"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    (taken / "inside").mkdir(parents=True)  # a folder that holds something is not replaced by a file
    with pytest.raises(IsADirectoryError):
        write_whole(taken, "new")
    assert (taken / "inside").is_dir()
    assert os.listdir(tmp_path) == ["taken"]
