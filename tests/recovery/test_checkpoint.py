"""Checkpoints: the order in which they reach the disk, what a kill or any damage does to them, formats of the past."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.callbacks import Metrics
from shared.config_file import build_config
from shared.errors import CheckpointError
from shared.jobs.train import train
from shared.running import checkpoint
from shared.running.checkpoint import FILES, FORMAT, MANIFEST_FILE, MARKER, Checkpoint
from shared.types import Tensor
from tests.recovery.golden.make import HERE, recipe

ROOT = Path(__file__).resolve().parents[2]
# Forks at every fault point of a save; prints what a reader finds behind the kill, and what a sweep leaves.
KILLED = """
import json, os, sys
from pathlib import Path
from shared import faults
from shared.running import checkpoint
from tests.recovery.test_checkpoint import make

def save(point, root, step):
    pid = os.fork()
    if pid == 0:
        os.environ[faults.VARIABLE] = f"{point}:1"
        checkpoint.save(root, make(step), keep=1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

for point in sys.argv[2:]:
    for step in (1, 2):  # the same step is replaced, or another one is added
        root = Path(sys.argv[1]) / f"{point}-{step}"
        checkpoint.save(root, make(1), keep=1)
        code = save(point, root, step)
        checkpoint.sweep(root)
        found, problems = checkpoint.newest(root)
        print(json.dumps([point, step, code, found.step, problems, sorted(path.name for path in root.iterdir())]))
"""
BEFORE = ("checkpoint.begin", "checkpoint.before_sync", "checkpoint.before_marker", "folder.before_rename")
BEHIND = ("checkpoint.before_prune", "checkpoint.trashed")


def make(step: int) -> Checkpoint:
    values = {"layer.lora_A": Tensor("F32", np.arange(3, dtype=np.float32) + step)}
    state = {"loop": {"step": step}, "identity": {}, "maker": {}}
    return Checkpoint(step, values, {f"m.{name}": tensor for name, tensor in values.items()}, state)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a folder with the small checkpoints of updates 1 and 2."""
    for step in (1, 2):
        checkpoint.save(tmp_path / "checkpoints", make(step), keep=2)
    return tmp_path / "checkpoints"


def test_row_08_everything_is_on_the_disk_before_it_counts(tmp_path):
    """The system calls of one save, in order; without strace, the fault points that stand between them."""
    code = "import sys; from pathlib import Path; from shared import faults; from shared.running import checkpoint\n"
    code += "from tests.recovery.test_checkpoint import make\n"
    code += "checkpoint.save(Path(sys.argv[1]) / 'checkpoints', make(7), keep=1); print(*faults.passed)"
    strace = shutil.which("strace")
    traced = [strace, "-f", "-y", "-e", "trace=fsync,fdatasync,rename,renameat,renameat2", "-o", "calls"]
    done = subprocess.run(
        [*(traced if strace else []), sys.executable, "-c", code, str(tmp_path)], cwd=tmp_path, text=True, check=True,
        capture_output=True,
        env={"PYTHONPATH": str(ROOT), "MLXLORA_FAULT": "none:1", "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert done.stdout.split() == [*BEFORE[:3], "folder.before_rename", "checkpoint.before_prune"]
    if strace is None:
        return
    calls = re.findall(r'(fsync|rename\w*)\(.*?([^/<">]+)["\>]+(?:, \w+)?\) += 0', (tmp_path / "calls").read_text())
    names = [(call[:6].strip("at2"), re.sub(r"\.tmp-7-.*", "staged", name)) for call, name in calls]
    written = [pair for pair in names if pair not in [("rename", name) for name in FILES]]  # safetensors' own renames
    assert written == [
        ("fsync", tmp_path.name), *(("fsync", name) for name in (*FILES, MANIFEST_FILE, MARKER, "staged")),
        ("rename", "step-000007"), ("fsync", "checkpoints"),
    ]  # fmt: skip


def test_rows_02_to_05_a_kill_at_any_point_of_a_save_leaves_a_whole_checkpoint(tmp_path):
    """Between tensors and marker, before and behind the rename, and while an older one goes away."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), *BEFORE, *BEHIND], cwd=ROOT, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 2 * len(BEFORE + BEHIND)
    for point, step, code, newest, problems, names in found:
        reached = not (point == "checkpoint.trashed" and step == 1)  # nothing is pruned where one is replaced
        assert code == (-9 if reached else 0)
        assert (newest, problems) == (step if point in BEHIND else 1, [])
        assert {f"step-{newest:06d}"} <= set(names) <= {"step-000001", "step-000002"}, "nothing else is left"


@pytest.mark.parametrize("name", [*FILES, MANIFEST_FILE, MARKER])
def test_row_21_every_flipped_byte_is_noticed_and_the_one_before_is_used(root, name):
    file = root / "step-000002" / name
    data = file.read_bytes()
    for at in range(len(data)):
        for mask in (1 << at % 8, 0xFF):
            file.write_bytes(data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :])
            found, problems = checkpoint.newest(root)
            assert found is not None
            assert (found.step, len(problems)) == (1, 1), f"{name}: byte {at} ^ {mask}"
    file.write_bytes(data)
    found, problems = checkpoint.newest(root)
    assert found is not None
    assert (found.step, problems) == (2, [])


@pytest.mark.parametrize("name", [*FILES, MANIFEST_FILE, MARKER])
def test_rows_20_and_22_a_truncated_or_missing_file_is_noticed_and_the_one_before_is_used(root, name):
    file = root / "step-000002" / name
    data = file.read_bytes()
    for length in [*range(len(data)), None, -1]:
        if length is None:
            file.unlink()
        elif length < 0:
            file.mkdir()
        else:
            file.write_bytes(data[:length])
        found, problems = checkpoint.newest(root)
        assert found is not None
        assert (found.step, len(problems)) == (1, 1), f"{name}: {length}"
        assert "step-000002 is damaged" in problems[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Return the folder of a whole run of the golden recipe."""
    folder = tmp_path_factory.mktemp("golden") / "run"
    train(build_config(recipe(folder, backend="torch")))
    return folder


def weights(folder: Path) -> bytes:
    return (folder / "adapter/adapter_model.safetensors").read_bytes()


class Notes:
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def on_note(self, text: str) -> None:
        self.texts.append(text)


def test_a_damaged_checkpoint_is_never_trained_on(finished, tmp_path):
    folder, notes = tmp_path / "run", Notes()
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "adapter")
    file = folder / "checkpoints/step-000004/adapter.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 64  # a weight, no header
    file.write_bytes(data)
    result = train(build_config(recipe(folder, backend="torch")), callbacks=[notes])
    assert not result.already_complete
    assert [text for text in notes.texts if "passed over: step-000004 is damaged" in text]
    assert weights(folder) == weights(finished)
    assert [row["step"] for row in Metrics(folder / "metrics.jsonl").read()] == [1, 2, 3, 4]


def test_row_23_only_damaged_checkpoints_stop_the_run_with_a_list_and_change_nothing(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "checkpoints/step-000004/COMMITTED").unlink()
    (folder / "checkpoints/step-000002/state.json").write_text("{}")
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != ".lock"}
    with pytest.raises(CheckpointError) as caught:
        train(build_config(recipe(folder, backend="torch")))
    assert caught.value.exit_code == 3
    assert "step-000004 is damaged" in caught.value.what
    assert "step-000002 is damaged: state.json" in caught.value.what
    assert "--resume never" in str(caught.value.fix)
    assert {file: file.read_bytes() for file in before} == before


def test_checkpoints_that_were_removed_behind_a_result_do_not_cost_the_result(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(CheckpointError, match="has a result") as caught:
        train(build_config(recipe(folder, backend="torch")))
    assert caught.value.exit_code == 3
    assert weights(folder) == weights(finished)


@pytest.mark.parametrize("version", range(1, FORMAT + 1))
def test_row_25_a_golden_checkpoint_of_every_format_goes_on_to_the_same_end(finished, tmp_path, version):
    """A format without a golden checkpoint fails here: tests/recovery/golden/make.py writes one."""
    folder = tmp_path / "run"
    golden = HERE / f"format-{version}/step-000002"
    assert json.loads((golden / "state.json").read_text())["format"] == version
    shutil.copytree(golden, folder / "checkpoints/step-000002")
    (folder / "manifest.json").write_text("{}")  # what a run folder is known by
    notes = Notes()
    result = train(build_config(recipe(folder, backend="torch")), callbacks=[notes])
    assert result.updates == 4
    assert not any("begins again" in text for text in notes.texts)
    ours, wanted = (
        {row["step"]: row["loss"] for row in Metrics(path / "metrics.jsonl").read()} for path in (folder, finished)
    )
    assert ours == pytest.approx({step: wanted[step] for step in (3, 4)}, rel=1e-6)  # another machine made step 2
    assert json.loads((folder / "checkpoints/step-000004/state.json").read_text())["format"] == FORMAT


def restate(folder: Path, **changes: Any) -> None:
    """Change state.json and seal the checkpoint again, as somebody who knows how."""
    file = folder / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    manifest["state.json"] = {"size": file.stat().st_size, "sha256": checkpoint.sha256(file)}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    (folder / MARKER).write_text(checkpoint.sha256(folder / MANIFEST_FILE))


@pytest.mark.parametrize("version", [0, FORMAT + 1, "1", None, 1.5])
def test_row_25_a_format_of_the_future_is_refused_by_its_number(root, version):
    restate(root / "step-000002", format=version)
    with pytest.raises(CheckpointError, match=re.escape(f"has format {version!r}")):
        checkpoint.load(root / "step-000002")


@pytest.mark.parametrize("step", [math.inf, 1.5, True, "2", None])
def test_a_sealed_checkpoint_whose_step_is_no_whole_number_is_damaged(root, step):
    restate(root / "step-000002", step=step)
    with pytest.raises(CheckpointError, match="damaged: its step is"):
        checkpoint.load(root / "step-000002")
