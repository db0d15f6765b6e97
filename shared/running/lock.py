"""One run, one writer: a lock on the run folder that names its owner and ends with its owner's process."""

from __future__ import annotations

import fcntl
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path

from shared import faults
from shared.errors import ConfigError, StorageError

FILE = ".lock"


@contextmanager
def locked(folder: Path, note: Callable[[str], None], *, made: bool = False) -> Iterator[None]:
    """Hold the run folder; raises ConfigError where another process trains in it, notes where one died in it.

    made: it is new, and goes where nothing gets into it.

    The system's lock decides: it goes with the process that holds it, so neither a crash nor a process number that is
    given out again can leave it behind. What the file says is for people.
    """
    with (folder / FILE).open("ab+", buffering=0) as file:
        file.seek(0)
        owner = file.read().decode(errors="replace").strip()
        take(file, folder, owner=owner)
        if owner:
            note(f"taking over from {owner}, which ended without finishing")
        say(file, f"process {os.getpid()} on {platform.node()} since {datetime.now(UTC):%Y-%m-%d %H:%M} UTC")
        try:
            yield
        finally:
            say(file, "")
            forget(folder, made=made)


def forget(folder: Path, *, made: bool) -> None:
    """Remove the lock of a start that failed, and its folder where that is new; not where there is anything else."""
    with suppress(OSError):
        if [one.name for one in folder.iterdir()] == [FILE]:
            (folder / FILE).unlink()
            if made:
                folder.rmdir()


def take(file: FileIO, folder: Path, *, owner: str) -> None:
    """Take the system's lock; raises ConfigError where another process has it, StorageError where there is none."""
    try:
        faults.hit("lock")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.stat(folder / FILE)  # a start that failed meanwhile has removed it
    except (BlockingIOError, FileNotFoundError):
        raise ConfigError(
            f"{folder} is in use by {owner or 'another process'}",
            code="E207",
            fix="wait for it, or choose another --output",
        ) from None
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be locked: {error.strerror}", fix="choose an --output on a disk that has locks"
        ) from None


def say(file: FileIO, owner: str) -> None:
    """Write who holds the folder; a full disk only costs the name."""
    with suppress(OSError):
        file.truncate(0)
        file.write(owner.encode())
