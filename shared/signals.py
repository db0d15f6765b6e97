"""Signals of a run: those that ask it to stop let the running update finish; time spent stopped is not counted."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

TWICE = (signal.SIGINT, signal.SIGTERM)  # a second one leaves at once
ASKING = (*TWICE, signal.SIGHUP)  # a shell and the kernel each send SIGHUP when a terminal closes


@dataclass
class StopFlag:
    """The signal that asked to stop, 0 while none has, and when the process was last continued (SIGCONT)."""

    number: int = 0
    continued_at: float = 0.0

    def gap(self, *, since: float) -> float:
        """Return the seconds from `since` (perf_counter) to a SIGCONT behind it: the process stood still."""
        return max(self.continued_at - since, 0.0)


@contextmanager
def stop_signals() -> Iterator[StopFlag]:
    """Let SIGINT, SIGTERM and SIGHUP finish the running update; a second SIGINT or SIGTERM ends the process at once.

    SIGHUP stays ignored where it is (nohup).
    """
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def ask(number: int, _frame: Any) -> None:
        flag.number = flag.number or number
        for twice in TWICE:
            signal.signal(twice, signal.SIG_DFL)

    def went_on(number: int, _frame: Any) -> None:
        flag.continued_at = time.perf_counter()

    wanted = [number for number in ASKING if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, ask) for number in wanted}
    before[signal.SIGCONT] = signal.signal(signal.SIGCONT, went_on)
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
