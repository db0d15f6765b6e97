"""Signals that ask a run to stop: the running update finishes first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class StopFlag:
    """The signal that asked to stop, 0 while none has."""

    number: int = 0


@contextmanager
def stop_signals() -> Iterator[StopFlag]:
    """Let SIGINT and SIGTERM finish the running update; a second one ends the process at once."""
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def ask(number: int, _frame: Any) -> None:
        flag.number = number
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
