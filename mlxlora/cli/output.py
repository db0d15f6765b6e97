"""What commands print: notes, one object as JSON, tables."""

from __future__ import annotations

import json
import sys
from typing import Any


def say(text: str) -> None:
    """Print a note on stderr."""
    print(f"note: {text}", file=sys.stderr)


def emit(result: Any, **more: Any) -> None:
    """Print a dataclass as one JSON object on one line."""
    from dataclasses import asdict

    emit_object({**asdict(result), **more})


def emit_object(value: dict[str, Any]) -> None:
    """Print an object with `ok` in front, true unless it says otherwise; what JSON does not know becomes text."""
    print(json.dumps({"ok": True, **value}, default=str))


def print_table(rows: list[tuple[str, ...]]) -> None:
    """Print rows in columns as wide as they need."""
    widths = [max(len(row[n]) for row in rows) for n in range(max(map(len, rows), default=0))]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)).rstrip())
