"""Checkpoints that a kill at any moment cannot spoil: staged, hashed, marked, renamed.

.tmp-STEP-PID/ -> tensors and state.json, each fsynced -> manifest.json with size and SHA-256 of each ->
COMMITTED -> fsync of the folder -> rename to step-000100 -> fsync of its parent. A reader takes the newest
folder whose marker, manifest and hashes are all right, found by scanning.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.durable import sync
from shared.errors import CheckpointError, StorageError
from shared.folder import sha256
from shared.tensors import load_file, save_file
from shared.types import Tensor

FORMAT = 1
STEP_DIR = re.compile(r"step-(\d{6,})")
ADAPTER_FILE, OPTIMIZER_FILE, STATE_FILE = "adapter.safetensors", "optimizer.safetensors", "state.json"
MANIFEST_FILE, MARKER = "manifest.json", "COMMITTED"


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on: trained tensors, optimizer moments, and the loop's state."""

    step: int
    adapter: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: Mapping[str, Any]


def save(root: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write a checkpoint under `root` and prune older ones; return its folder. Raises StorageError."""
    final = root / f"step-{checkpoint.step:06d}"
    staged = root / f".tmp-{checkpoint.step}-{os.getpid()}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        write_files(staged, checkpoint)
        if final.exists():
            discard(final)
        staged.rename(final)
        sync(root)
    except OSError as error:
        shutil.rmtree(staged, ignore_errors=True)
        raise StorageError(
            f"cannot save the checkpoint in {root}: {error.strerror or error}",
            fix="free some space or make the folder writable; the last checkpoint is intact",
        ) from None
    prune(root, keep=keep, spared=final)
    return final


def write_files(staged: Path, checkpoint: Checkpoint) -> None:
    """Write tensors, state, manifest and marker, each on disk before the next."""
    save_file(staged / ADAPTER_FILE, checkpoint.adapter.items())
    save_file(staged / OPTIMIZER_FILE, checkpoint.optimizer.items())
    state = {"format": FORMAT, "step": checkpoint.step, **checkpoint.state}
    (staged / STATE_FILE).write_text(json.dumps(state, indent=1, sort_keys=True))
    names = (ADAPTER_FILE, OPTIMIZER_FILE, STATE_FILE)
    for name in names:
        sync(staged / name)
    manifest = {name: {"size": (staged / name).stat().st_size, "sha256": sha256(staged / name)} for name in names}
    (staged / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1))
    sync(staged / MANIFEST_FILE)
    (staged / MARKER).write_text(sha256(staged / MANIFEST_FILE))
    sync(staged / MARKER)
    sync(staged)


def discard(folder: Path) -> None:
    """Remove a folder such that it is never half there under its own name."""
    trash = folder.with_name(f".trash-{folder.name}-{os.getpid()}")
    shutil.rmtree(trash, ignore_errors=True)
    folder.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def prune(root: Path, *, keep: int, spared: Path) -> None:
    """Remove all but the newest `keep` checkpoints, never the one just written."""
    for folder in step_dirs(root)[keep:]:
        if folder != spared:
            discard(folder)


def drop_after(root: Path, step: int) -> None:
    """Remove the checkpoints of later updates, which will be made again."""
    for folder in step_dirs(root):
        if step_of(folder) > step:
            discard(folder)


def step_of(folder: Path) -> int:
    """Return the update of a checkpoint folder's name."""
    return int(folder.name.removeprefix("step-"))


def sweep(root: Path) -> None:
    """Remove what an interrupted save or prune left behind."""
    for stray in [*root.glob(".tmp-*"), *root.glob(".trash-*")]:
        shutil.rmtree(stray, ignore_errors=True)


def step_dirs(root: Path) -> list[Path]:
    """Return the checkpoint folders, newest first."""
    found = [folder for folder in root.glob("step-*") if STEP_DIR.fullmatch(folder.name)] if root.is_dir() else []
    return sorted(found, key=step_of, reverse=True)


def newest(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest valid checkpoint and what was wrong with newer ones; raises where all are damaged."""
    problems: list[str] = []
    folders = step_dirs(root)
    for folder in folders:
        try:
            return load(folder), problems
        except CheckpointError as error:
            problems.append(error.what)
    if problems:
        raise CheckpointError(
            f"no checkpoint in {root} is whole: {'; '.join(problems)[:400]}", fix="start anew with --resume never"
        )
    return None, problems


def load(folder: Path) -> Checkpoint:
    """Return a checkpoint after checking marker, manifest and hashes; raises CheckpointError."""
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text())
        if (folder / MARKER).read_text() != sha256(folder / MANIFEST_FILE):
            raise CheckpointError(f"{folder.name} is damaged: its marker does not match its manifest")
        for name in (ADAPTER_FILE, OPTIMIZER_FILE, STATE_FILE):
            check_file(folder / name, manifest[name])
        state = json.loads((folder / STATE_FILE).read_text())
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder.name} is damaged: {type(error).__name__} {error}") from None
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder.name} has format {state.get('format')}", expected=f"{FORMAT}", fix="use the version that wrote it"
        )
    tensors = load_file(folder / ADAPTER_FILE), load_file(folder / OPTIMIZER_FILE)
    return Checkpoint(int(state["step"]), *tensors, state)


def check_file(path: Path, stated: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless a file has the stated size and hash."""
    if path.stat().st_size != stated["size"] or sha256(path) != stated["sha256"]:
        raise CheckpointError(f"{path.parent.name} is damaged: {path.name} is not what its manifest says")
