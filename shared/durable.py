"""Files that are whole or absent, and on the disk when the call returns: staged beside their place, synced, renamed."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any


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
