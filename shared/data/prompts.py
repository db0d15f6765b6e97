"""Prompts of a file: lines of a text, or rows as training has them, without their answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.data.dialects import translate
from shared.data.formats import READERS, read_values, to_text
from shared.data.rows import check_text
from shared.errors import DataError


@dataclass(frozen=True)
class Prompt:
    """What to go on from: a text, or a conversation for the chat template."""

    text: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    tools: Any = None

    @property
    def texts(self) -> list[str]:
        """Return what is written in it."""
        said = [message.get("content") for message in self.messages] if self.messages else [self.text]
        return [text for text in said if isinstance(text, str)]

    @property
    def last(self) -> str:
        """Return the text, or what was said last."""
        return str(self.messages[-1].get("content") or "") if self.messages else self.text


def read_prompts(path: Path) -> list[Prompt]:
    """Return a file's prompts; raises DataError with file:line.

    .txt: one per line. Else rows: a text alone, {"prompt"}, {"text"}, or {"messages"} up to the last answer.
    """
    if not path.is_file():
        raise DataError(f"no file of prompts at {path}", code="E210", expected="a file with one prompt per line or row")
    if path.suffix == ".txt":
        lines = to_text(path.read_bytes(), source=path.name).splitlines()
        found = [Prompt(line) for line in lines if line.strip()]
    elif path.suffix in READERS:
        found = [read_prompt(value, source=source) for value, source in read_values(path)]
    else:
        known = ", ".join((".txt", *READERS))
        raise DataError(f"{path.name} is no file of prompts", code="E210", expected=f"one of {known}")
    if not found:
        raise DataError(f"{path.name} has no prompts", code="E211", expected="one per line or row")
    return found


def read_prompt(value: Any, *, source: str) -> Prompt:
    """Return the prompt of a file's value; raises DataError."""
    if isinstance(value, dict) and not isinstance(value.get("prompt"), str):
        value = translate(value, source=source, columns=None)
    if isinstance(value, dict) and "messages" in value:
        return Prompt(messages=read_messages(value["messages"], source=source), tools=value.get("tools"))
    if isinstance(value, dict):
        key = next((key for key in ("prompt", "text") if key in value), None)
        if key is None:
            raise DataError(f"{source}: no prompt in it", expected='{"prompt"}, {"text"} or {"messages": [...]}')
        value = value[key]
    check_text(value, source=source, key="prompt", may_be_empty=False)
    return Prompt(value)


def read_messages(messages: Any, *, source: str) -> tuple[dict[str, Any], ...]:
    """Return a conversation up to what the assistant has to answer; raises DataError."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise DataError(f'{source}: "messages" is not a list of messages', expected='[{"role", "content"}, ...]')
    asked = list(messages)
    while asked and asked[-1]["role"] == "assistant":
        asked.pop()
    if not asked:
        raise DataError(f"{source}: only the assistant speaks", fix="add what it shall answer")
    for n, message in enumerate(asked):
        if not message.get("tool_calls"):
            check_text(message.get("content"), source=f"{source}: message {n}", key="content", may_be_empty=True)
    return tuple(asked)
