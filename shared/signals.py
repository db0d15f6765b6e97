"""Signals of a run: those that ask it to stop let the running update finish; time spent stopped is not counted."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

TWICE = (signal.SIGINT, signal.SIGTERM)  # a second one leaves at once
ASKING = (*TWICE, signal.SIGHUP)  # a shell and the kernel each send SIGHUP when a terminal closes


TICK_S, STILL_S = 0.2, 1.0  # how often the clock is looked at, and from when on a jump of it counts


@dataclass
class StopFlag:
    """The signal that asked to stop, 0 while none has, and how long the process stood still (SIGSTOP to SIGCONT).

    Nobody hears of a SIGSTOP, but a thread that wakes every TICK_S sees a jump of the clock behind it. It counts where
    SIGCONT came too: other jumps are a busy machine's, and a SIGCONT without one ends nothing.
    """

    number: int = 0
    continued: bool = False  # since the last `take_still`
    still_s: float = 0.0  # in all
    jumped_s: float = 0.0
    ticked_at: float = field(default_factory=time.perf_counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def tick(self) -> None:
        """Look at the clock."""
        with self.lock:
            now = time.perf_counter()
            late, self.ticked_at = now - self.ticked_at - TICK_S, now
            self.jumped_s += late if late > STILL_S else 0.0

    def take_still(self) -> float:
        """Return the seconds that the process stood still since the last call."""
        self.tick()
        found, self.jumped_s = self.jumped_s if self.continued else 0.0, 0.0
        self.continued = False
        self.still_s += found
        return found


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
        flag.continued = True

    wanted = [number for number in ASKING if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, ask) for number in wanted}
    before[signal.SIGCONT] = signal.signal(signal.SIGCONT, went_on)
    over = threading.Event()
    threading.Thread(target=watch_clock, args=(flag, over), name="clock", daemon=True).start()
    try:
        yield flag
    finally:
        over.set()
        for number, handler in before.items():
            signal.signal(number, handler)


def watch_clock(flag: StopFlag, over: threading.Event) -> None:
    """Look at the clock until it is over."""
    while not over.wait(TICK_S):
        flag.tick()
