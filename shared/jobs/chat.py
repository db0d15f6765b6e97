"""A conversation with a model: its history, and answers that are streamed."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field, replace
from typing import Any

from shared.errors import DataError
from shared.generation.answers import Answer, Completion
from shared.protocols import Rows
from shared.sessions import Session, follow, most_tokens
from shared.types import Sampling

Message = dict[str, Any]


@dataclass
class Chat:
    """What was said so far. `stream` and `say` add a message and its answer."""

    session: Session
    sampling: Sampling
    system: str | None = None
    messages: list[Message] = field(default_factory=list[Message])  # without the system prompt
    last: Completion | None = None  # the last answer with its facts
    rows: Rows = field(init=False)  # what was said is computed once

    def __post_init__(self) -> None:
        if self.session.tokenizer.template is None:
            raise DataError(
                f"{self.session.folder.name} has no chat template, which a chat needs",
                code="E214",
                fix="use the instruct version of the model, or mlxlora generate",
            )
        self.set_system(self.system)

    def reset(self) -> None:
        """Forget what was said; the system prompt stays."""
        self.messages, self.last, self.rows = [], None, self.session.model.rows(width=1)

    def set_system(self, text: str | None) -> None:
        """Take another system prompt, None for none, and begin anew; raises DataError where the template has none."""
        self.ids([*system_message(text), {"role": "user", "content": "?"}])
        self.system = text
        self.reset()

    def say(self, text: str) -> Completion:
        """Return the answer to a message."""
        for _ in self.stream(text):
            pass
        assert self.last is not None
        return self.last

    def stream(self, text: str) -> Generator[str, None, None]:
        """Yield the answer to a message, piece by piece; of one that is broken off, what was yielded is kept."""
        asked = {"role": "user", "content": text}
        ids = self.ids([*system_message(self.system), *self.messages, asked])
        sampling = replace(self.sampling, max_tokens=self.room(len(ids)))
        answer = Answer(self.session.tokenizer.decode, sampling, len(ids))
        try:
            for _, piece, _ in follow(self.session, [answer], [ids], sampling, rows=self.rows):
                if piece:
                    yield piece
        finally:
            if not answer.finish_reason:
                answer.text = answer.text[: answer.shown]
                self.rows = self.session.model.rows(width=1)  # it may have been in the middle of a step
            self.last = answer.completion()
            if answer.finish_reason or answer.text:
                self.messages += [asked, {"role": "assistant", "content": answer.text}]

    def ids(self, messages: list[Message]) -> list[int]:
        """Return the ids of a conversation that the assistant is to answer; raises DataError."""
        return self.session.tokenizer.encode(self.session.tokenizer.chat_prompt(messages), special=False)

    def room(self, tokens: int) -> int:
        """Return how many tokens an answer may have behind so many; raises DataError where none fits."""
        most = most_tokens(self.session)
        if most is None:
            return self.sampling.max_tokens
        if tokens >= most:
            raise DataError(
                f"the conversation has {tokens} tokens, and the model takes {most}",
                fix="begin anew (/reset), or say less at once",
                code="E215",
            )
        return min(self.sampling.max_tokens, most - tokens)


def system_message(text: str | None) -> list[Message]:
    """Return the message of a system prompt, none without."""
    return [{"role": "system", "content": text}] if text else []
