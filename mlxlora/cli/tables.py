"""Tables as plain text."""

from __future__ import annotations


def print_table(rows: list[tuple[str, ...]]) -> None:
    """Print rows in columns as wide as they need."""
    widths = [max(len(row[n]) for row in rows) for n in range(max(map(len, rows), default=0))]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)).rstrip())
