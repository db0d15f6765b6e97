"""New folders are whole or absent, and never at the cost of a source or of something unknown."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from shared.convert.target import ADAPTER, MODEL, check_target, new_folder
from shared.errors import ConfigError, StorageError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    (folder / "inner").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_a_folder_appears_whole(tmp_path, source):
    with new_folder(tmp_path / "a/b", sources=[source]) as staged:
        (staged / "config.json").write_text("{}")
        assert not (tmp_path / "a/b").exists()
    assert [path.name for path in (tmp_path / "a/b").iterdir()] == ["config.json"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_nothing(tmp_path, source, error):
    with pytest.raises(error), new_folder(tmp_path / "out", sources=[source]) as staged:  # noqa: PT012
        (staged / "half").write_text("")
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_error_leaves_the_older_folder_as_it_was(tmp_path, source):
    old = tmp_path / "out"
    old.mkdir()
    (old / "config.json").write_text("old")
    with pytest.raises(ValueError, match="x"), new_folder(old, sources=[source], force=True):
        raise ValueError("x")
    assert (old / "config.json").read_text() == "old"


def test_force_replaces_a_model_as_a_whole(tmp_path, source):
    old = tmp_path / "out"
    old.mkdir()
    (old / "config.json").write_text("old")
    (old / "extra").write_text("old")
    with pytest.raises(ConfigError, match="exists"):
        check_target(old, sources=[source], force=False)
    with new_folder(old, sources=[source], force=True) as staged:
        (staged / "config.json").write_text("new")
    assert {path.name: path.read_text() for path in old.iterdir()} == {"config.json": "new"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_force_never_replaces_what_is_no_model(tmp_path, source, monkeypatch):
    home, file, link = tmp_path / "home", tmp_path / "file", tmp_path / "link"
    home.mkdir()
    (home / "letters.txt").write_text("mine")
    file.write_text("mine")
    link.symlink_to(home)
    for target in (home, file, link):
        with pytest.raises(ConfigError, match="--output"):
            check_target(target, sources=[source], force=True)
    (home / "config.json").write_text("{}")
    monkeypatch.chdir(home)
    with pytest.raises(ConfigError, match="not a folder that --force replaces"):
        check_target(home, sources=[source], force=True)


@pytest.mark.parametrize(
    ("held", "own"),
    [("config.json", ADAPTER), ("Modelfile", ADAPTER), ("model.gguf", ADAPTER), ("adapter_config.json", MODEL)],
)
def test_force_replaces_a_model_by_a_model_and_an_adapter_by_an_adapter(tmp_path, source, held, own):
    old = tmp_path / "out"
    old.mkdir()
    (old / held).write_text("old")
    check_target(old, sources=[source], force=True, own=MODEL if own is ADAPTER else ADAPTER)
    with pytest.raises(ConfigError, match="--force does not replace"):
        check_target(old, sources=[source], force=True, own=own)
    (old / own[0]).write_text("old")
    with pytest.raises(ConfigError, match="--force does not replace"):
        check_target(old, sources=[source], force=True, own=own)


def test_force_never_replaces_what_is_read_only(tmp_path, source):
    old = tmp_path / "out"
    old.mkdir()
    (old / "config.json").write_text("old")
    old.chmod(0o555)
    with pytest.raises(ConfigError, match="read-only"), new_folder(old, sources=[source], force=True):
        pass
    old.chmod(0o755)
    assert [path.name for path in old.iterdir()] == ["config.json"]


@pytest.mark.parametrize("place", [".", "inner", "inner/new", "../source", ".."])
def test_a_source_is_never_touched(source, place):
    for force in (False, True):
        with pytest.raises(ConfigError, match="never changed"):
            check_target(source / place, sources=[source], force=force)


def test_a_source_behind_a_link_is_seen(tmp_path, source):
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(ConfigError, match="never changed"):
        check_target(tmp_path / "link/new", sources=[source], force=True)


def test_a_disk_that_cannot_be_written_is_named(tmp_path, source):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(StorageError, match="cannot write"), new_folder(blocked / "out", sources=[source]):
        pass


def test_what_a_killed_process_left_is_swept(tmp_path, source):
    mine, theirs = tmp_path / f".out.partial-{os.getppid()}", tmp_path / ".out.partial-99999999"
    mine.mkdir()
    theirs.mkdir()
    with new_folder(tmp_path / "out", sources=[source]):
        pass
    assert mine.exists()
    assert not theirs.exists()


def test_a_folder_that_a_killed_process_moved_away_comes_back(tmp_path, source):
    out, moved = tmp_path / "out", tmp_path / ".out.old-99999999"
    moved.mkdir()
    (moved / "config.json").write_text("old")
    with pytest.raises(ConfigError, match="exists"), new_folder(out, sources=[source]):
        pass
    assert (out / "config.json").read_text() == "old"
    shutil.copytree(out, moved)
    with new_folder(out, sources=[source], force=True) as staged:
        (staged / "config.json").write_text("new")
    assert (out / "config.json").read_text() == "new"
    assert not moved.exists()


@pytest.mark.parametrize("name", ["with blanks", "ünï-文字-🙂", "n" * 255, "ß" * 127])
def test_row_42_a_folder_may_have_any_name(tmp_path, source, name):
    for content in ("old", "new"):
        with new_folder(tmp_path / name, sources=[source], force=True) as staged:
            (staged / "config.json").write_text(content)
    assert (tmp_path / name / "config.json").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 2
