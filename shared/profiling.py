"""A trace of some updates of a run, made by the framework's own profiler, for `log.profile`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from shared.protocols import Backend

FOLDER = "profile"  # of the run folder
UNTRACED = 2  # first updates, which allocate and compile


class Tracing:
    """A callback that holds a trace open for some updates."""

    def __init__(self, trace: AbstractContextManager[None], target: Path, updates: int) -> None:
        self.trace, self.target, self.updates = trace, target, updates
        self.seen = 0
        self.open = ExitStack()

    def on_update(self, step: int) -> None:
        """Begin behind the first updates, and end `updates` later."""
        self.seen += 1
        if self.seen == UNTRACED:
            self.target.mkdir(exist_ok=True)
            self.open.enter_context(self.trace)
        elif self.seen == UNTRACED + self.updates:
            self.open.close()


@contextmanager
def tracing(backend: Backend, folder: Path, updates: int | None) -> Iterator[list[Any]]:
    """Hold the callbacks that trace `updates` updates into the run folder, none for None; raises CapabilityError."""
    if updates is None:
        yield []
        return
    found = Tracing(backend.trace(folder / FOLDER), folder / FOLDER, updates)
    with found.open:  # a run that is shorter, or ends with an error
        yield [found]
