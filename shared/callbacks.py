"""What a run tells the world: events, metrics.jsonl, and the display."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from shared.durable import write_whole
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


@dataclass(frozen=True)
class Metrics:
    """metrics.jsonl: one object per logged update or evaluation, flushed as written."""

    path: Path

    def write(self, row: Row) -> None:
        """Append a row; raises StorageError."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise StorageError(f"cannot write {self.path}: {error.strerror}", fix="free some space") from None

    def read(self) -> list[dict[str, Any]]:
        """Return all whole rows; a line cut by a crash is passed over."""
        rows: list[dict[str, Any]] = []
        if not self.path.is_file():
            return rows
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
        return rows

    def truncate(self, step: int) -> None:
        """Drop the rows of later updates, which will be made again."""
        kept = [json.dumps(row) + "\n" for row in self.read() if row["step"] <= step]
        write_whole(self.path, "".join(kept))


def tell(callbacks: Sequence[Callback], event: str, payload: Any) -> None:
    """Send one event to every callback."""
    for callback in callbacks:
        getattr(callback, event, ignore)(payload)


def ignore(payload: Any) -> None:
    """Do nothing: a callback need not have every event."""
