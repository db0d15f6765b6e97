"""What a model's tokens say: text as it comes, the places where it ends, and what is known of it afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from shared.types import Sampling, Token

HALF = "\ufffd"  # what a tokenizer gives for bytes that are no character, or not yet


@dataclass(frozen=True)
class LogProbs:
    """Log-probabilities of an answer's tokens, its end token with them: nats, at temperature 1, nothing filtered."""

    sum: float
    mean: float
    min: float


@dataclass(frozen=True)
class Completion:
    """A finished generation.

    tokens: ids without the end token; those of a stop string are there, though the text ends before it.
    stopped: whether an end token came. finish_reason: "stop" (an end token), "length", "stop_string" or "interrupted".
    """

    text: str
    tokens: tuple[int, ...]
    stopped: bool
    prompt_tokens: int
    finish_reason: str
    stop_string: str | None
    log_probs: LogProbs


@dataclass
class Answer:
    """An answer in the making; what may be half a character or the beginning of a stop string is held back."""

    decode: Callable[[Sequence[int]], str]
    sampling: Sampling
    prompt_tokens: int
    live: bool = True  # false: nobody asks for pieces, and text is made once, at the end, where nothing else needs it
    tokens: list[int] = field(default_factory=list[int])
    log_probs: list[float] = field(default_factory=list[float])
    text: str = ""
    shown: int = 0  # characters given out
    finish_reason: str = ""
    stop_string: str | None = None

    def take(self, token: Token) -> str:
        """Return the text that a token adds and that is certain by now."""
        self.log_probs.append(token.log_prob)
        if not token.stopped:
            self.tokens.append(token.token)
        last = token.stopped or len(self.tokens) >= self.sampling.max_tokens
        if not (last or self.live or self.sampling.stop_strings):
            return ""
        self.text = self.decode(self.tokens)
        found = find_stop(self.text, self.sampling.stop_strings, start=self.shown)
        if found is not None:
            at, self.stop_string = found
            self.text = self.text[:at]
            return self.finish("stop_string")
        if last:
            return self.finish("stop" if token.stopped else "length")
        return self.show(certain(self.text, self.sampling.stop_strings))

    def finish(self, reason: str) -> str:
        """Return the text that was held back: nothing more comes."""
        self.finish_reason = self.finish_reason or reason
        return self.show(len(self.text))

    def show(self, length: int) -> str:
        """Return the text up to a length that has not been given out."""
        start, self.shown = self.shown, max(self.shown, length)
        return self.text[start:length]

    def completion(self) -> Completion:
        """Return the finished answer."""
        number = max(len(self.log_probs), 1)
        facts = LogProbs(sum(self.log_probs), sum(self.log_probs) / number, min(self.log_probs, default=0.0))
        stopped, reason = self.finish_reason == "stop", self.finish_reason or "interrupted"
        return Completion(
            self.text, tuple(self.tokens), stopped, self.prompt_tokens, reason, self.stop_string, facts
        )  # fmt: skip


def find_stop(text: str, stops: Sequence[str], *, start: int) -> tuple[int, str] | None:
    """Return where the first stop string stands, and which one; of those at one place the longest.

    >>> find_stop("one two", ("two", " t"), start=0)
    (3, ' t')
    """
    found = [(at, -len(stop), stop) for stop in stops if (at := text.find(stop, start)) >= 0]
    return (min(found)[0], min(found)[2]) if found else None


def certain(text: str, stops: Sequence[str]) -> int:
    """Return how many characters of a text stay as they are, whatever follows.

    >>> certain("caf\\ufffd", ()), certain("Hello\\nUs", ("\\nUser:",))
    (3, 5)
    """
    whole = len(text.rstrip(HALF))
    longest = max(map(len, stops), default=1) - 1
    for at in range(max(whole - longest, 0), whole):
        if any(stop.startswith(text[at:whole]) for stop in stops):
            return at
    return whole
