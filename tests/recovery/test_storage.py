"""Disks that fill up, refuse or fail, folders that two runs want, data that changes, and paths of every kind."""

from __future__ import annotations

import errno
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from shared import faults
from shared.callbacks import Metrics
from shared.config_file import build_config, load_config
from shared.errors import CheckpointError, ConfigError, StorageError
from shared.jobs.train import train
from shared.measuring.synthetic import Shape, write_llama
from shared.running import checkpoint
from shared.running.lock import FILE, locked
from shared.watching.display import PlainDisplay
from tests.recovery.golden.make import BASE, recipe

UPDATES = 30
SIZE, INODES = 512 * 1024, 64  # of the small disk


@cache
def base() -> Path:
    """Return a model as small as it gets, with the demo's tokenizer."""
    folder = Path(os.environ["MLXLORA_CACHE"]) / "small-base"
    write_llama(folder, Shape(1, 32, 64, 2, 1, 640, True), positions=256, seed=0)
    for file in BASE.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def settings(output: Path, **train_values: int) -> dict[str, Any]:
    values = {**recipe(output, backend="torch"), "model": str(base())}
    return {**values, "train": {**values["train"], **train_values}, "checkpoint": {"every": 6}}


def weights(folder: Path) -> bytes:
    return (folder / "adapter/adapter_model.safetensors").read_bytes()


