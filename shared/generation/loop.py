"""Continuing prompts side by side, once for all backends: who joins, who is done, and which token comes next.

A prompt that is done leaves and the next one joins: rows of a backend are never empty while prompts wait.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from shared.generation.sampling import pick
from shared.protocols import Rows
from shared.seeds import key64
from shared.types import Sampling, Token


@dataclass
class Row:
    """One prompt in the making. `key` tells its noise from that of other prompts, alone or in a batch."""

    number: int
    prompt: Sequence[int]
    key: int
    made: int = 0
    last: int = 0
    stopped: bool = False
    seen: set[int] = field(default_factory=set[int])

    def take(self, logits_V: np.ndarray, sampling: Sampling) -> Token:
        """Return the next token of the row."""
        token, log_prob = pick(logits_V, sampling, prompt=self.key, n=self.made, seen=self.seen)
        self.made, self.last, self.stopped = self.made + 1, token, token in sampling.stop_tokens
        self.seen.add(token)
        return Token(prompt=self.number, token=token, log_prob=log_prob, stopped=self.stopped)


def generate(
    rows: Rows, prompts: Sequence[Sequence[int]], sampling: Sampling, *, width: int, ended: Collection[int] = ()
) -> Iterator[Token]:
    """Yield tokens of up to `width` prompts in turns; the end token is yielded too, marked `stopped`.

    ended: prompts by number that get no more tokens; the reader may add to it while reading.
    """
    waiting, active = deque(make_rows(prompts)), list[Row]()
    while waiting or active:
        if waiting and len(active) < width:
            active.append(waiting.popleft())
            yield active[-1].take(rows.add(active[-1].prompt), sampling)
        else:
            logits_BV = rows.step([row.last for row in active])
            for row, logits_V in zip(active, logits_BV, strict=True):
                yield row.take(logits_V, sampling)
        going = [n for n, row in enumerate(active) if not is_done(row, sampling, ended)]
        if len(going) < len(active):
            rows.keep(going)
            active = [active[n] for n in going]


def make_rows(prompts: Sequence[Sequence[int]]) -> list[Row]:
    """Return a row per prompt; of equal prompts each has a key of its own, the first one that which it has alone."""
    times, rows = Counter[tuple[int, ...]](), list[Row]()
    for number, prompt in enumerate(prompts):
        ids = tuple(prompt)
        rows.append(Row(number, ids, key64(times[ids], *ids), seen=set(ids)))
        times[ids] += 1
    return rows


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many ids two texts begin with alike.

    >>> common_length([1, 2, 3], [1, 2, 4, 5])
    2
    """
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def is_done(row: Row, sampling: Sampling, ended: Collection[int]) -> bool:
    """Return whether a row gets no more tokens."""
    return row.stopped or row.made >= sampling.max_tokens or row.number in ended
