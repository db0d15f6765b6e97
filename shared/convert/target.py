"""A new folder that is whole or absent: written beside its place, synced, then renamed into it."""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from shared import faults
from shared.durable import aside, label, put_in_place, sync
from shared.errors import ConfigError, StorageError

# What marks a folder as one that these commands write; --force replaces one of the kind that is written, and no other.
MODEL = ("config.json", "Modelfile", "model.gguf")
ADAPTER = ("adapter_config.json", "adapter.gguf")
WRITABLE = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH


def check_target(target: Path, *, sources: Sequence[Path], force: bool, own: Sequence[str] = MODEL) -> None:
    """Raise ConfigError unless a folder can be made at `target` without touching a source or anything unknown.

    own: the files that mark what is written, MODEL or ADAPTER.
    """
    place = target.resolve()
    for source in sources:
        theirs = source.resolve()
        if place == theirs or place.is_relative_to(theirs) or theirs.is_relative_to(place):
            how = "is" if place == theirs else ("lies inside" if place.is_relative_to(theirs) else "holds")
            raise ConfigError(
                f"--output {target} {how} {source}, which is never changed", code="E205", fix="choose another --output"
            )
    if not target.exists() and not target.is_symlink():
        return
    if not force:
        raise ConfigError(
            f"--output {target} exists", code="E205", fix="choose another --output, or --force to replace it"
        )
    if target.is_symlink() or not target.is_dir() or Path.cwd().is_relative_to(place):
        raise ConfigError(
            f"--output {target} is not a folder that --force replaces", code="E205", fix="choose another --output"
        )
    held = {name for name in (*MODEL, *ADAPTER) if (place / name).exists()}
    if any(place.iterdir()) and not (held and held <= set(own)):
        what = "adapter" if own is ADAPTER else "model"
        raise ConfigError(
            f"--output {target} is no folder of one {what}, so --force does not replace it",
            code="E205",
            fix="choose another --output",
        )
    if not place.stat().st_mode & WRITABLE:  # root may write there all the same
        raise ConfigError(
            f"--output {target} is read-only, so --force does not replace it",
            code="E205",
            fix="choose another --output",
        )


@contextmanager
def new_folder(
    target: Path, *, sources: Sequence[Path], force: bool = False, own: Sequence[str] = MODEL
) -> Iterator[Path]:
    """Yield an empty folder that takes its place at `target` when the block ends well, and vanishes otherwise.

    Raises ConfigError as `check_target` does, StorageError where the disk is full or not writable.
    """
    check_target(target, sources=sources, force=force, own=own)
    staged = aside(target, "partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target)
        check_target(target, sources=sources, force=force, own=own)  # it may have put one back
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        yield staged
        faults.hit("folder.written")
        for file in staged.rglob("*"):
            sync(file)
        put_in_place(staged, target)
    except OSError as error:
        if isinstance(error, StorageError) or not is_own(error, target):
            raise
        raise StorageError(
            f"cannot write {target}: {error.strerror or error}", fix="check the space left and the permissions"
        ) from None
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def is_own(error: OSError, target: Path) -> bool:
    """Return whether an error is about what is being written, not about a file that is read."""
    return error.filename is None or str(target.parent) in str(error.filename)


def sweep(target: Path) -> None:
    """Remove what a killed process left beside `target`, and put back a folder that it had only moved away."""
    left = re.compile(re.escape(f".{label(target)}.") + r"(partial|old)-(\d+)")
    for path in list(target.parent.iterdir()):
        match = left.fullmatch(path.name)
        if not match or is_running(int(match[2])):
            continue
        if match[1] == "old" and not target.exists():
            os.rename(path, target)
        else:
            shutil.rmtree(path, ignore_errors=True)


def is_running(process: int) -> bool:
    """Return whether a process of this machine is alive."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