def steps(folder: Path) -> list[int]:
    return [row["step"] for row in Metrics(folder / "metrics.jsonl").read()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Return the folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(build_config(settings(folder, updates=UPDATES)))
    return folder


class Disk:
    """A real file system of 512 KiB and 64 files where this process may mount one; else a limit on files' sizes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        options = f"size={SIZE},nr_inodes={INODES}"
        tried = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
        self.mounted = tried.returncode == 0
        self.limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self, kind: str) -> None:
        """Leave no room: for bytes, or for files."""
        if not self.mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, self.limit[1]))
            return
        ballast = self.folder / "ballast"
        ballast.mkdir()
        with suppress(OSError):
            for number in range(INODES if kind == "files" else 1):
                with (ballast / str(number)).open("wb", buffering=0) as file:
                    while kind == "bytes":
                        file.write(bytes(4096))

    def free(self) -> None:
        """Leave room again."""
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limit)
        shutil.rmtree(self.folder / "ballast", ignore_errors=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    made = Disk(folder)
    yield made
    made.free()
    if made.mounted:
        subprocess.run(["umount", str(folder)], check=True)


class Filler:
    """Fills the disk at one update and frees it at another; keeps the notes, and which checkpoint stood then."""

    def __init__(self, disk: Disk, kind: str, *, first: int, last: int) -> None:
        self.disk, self.kind, self.first, self.last = disk, kind, first, last
        self.notes: list[str] = []
        self.stood: list[int] = []

    def on_update(self, step: int) -> None:
        if step == self.first:
            self.disk.fill(self.kind)
        if step == self.last:
            self.disk.free()

    def on_note(self, text: str) -> None:
        self.notes.append(text)
        if "tries again at update" in text:
            found, problems = checkpoint.newest(self.disk.folder / "run/checkpoints")
            self.stood.append(found.step if found and not problems else -1)


@pytest.mark.parametrize("kind", ["bytes", "files"])
def test_rows_15_and_19_a_full_disk_costs_neither_checkpoint_nor_rows(whole, disk, kind):
    """Full of bytes or of files from update 8 to 25: three saves fail, the metrics wait, the end is what it is."""
    run, filler = disk.folder / "run", Filler(disk, kind, first=8, last=25)
    train(build_config(settings(run, updates=UPDATES)), callbacks=[filler])
    failed = [text for text in filler.notes if "tries again at update" in text]
    assert filler.stood == [6, 6, 6]
    for text, step in zip(failed, (12, 18, 24), strict=True):
        assert re.search(r"cannot (save the checkpoint|write) .* it takes (about )?[0-9,]+ bytes", text)
        assert f"training goes on and tries again at update {step + 6}" in text
        assert "\n" not in text
    assert weights(run) == weights(whole)
    assert steps(run) == list(range(1, UPDATES + 1))
    assert sum("tries again at the next row" in text for text in filler.notes) == (kind == "bytes"), "said once"
    assert not list((run / "checkpoints").glob(".*"))


def test_row_15_a_disk_that_stays_full_ends_with_7_and_the_same_command_ends_the_run(whole, disk):
    run = disk.folder / "run"
    config = build_config(settings(run, updates=UPDATES))
    with pytest.raises(StorageError, match=r"No space left|File too large") as caught:
        train(config, callbacks=[Filler(disk, "bytes", first=20, last=0)])
    assert caught.value.exit_code == 7
    assert "bytes" in caught.value.what
    found, problems = checkpoint.newest(run / "checkpoints")
    assert found is not None
    assert (found.step, problems) == (18, [])
    disk.free()
    train(config)
    assert weights(run) == weights(whole)
    assert steps(run) == list(range(1, UPDATES + 1))


@pytest.mark.parametrize("point", ["checkpoint.before_sync", "checkpoint.trashed", "metrics.write"])
def test_row_18_a_disk_that_fails_is_told_and_tried_again(whole, tmp_path, monkeypatch, point):
    """EIO from a fault point: no file system here fails when asked to."""
    faults.passed.clear()
    monkeypatch.setenv("MLXLORA_FAULT", f"{point}:2:EIO,{point}:3:EIO")
    notes = Notes()
    train(build_config(settings(tmp_path / "run", updates=UPDATES)), callbacks=[notes])
    told = [text for text in notes.texts if "Input/output error" in text]
    assert len(told) == {"checkpoint.before_sync": 2, "checkpoint.trashed": 0, "metrics.write": 1}[point]
    assert weights(tmp_path / "run") == weights(whole)
    assert steps(tmp_path / "run") == list(range(1, UPDATES + 1))


class Notes:
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def on_note(self, text: str) -> None:
        self.texts.append(text)


def test_rows_that_wait_are_written_once_and_go_where_a_run_goes_back(tmp_path, disk):
    metrics = Metrics(disk.folder / "metrics.jsonl")
    large = {"text": "x" * 3000}  # a page each, so that a full disk refuses it
    metrics.write({"step": 1, **large})
    disk.fill("bytes")
    for step in (2, 3):
        with pytest.raises(StorageError, match="it takes"):
            metrics.write({"step": step, **large})
    assert steps(disk.folder / ".") == [1]
    disk.free()
    metrics.truncate(2)
    metrics.write({"step": 3, **large})
    assert steps(disk.folder / ".") == [1, 2, 3]


def broken_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def test_row_16_a_log_on_a_full_disk_does_not_stop_the_run(whole, tmp_path):
    full = Path("/dev/full")  # Linux; elsewhere a reader that has gone
    descriptor = os.open(full, os.O_WRONLY) if full.exists() else broken_pipe()
    with suppress(OSError), open(descriptor, "w") as stream:
        train(build_config(settings(tmp_path / "run", updates=UPDATES)), callbacks=[PlainDisplay(stream)])
    assert weights(tmp_path / "run") == weights(whole)


def test_row_17_a_folder_that_cannot_be_written_is_refused_before_the_model_is_loaded(tmp_path):
    broken, folder = tmp_path / "base", tmp_path / "read-only"
    shutil.copytree(base(), broken)
    config = (broken / "config.json").read_text()
    (broken / "config.json").write_text(config.replace("silu", "none of the known"))  # seen when the model is made
    folder.mkdir()
    values = {**settings(folder / "run", updates=2), "model": str(broken)}
    with pytest.raises(Exception, match="none of the known"):
        train(build_config({**values, "output": str(tmp_path / "run")}))
    tried = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)], capture_output=True)
    if tried.returncode:
        folder.chmod(0o555)
        if os.access(folder, os.W_OK):  # root writes there all the same: a folder that nobody can make
            values["output"] = "/proc/run" if sys.platform == "linux" else "/System/run"
    try:
        with pytest.raises(StorageError, match="output: cannot write in") as caught:
            train(build_config(values))
    finally:
        if not tried.returncode:
            subprocess.run(["umount", str(folder)], check=True)
    assert caught.value.exit_code == 7


def test_row_33_the_second_writer_is_refused_by_the_name_of_the_first(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    with locked(tmp_path / "run", note=print), pytest.raises(ConfigError) as caught:
        train(build_config(settings(tmp_path / "run", updates=UPDATES)))
    assert caught.value.exit_code == 2
    assert f"in use by process {os.getpid()} on {platform.node()} since" in caught.value.what
    assert train(build_config(settings(tmp_path / "run", updates=UPDATES))).already_complete
    assert (tmp_path / "run" / FILE).read_text() == ""


def test_row_34_a_lock_that_a_dead_process_left_is_taken_over(whole, tmp_path):
    """Whatever it names: a process that never was, this one's own number, or bytes that are no text."""
    shutil.copytree(whole, tmp_path / "run")
    for left in (b"process 999999 on elsewhere", f"process {os.getpid()} on {platform.node()}".encode(), b"\xff\x00"):
        (tmp_path / "run" / FILE).write_bytes(left)
        notes = Notes()
        assert train(build_config(settings(tmp_path / "run", updates=UPDATES)), callbacks=[notes]).already_complete
        assert sum(f"taking over from {left.decode(errors='replace')}" in text for text in notes.texts) == 1


def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("MLXLORA_FAULT", "lock:1:ENOLCK")
    faults.passed.clear()
    with pytest.raises(StorageError, match=os.strerror(errno.ENOLCK)), locked(tmp_path, note=print):
        pass


class Editor:
    """Changes a file while a run reads from it."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_update(self, step: int) -> None:
        if step == 3:
            self.file.write_text(self.file.read_text().replace("three", "seven"))


def test_row_38_an_edited_dataset_does_not_get_into_a_run_and_is_refused_behind_it(whole, tmp_path):
    values = settings(tmp_path / "run", updates=UPDATES)
    data = tmp_path / "train.jsonl"
    shutil.copy(values["data"]["path"], data)
    values["data"] = {"path": str(data)}
    train(build_config(values), callbacks=[Editor(data)])
    assert weights(tmp_path / "run") == weights(whole), "the rows of a run are read once"
    with pytest.raises(CheckpointError, match="the training rows") as caught:
        train(build_config(values))
    assert caught.value.exit_code == 3
    shutil.copy(settings(tmp_path, updates=1)["data"]["path"], data)
    assert train(build_config(values)).already_complete


def test_row_38_other_validation_rows_are_told(whole, tmp_path):
    values = {**settings(tmp_path / "run", updates=4), "evaluation": {"every": 2}}
    for name in ("train", "valid"):
        shutil.copy(values["data"]["path"], tmp_path / f"{name}.jsonl")
    values["data"] = {"path": str(tmp_path)}
    train(build_config(values))
    for edited in (False, True):
        with (tmp_path / "valid.jsonl").open("a") as file:
            file.write('{"prompt": "one", "completion": " one"}\n' if edited else "")
        notes = Notes()
        train(build_config(values), callbacks=[notes])
        assert any("valid.jsonl has changed" in text for text in notes.texts) == edited


@pytest.mark.parametrize("name", ["with blanks", "ünï-文字-🙂", "quo'te\"s;$(x)", "n" * 255, "-dash", "new\nline"])
def test_row_42_a_run_folder_may_have_any_name(whole, tmp_path, name):
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    shutil.copytree(whole, real / name)
    shutil.rmtree(real / name / "adapter")
    shutil.rmtree(real / name / f"checkpoints/step-{UPDATES:06d}")
    values = settings(tmp_path / "link" / name, updates=UPDATES)
    (tmp_path / f"base {name}"[:200]).symlink_to(base())
    values["model"] = str(tmp_path / f"base {name}"[:200])
    assert not train(build_config(values)).already_complete
    assert weights(real / name) == weights(whole)
    assert train(load_config(real / name / "config.yaml")).already_complete, "its own config works from anywhere"
