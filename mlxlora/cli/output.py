"""What commands print: notes, one object as JSON, tables."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

UNSEEN = dict.fromkeys([n for n in (*range(32), *range(127, 160)) if chr(n) not in "\n\t"])  # C0, DEL, C1


def printable(text: str) -> str:
    """Return a model's text without control characters where stdout is a terminal: none moves its cursor."""
    return text.translate(UNSEEN) if sys.stdout.isatty() else text


def say(text: str) -> None:
    """Print a note on stderr."""
    print(f"note: {text}", file=sys.stderr)


def emit(result: Any, **more: Any) -> None:
    """Print a dataclass as one JSON object on one line."""
    from dataclasses import asdict

    emit_object({**asdict(result), **more})


def emit_object(value: dict[str, Any]) -> None:
    """Print an object with `ok` in front, true unless it says otherwise; what JSON does not know becomes text.

    A number that is not finite becomes null: JSON has no name for it.
    """
    print(json.dumps(without_nan({"ok": True, **value}), default=str, allow_nan=False))


def without_nan(value: Any) -> Any:
    """Return a value with null for numbers that are not finite.

    >>> without_nan({"loss": math.nan, "curve": [1.0, -math.inf], "steps": (1, 2)})
    {'loss': None, 'curve': [1.0, None], 'steps': [1, 2]}
    """
    if isinstance(value, Mapping):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(rows: list[tuple[str, ...]]) -> None:
    """Print rows in columns as wide as they need."""
    widths = [max(len(row[n]) for row in rows) for n in range(max(map(len, rows), default=0))]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)).rstrip())


def check_page(file: Path | None) -> None:
    """Raise ConfigError where --html would replace a file that is no page."""
    replaceable(file, "--html", lambda head: head.lstrip().lower().startswith(b"<!doctype html"), what="no page")


def replaceable(file: Path | None, option: str, is_ours: Callable[[bytes], bool], *, what: str) -> None:
    """Raise ConfigError where a file exists, is not empty and does not begin like one of ours."""
    if file is None or not file.expanduser().is_file():
        return
    with file.expanduser().open("rb") as lines:
        head = lines.readline(2**20)
    if head and not is_ours(head):
        from shared.errors import ConfigError

        raise ConfigError(f"{option}: {file} exists and is {what}", code="E205", fix=f"choose another {option}")


def is_answer(head: bytes) -> bool:
    """Return whether a line is an answer as `AnswerFile` writes it."""
    try:
        found = json.loads(head)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and ("finish_reason" in found or {"wanted", "got", "scores"} <= found.keys())


class AnswerFile:
    """A file of answers, one JSON object a line, in order; each is written once those before it are.

    It is opened before any work is done, and an older file stays until the first answer. What is done when the work is
    broken off is there. Raises OSError, and ConfigError for a file that holds something else.
    """

    def __init__(self, path: Path, *, option: str) -> None:
        replaceable(path, option, is_answer, what="no file of answers")
        self.path = path.expanduser()
        self.new = not self.path.exists()
        self.lines = self.path.open("a", encoding="utf-8")
        self.waiting: dict[int, str] = {}  # answered before one that stands above them
        self.written = self.next = 0

    def __enter__(self) -> AnswerFile:
        return self

    def add(self, number: int, row: Mapping[str, Any]) -> None:
        """Take the answer to prompt `number`, counted from 0."""
        self.waiting[number] = json.dumps(row, ensure_ascii=False) + "\n"
        while self.next in self.waiting:
            self.write(self.waiting.pop(self.next))
            self.next += 1

    def write(self, line: str) -> None:
        """Write a line, the first in the place of what stood in the file."""
        if not self.written and self.path.is_file():
            self.lines.truncate(0)
        self.lines.write(line)
        self.lines.flush()
        self.written += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self.lines:
            for _, line in sorted(self.waiting.items()):
                self.write(line)
        if self.written:
            say(f"{self.written} answers in {self.path}")
        elif self.new:
            with suppress(OSError):
                self.path.unlink()
