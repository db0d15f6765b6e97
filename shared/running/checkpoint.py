"""Checkpoints that a kill at any moment cannot spoil: staged, hashed, marked, renamed.

.tmp-STEP-PID-RANDOM/ -> tensors and state.json, each synced -> manifest.json with size and SHA-256 of each, synced ->
COMMITTED, synced -> the folder, synced -> renamed to step-000100 -> its parent, synced. A reader takes the newest
folder whose marker, manifest and hashes are all right, found by scanning. docs/reliability.md has the reasons.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared import faults
from shared.durable import put_back, put_in_place, sync
from shared.errors import CheckpointError, ModelError, StorageError
from shared.folder import sha256
from shared.tensors import load_file, save_file
from shared.types import Tensor

FORMAT = 3
STEP_DIR = re.compile(r"step-(\d{6,})")
ADAPTER_FILE, OPTIMIZER_FILE, STATE_FILE = "adapter.safetensors", "optimizer.safetensors", "state.json"
FILES = (ADAPTER_FILE, OPTIMIZER_FILE, STATE_FILE)
MANIFEST_FILE, MARKER = "manifest.json", "COMMITTED"


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on: trained tensors, optimizer moments, and the loop's state."""

    step: int
    adapter: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: Mapping[str, Any]  # "loop", "identity", "maker": backend and versions, "needs": steps of others to keep


def save(root: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write a checkpoint under `root` and prune older ones; return its folder. Raises StorageError."""
    final = folder_of(root, checkpoint.step)
    staged = root / f".tmp-{checkpoint.step}-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        if not root.is_dir():
            root.mkdir(parents=True)
            sync(root.parent)
        staged.mkdir()
        write_files(staged, checkpoint)
        put_in_place(staged, final)
    except OSError as error:
        shutil.rmtree(staged, ignore_errors=True)
        raise StorageError(
            f"cannot save the checkpoint in {root}: {error.strerror or error}; {room(root, checkpoint)}",
            fix="free some space or make the folder writable; the last checkpoint is intact",
        ) from None
    with suppress(OSError):  # the next save tries again
        prune(root, keep=keep, spared=final)
    return final


def room(root: Path, checkpoint: Checkpoint) -> str:
    """Return how many bytes a checkpoint takes, and how many the disk has left."""
    needed = sum(
        tensor.data.nbytes for group in (checkpoint.adapter, checkpoint.optimizer) for tensor in group.values()
    )
    try:
        free = f"{shutil.disk_usage(root).free:,} are free"
    except OSError:
        free = "the disk does not answer"
    return f"it takes about {needed:,} bytes, {free}"


def write_files(staged: Path, checkpoint: Checkpoint) -> None:
    """Write tensors, state, manifest and marker, each on disk before the next."""
    faults.hit("checkpoint.begin")
    save_file(staged / ADAPTER_FILE, checkpoint.adapter.items())
    save_file(staged / OPTIMIZER_FILE, checkpoint.optimizer.items())
    state = {**checkpoint.state, "format": FORMAT, "step": checkpoint.step}
    (staged / STATE_FILE).write_text(json.dumps(state, indent=1, sort_keys=True))
    faults.hit("checkpoint.before_sync")
    for name in FILES:
        sync(staged / name)
    manifest = {name: {"size": (staged / name).stat().st_size, "sha256": sha256(staged / name)} for name in FILES}
    (staged / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1))
    sync(staged / MANIFEST_FILE)
    faults.hit("checkpoint.before_marker")
    (staged / MARKER).write_text(sha256(staged / MANIFEST_FILE))
    sync(staged / MARKER)  # the folder itself is synced where it is renamed


def discard(folder: Path) -> None:
    """Remove a folder such that it is never half there under its own name."""
    trash = folder.with_name(f".trash-{folder.name}-{os.getpid()}-{secrets.token_hex(4)}")
    folder.rename(trash)
    faults.hit("checkpoint.trashed")
    shutil.rmtree(trash, ignore_errors=True)


def prune(root: Path, *, keep: int, spared: Path) -> None:
    """Remove all but the newest `keep` checkpoints, the one just written, and those that one of these needs."""
    faults.hit("checkpoint.before_prune")
    folders = step_dirs(root)
    kept = {*folders[:keep], spared}
    kept |= {folder_of(root, step) for folder in kept for step in needs_of(folder)}
    for folder in folders:
        if folder not in kept:
            discard(folder)


def needs_of(folder: Path) -> list[int]:
    """Return the updates of other checkpoints without which this one is not whole: the best one so far."""
    try:
        return [int(step) for step in json.loads((folder / STATE_FILE).read_bytes()).get("needs", [])]
    except (OSError, ValueError, TypeError, AttributeError, OverflowError):
        return []


def adopt(root: Path, source: Path, *, steps: Iterable[int]) -> None:
    """Copy the checkpoints of another run that one of ours needs, each whole or not at all; raises StorageError."""
    for step in steps:
        theirs, own = folder_of(source, step), folder_of(root, step)
        if own.exists() or not theirs.is_dir():
            continue  # what is missing is told where it is wanted
        staged = root / f".tmp-{step}-{os.getpid()}-{secrets.token_hex(4)}"
        try:
            shutil.copytree(theirs, staged)
            for file in staged.iterdir():
                sync(file)
            put_in_place(staged, own)
        except OSError as error:
            shutil.rmtree(staged, ignore_errors=True)
            what = f"cannot copy the best checkpoint, {theirs}, to {root}: {error.strerror or error}"
            raise StorageError(what, fix="free some space") from None


def drop_after(root: Path, step: int) -> None:
    """Remove the checkpoints of later updates, which will be made again."""
    for folder in step_dirs(root):
        if step_of(folder) > step:
            discard(folder)


def folder_of(root: Path, step: int) -> Path:
    """Return the folder of an update's checkpoint."""
    return root / f"step-{step:06d}"


def step_of(folder: Path) -> int:
    """Return the update of a checkpoint folder's name."""
    return int(folder.name.removeprefix("step-"))


def sweep(root: Path) -> None:
    """Remove what an interrupted save or prune left behind; put back what was only moved away."""
    put_back(root)
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
        manifest = json.loads((folder / MANIFEST_FILE).read_bytes())
        if (folder / MARKER).read_bytes() != sha256(folder / MANIFEST_FILE).encode():
            raise CheckpointError(f"{folder.name} is damaged: its marker does not match its manifest")
        for name in FILES:
            check_file(folder / name, manifest[name])
        state = migrate(json.loads((folder / STATE_FILE).read_bytes()), name=folder.name)
        tensors = load_file(folder / ADAPTER_FILE), load_file(folder / OPTIMIZER_FILE)
        if type(state["step"]) is not int:  # JSON also has true, 1e2 and Infinity
            raise CheckpointError(f"{folder.name} is damaged: its step is {state['step']!r}")
        return Checkpoint(state["step"], *tensors, state)
    except (CheckpointError, ModelError) as error:
        code = error.code if isinstance(error, CheckpointError) else None  # a model's page is about models
        raise CheckpointError(error.what, expected=error.expected, fix=error.fix, code=code) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder.name} is damaged: {type(error).__name__} {error}") from None


