"""Fault points: named places where a test makes a real fault happen; without MLXLORA_FAULT they do nothing.

MLXLORA_FAULT=point:nth[+][:action], several with commas between. nth counts how often this process comes by, from 1;
with + every later pass counts too. The action is SIGKILL unless it says otherwise: another signal's name (SIGTERM), an
errno's (ENOSPC: an OSError), abort, memory (a MemoryError), or nan (the caller spoils its own numbers).
"""

from __future__ import annotations

import errno
import os
import signal
from collections import Counter

VARIABLE = "MLXLORA_FAULT"
passed: Counter[str] = Counter()  # how often each point was passed, while the variable is set


def hit(point: str) -> bool:
    """Do what MLXLORA_FAULT asks for here; return whether it is "nan", which is the caller's to do."""
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return False
    passed[point] += 1
    for entry in wanted.split(","):
        name, nth, action = (*entry.split(":"), "SIGKILL")[:3]
        later = nth.endswith("+")
        first = int(nth.rstrip("+"))
        if name == point and (passed[point] == first or (later and passed[point] > first)):
            return act(action, point)
    return False


def act(action: str, point: str) -> bool:
    """Make the fault happen; raises ValueError for an action that nobody knows."""
    if action.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[action])
    elif action == "abort":
        os.abort()
    elif action == "memory":
        raise MemoryError(f"fault at {point}")
    elif action != "nan":
        number = getattr(errno, action, None)
        if number is None:
            raise ValueError(f"{VARIABLE}: unknown action {action}")
        raise OSError(number, os.strerror(number))
    return action == "nan"
