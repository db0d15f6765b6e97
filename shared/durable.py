"""Files and folders that are whole or absent, and on the disk when the call returns: staged beside their place, synced,
renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from shared import faults


def sync(path: Path) -> None:
    """Force a file's or a folder's contents to the disk; raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, data: bytes | str) -> None:
    """Write a file, texts as UTF-8, such that a reader finds the old one or the new one; raises OSError.

    Where that fails, what stood there is as it was and nothing lies beside it.
    """
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        staged.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
        sync(staged)
        os.replace(staged, path)
    except BaseException:
        with suppress(OSError):
            staged.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_json(path: Path, value: Any, *, sort: bool = False) -> None:
    """Write a value as JSON for people to read, as `write_whole` does; sort: keys in order. Raises OSError."""
    write_whole(path, json.dumps(value, indent=2, sort_keys=sort) + "\n")


LONGEST = 200  # bytes of a name that leave room for more; file systems take 255


def aside(target: Path, kind: str) -> Path:
    """Return a hidden place beside `target` that belongs to this process: .NAME.KIND-PID, a hash for a long name."""
    return target.with_name(f".{label(target)}.{kind}-{os.getpid()}")


def label(target: Path) -> str:
    """Return a name, or a short one in its place.

    >>> label(Path("a/b")), len(label(Path("n" * 255)))
    ('b', 40)
    """
    name = os.fsencode(target.name)
    return target.name if len(name) <= LONGEST else hashlib.sha1(name).hexdigest()


MOVED = re.compile(r"\.(.+)\.old-(\d+)")  # a folder that another one is about to replace, and whose process did it


def put_in_place(staged: Path, target: Path) -> None:
    """Rename a finished folder, whose files are synced, to its place; an older one there goes away behind it."""
    sync(staged)
    old = aside(target, "old")
    if target.exists():
        os.rename(target, old)
    faults.hit("folder.before_rename")
    try:
        os.rename(staged, target)
    except OSError:
        if old.exists():
            os.rename(old, target)
        raise
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def put_back(root: Path) -> None:
    """Put back the folders under `root` that a process moved away and was killed before replacing; remove the others.

    For a caller that knows that no other process is at work in `root`.
    """
    for path in [path for path in root.glob(".*.old-*") if path.is_dir()]:
        match = MOVED.fullmatch(path.name)
        if match and not (target := root / match[1]).exists():
            os.rename(path, target)
        elif match:
            shutil.rmtree(path, ignore_errors=True)