def check_file(path: Path, stated: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless a file has the stated size and hash."""
    if not path.is_file() or path.stat().st_size != stated["size"] or sha256(path) != stated["sha256"]:
        raise CheckpointError(f"{path.parent.name} is damaged: {path.name} is not what its manifest says")


def migrate(state: dict[str, Any], *, name: str) -> dict[str, Any]:
    """Return state.json as the format of today has it, one version at a time; raises CheckpointError."""
    version = state["format"]
    if version not in (*MIGRATIONS, FORMAT):
        raise CheckpointError(
            f"{name} has format {version!r}, this mlxlora reads 1 to {FORMAT}",
            fix="use the mlxlora that wrote it",
            code="E324",
        )
    for older in range(version, FORMAT):
        state = {**MIGRATIONS[older](state), "format": older + 1}
    return state


def add_maker(state: dict[str, Any]) -> dict[str, Any]:
    """Format 1 does not say which backend and versions made it."""
    return {**state, "maker": {}}


def add_metric(state: dict[str, Any]) -> dict[str, Any]:
    """Format 2 knows the best eval_loss only, and kept no checkpoint of it."""
    loop = dict(state["loop"])
    best = loop.pop("best_loss", None)
    return {**state, "loop": {**loop, "metric": "min eval_loss", "best": best, "best_step": -1}}


# format -> to the next one
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: add_maker, 2: add_metric}
