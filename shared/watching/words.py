"""Values as words of a page: numbers, times, and texts that nothing in a page takes for markup."""

from __future__ import annotations

import html
import re

LARGEST = 3.5e38  # beyond float32: as good as infinite
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


def escape(value: object) -> str:
    """Return a value as HTML text; what neither HTML nor UTF-8 can hold becomes a mark."""
    text = CONTROL.sub("\ufffd", str(value)).encode("utf-8", "replace").decode("utf-8")
    return html.escape(text, quote=True)


def number(value: object) -> float | None:
    """Return a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < LARGEST else None  # false for nan, too


def shown(value: object) -> str:
    """Return a value of the manifest for people."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def short(value: float) -> str:
    """Return a number with four significant digits."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Return a time for people: 26.0 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def moment(created: str) -> str:
    """Return a time of a manifest for people.

    >>> moment("2026-01-02T03:04:05+00:00")
    '2026-01-02 03:04 UTC'
    """
    day, _, clock = created.partition("T")
    return f"{day} {clock[:5]} UTC" if clock.endswith("+00:00") else created
