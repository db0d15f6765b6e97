"""The next update's micro-batches, made in a background thread while the device works on this one's."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from shared.data.layout import Layout
from shared.types import Batch

Make = Callable[[int, Layout], list[Batch]]  # (step, layout) -> the micro-batches of an update


class Ahead:
    """Gives what `make` gives, and has it ready where the same call for the next step follows.

    `make` is a pure function, so it does not matter who calls it; what it raises comes out of the `take` it is for.
    """

    def __init__(self, make: Make) -> None:
        self.make = make
        self.pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ahead")
        self.next: tuple[int, Layout, Future[list[Batch]]] | None = None

    def take(self, step: int, layout: Layout) -> list[Batch]:
        """Return the micro-batches of update `step`, and begin with those of the next."""
        ready, self.next = self.next, None
        if ready is not None and ready[:2] == (step, layout):
            batches = ready[2].result()
        else:  # the first update, or memory ran out and the pieces are smaller now
            batches = self.make(step, layout)
        self.next = (step + 1, layout, self.pool.submit(self.make, step + 1, layout))
        return batches
