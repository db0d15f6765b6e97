"""What a run tells the world: events, metrics.jsonl, and the display."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from shared import faults
from shared.durable import sync, write_whole
from shared.errors import StorageError

Row = Mapping[str, Any]


class Callback(Protocol):
    """Six events; a callback has any of them and may not change the run."""

    def on_start(self, facts: Row) -> None: ...

    def on_update(self, step: int) -> None: ...

    def on_step(self, row: Row) -> None: ...

    def on_evaluate(self, row: Row) -> None: ...

    def on_note(self, text: str) -> None: ...

    def on_end(self, facts: Row) -> None: ...


@dataclass
class Metrics:
    """metrics.jsonl: one object per logged update or evaluation, flushed as written."""

    path: Path
    waiting: list[Row] = field(default_factory=list)  # rows that the disk refused

    def write(self, row: Row) -> None:
        """Append a row behind those that wait; raises StorageError, then it waits too."""
        self.waiting.append(row)
        self.flush()

    def flush(self, *, durable: bool = False) -> None:
        """Append the rows that wait, all or none of them; durable: force all rows to the disk. Raises StorageError."""
        data = "".join(json.dumps(row) + "\n" for row in self.waiting).encode()
        try:
            faults.hit("metrics.write")
            with self.path.open("ab", buffering=0) as file:
                size = file.tell()
                try:
                    if file.write(data) < len(data):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                except OSError:
                    file.truncate(size)
                    raise
            if durable:
                sync(self.path)
        except OSError as error:
            what = f"cannot write {self.path}: {error.strerror}; it takes {len(data):,} bytes more"
            raise StorageError(what, fix="free some space") from None
        self.waiting.clear()

    def read(self) -> list[dict[str, Any]]:
        """Return all whole rows; a line cut by a crash is passed over."""
        rows: list[dict[str, Any]] = []
        if not self.path.is_file():
            return rows
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
        return rows

    def truncate(self, step: int) -> None:
        """Drop the rows of later updates, which will be made again."""
        self.waiting = [row for row in self.waiting if row["step"] <= step]
        kept = [json.dumps(row) + "\n" for row in self.read() if row["step"] <= step]
        write_whole(self.path, "".join(kept))


def tell(callbacks: Sequence[Callback], event: str, payload: Any) -> None:
    """Send one event to every callback."""
    for callback in callbacks:
        getattr(callback, event, ignore)(payload)


def ignore(payload: Any) -> None:
    """Do nothing: a callback need not have every event."""
