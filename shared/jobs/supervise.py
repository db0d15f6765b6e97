"""`--supervise`: training in a child process, started again after an end that no handler in it can catch."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from shared.running.checkpoint import step_dirs
from shared.signals import ASKING

# Metal and C++ abort, a broken kernel ends in SIGSEGV or SIGBUS, the kernel's OOM killer sends SIGKILL.
ABORTS = (signal.SIGABRT, signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP)
MOST_RESTARTS = 3


def supervise(command: Sequence[str], *, folder: Path, note: Callable[[str], None]) -> int:
    """Return the exit code of a training command that writes into a run folder, -N where signal N ended it.

    After an abort it is started again, at most three times: from the last checkpoint, with micro-batches of half the
    size. Micro-batches do not change the mathematics, but sums are then taken in another order (1e-6).
    SIGINT, SIGTERM and SIGHUP are passed on; a terminal's Ctrl-C reaches only this process, so it comes once.
    """
    children: list[subprocess.Popen[bytes]] = []
    found = traces(folder)
    asked: list[int] = []

    def pass_on(number: int, _frame: object) -> None:
        asked.append(number)
        for child in children[-1:]:
            child.send_signal(number)

    wanted = [number for number in ASKING if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, pass_on) for number in wanted}
    try:
        more: list[str] = []
        for left in range(MOST_RESTARTS, -1, -1):
            children.append(subprocess.Popen([*command, *more], process_group=0))
            code = children[-1].wait()
            if code >= 0 or -code not in ABORTS or asked or not left:
                break
            more = smaller(folder, found)
            note(
                f"training ended by {signal.Signals(-code).name}; {' '.join(['started again', *more])}, {left - 1} left"
            )
        return code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def traces(folder: Path) -> set[tuple[str, int]]:
    """Return the checkpoints and the manifest of a run folder, each file with the time it was written."""
    files = [*step_dirs(folder / "checkpoints"), folder / "manifest.json"]
    return {(file.name, file.stat().st_mtime_ns) for file in files if file.exists()}


def smaller(folder: Path, found: set[tuple[str, int]]) -> list[str]:
    """Return the arguments of the next try: from the last checkpoint, micro-batches of half the size of the last.

    found: what was there before the first try; it may be another run's, which `--resume never` is to replace.
    """
    new = {name for name, _ in traces(folder) - found}
    resume = ["--resume", "auto"] if any(name != "manifest.json" for name in new) else []
    if "manifest.json" not in new:
        return resume  # it ended before anything was computed
    try:
        size = int(json.loads((folder / "manifest.json").read_text())["micro_tokens"])
    except (OSError, ValueError, KeyError, TypeError):
        return resume
    return [*resume, "--set", f"train.micro_tokens={max(size // 2, 1)}"]
