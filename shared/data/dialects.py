"""Rows as others write them, made ours: chosen columns, ShareGPT, Alpaca, and lists that stand in a cell as text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from shared.errors import DataError, did_you_mean

# ShareGPT's and its relatives' names of the roles.
SPEAKERS = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "observation": "tool", "function_response": "tool", "function_call": "assistant",
}  # fmt: skip
LISTS = ("messages", "conversations", "tools")


def translate(value: dict[str, Any], *, source: str, columns: Mapping[Any, str] | None = None) -> dict[str, Any]:
    """Return a row under our keys: {"text"}, {"prompt", "completion"} or {"messages"}; what is unknown stays.

    columns: our key -> the file's; the others are left out then.

    >>> translate({"instruction": "Add", "input": "1 and 2", "output": "3"}, source="rows.json:1")["messages"]
    [{'role': 'user', 'content': 'Add\\n\\n1 and 2'}, {'role': 'assistant', 'content': '3'}]
    """
    if columns:
        value = choose(value, columns, source=source)
    value = {key: from_cell(inner) if key in LISTS else inner for key, inner in value.items()}
    if "messages" in value:
        return {**value, "messages": read_turns(value["messages"], source=source)}
    if "conversations" in value:
        turns = with_system(read_turns(value["conversations"], source=source), value)
        return {"messages": turns, "tools": value.get("tools")}
    if {"instruction", "output"} <= value.keys() and not {"prompt", "completion"} & value.keys():
        return {"messages": with_system(alpaca(value), value)}
    return value


def choose(value: dict[str, Any], columns: Mapping[Any, str], *, source: str) -> dict[str, Any]:
    """Return the columns that the config names under our keys; raises DataError where one is absent."""
    for name in columns.values():
        if name not in value:
            raise DataError(f'{source}: no column "{name}" (data.columns)', fix=did_you_mean(name, map(str, value)))
    return {key: value[name] for key, name in columns.items()}


def from_cell(value: Any) -> Any:
    """Return what a text in a cell of a table stands for where it is a JSON list, anything else as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def alpaca(value: dict[str, Any]) -> list[dict[str, Any]]:
    """Return Alpaca's row as a conversation: the instruction, and behind a blank line what it is about."""
    question, about = value["instruction"], value.get("input")
    if isinstance(question, str) and isinstance(about, str) and about:
        question = f"{question}\n\n{about}"
    return [{"role": "user", "content": question}, {"role": "assistant", "content": value["output"]}]


def with_system(messages: Any, value: dict[str, Any]) -> Any:
    """Return messages behind the text of a row's "system" column, where it has one."""
    if not (isinstance(messages, list) and value.get("system")):
        return messages
    return [{"role": "system", "content": value["system"]}, *messages]


def read_turns(turns: Any, *, source: str) -> Any:
    """Return turns as messages; {"from", "value"} is ShareGPT's way to write them."""
    return [from_sharegpt(turn, source=source) for turn in turns] if isinstance(turns, list) else turns


def from_sharegpt(turn: Any, *, source: str) -> Any:
    """Return a turn as a message, one that is a message already as it is."""
    if not (isinstance(turn, dict) and "from" in turn and "role" not in turn):
        return turn
    speaker, said = turn["from"], turn.get("value")
    if speaker == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": [read_call(said, source=source)]}
    return {"role": SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker, "content": said}


def read_call(said: Any, *, source: str) -> dict[str, Any]:
    """Return the call of a function that ShareGPT keeps as JSON text; raises DataError."""
    call = None
    if isinstance(said, str):
        with suppress(ValueError, RecursionError):
            call = json.loads(said)
    if not (isinstance(call, dict) and isinstance(call.get("name"), str)):
        raise DataError(f"{source}: a function_call that is no call", expected='{"name": "...", "arguments": {...}}')
    return {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}
