"""Rows as others write them, made ours: chosen columns, ShareGPT, Alpaca, and lists that stand in a cell as text."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from shared.errors import DataError, did_you_mean

# ShareGPT's and its relatives' names of the roles.
SPEAKERS = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "observation": "tool", "function_response": "tool", "function_call": "assistant", "function": "tool",
    "ai": "assistant", **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
}  # fmt: skip
LISTS = ("messages", "conversations", "tools", "functions")
# Ways to write a row: the keys that make one, and those that are read beside them.
FORMS = {
    "messages": (("messages",), ("tools", "functions")),
    "conversations": (("conversations",), ("system", "tools")),
    "Alpaca": (("instruction", "output"), ("input", "system")),
    "prompt": (("prompt", "completion"), ()),
    "text": (("text",), ()),
}
CHOICES = {  # data.columns that read a row in one of several ways
    "messages": "messages: messages", "conversations": "messages: conversations",
    "prompt": "prompt: prompt, completion: completion",
}  # fmt: skip


def translate(value: dict[str, Any], *, source: str, columns: Mapping[Any, str] | None = None) -> dict[str, Any]:
    """Return a row under our keys: {"text"}, {"prompt", "completion"} or {"messages"}; what is unknown stays.

    columns: our key -> the file's; the others are left out then.

    >>> translate({"instruction": "Add", "input": "1 and 2", "output": "3"}, source="rows.json:1")["messages"]
    [{'role': 'user', 'content': 'Add\\n\\n1 and 2'}, {'role': 'assistant', 'content': '3'}]
    """
    if columns:
        value = choose(value, columns, source=source)
    form = find_form(value, source=source)
    value = {key: from_cell(inner) if key in LISTS else inner for key, inner in value.items()}
    if form == "Alpaca":
        return {"messages": with_system(alpaca(value), value)}
    if form == "prompt" and isinstance(value["prompt"], list):
        return {"messages": prompt_turns(value, source=source), "tools": value.get("tools")}
    if "messages" in value and form in ("messages", None):
        tools = value.get("tools") or as_tools(value.get("functions"))
        return {"messages": read_turns(value["messages"], source=source), "tools": tools}
    if "conversations" in value and form in ("conversations", None):
        turns = with_system(read_turns(value["conversations"], source=source), value)
        return {"messages": turns, "tools": value.get("tools")}
    if form is None:
        return value
    own, others = FORMS[form][0], ("text", "prompt", "completion")
    return {key: inner for key, inner in value.items() if key in own or (key in others and inner not in (None, ""))}


def find_form(value: dict[str, Any], *, source: str) -> str | None:
    """Return which of FORMS a row is, None where it is none of them; raises DataError where it is several."""
    ways = ((name, keys) for name, (keys, _) in FORMS.items() if keys[0] in value)  # of most rows one
    found = [name for name, keys in ways if all(holds(value, key) for key in keys)]
    if found == ["Alpaca", "text"]:  # Alpaca's own files have the whole text beside its parts
        found.remove("text")
    if len(found) > 1:
        both = " and ".join(" + ".join(f'"{key}"' for key in FORMS[name][0]) for name in found[:2])
        what = f"{source}: both {both}, and each would be another row to learn from"
        raise DataError(what, fix=way_out(value, found[0]))
    return found[0] if found else None


def way_out(value: dict[str, Any], form: str) -> str:
    """Return how a row of several ways is read in one, such that nothing that belongs to it is lost."""
    beside = {key for key in ("tools", *FORMS[form][1]) if holds(value, key)}
    if form not in CHOICES or not beside <= {"tools"}:
        return "take one out of the row"
    return f"choose: data.columns: {{{', '.join([CHOICES[form], *(f'{key}: {key}' for key in beside)])}}}"


def holds(value: dict[str, Any], key: str) -> bool:
    """Return whether a row has a value under a key; an empty cell of a table is none, unless it may be meant so."""
    return value.get(key) is not None and (value[key] != "" or key in ("prompt", "instruction", "output"))


def unread_keys(value: dict[str, Any], *, source: str) -> tuple[str, ...]:
    """Return the keys of a row that hold something and are not read.

    >>> unread_keys({"text": "a", "id": 7, "note": None}, source="rows.json:1")
    ('id',)
    """
    form = find_form(value, source=source)
    read = [key for keys in FORMS[form] for key in keys] if form else list(value)
    if form == "prompt" and isinstance(value["prompt"], list):
        read.append("tools")
    # interned: JSON makes names anew in every row, and rows may be millions
    return tuple(sys.intern(key) for key, inner in value.items() if inner not in (None, "") and key not in read)


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


def prompt_turns(value: dict[str, Any], *, source: str) -> list[Any]:
    """Return a prompt and a completion of messages, as TRL has them, as one conversation; prompts carry no loss."""
    if not isinstance(value["completion"], list):
        raise DataError(
            f'{source}: "prompt" is a list of messages, "completion" is not',
            expected='two lists, or two texts', fix='"completion": [{"role": "assistant", "content": "..."}]',
        )  # fmt: skip
    asked, said = (read_turns(value[key], source=source) for key in ("prompt", "completion"))
    return [without_loss(message) for message in asked] + said


def without_loss(message: Any) -> Any:
    """Return a message that is not learned, where it is the assistant's."""
    spoken = isinstance(message, dict) and message.get("role") == "assistant"
    return {**message, "weight": 0} if spoken else message


def as_tools(functions: Any) -> Any:
    """Return OpenAI's older "functions" as tools."""
    return [{"type": "function", "function": one} for one in functions] if isinstance(functions, list) else functions


def read_turns(turns: Any, *, source: str) -> Any:
    """Return turns as messages; {"from", "value"} is ShareGPT's way to write them."""
    if not isinstance(turns, list):
        return turns
    places = [f"{source}: message {n}" for n in range(len(turns))]
    return [read_message(from_sharegpt(turn, place), place) for turn, place in zip(turns, places, strict=True)]


def read_message(message: Any, place: str) -> Any:
    """Return a message with its content as one text, and OpenAI's older "function_call" as a call of a tool."""
    if not isinstance(message, dict):
        return message
    if isinstance(message.get("content"), list):
        message = {**message, "content": join_parts(message["content"], place)}
    if message.get("role") == "function":
        message = {**message, "role": "tool"}
    if isinstance(message.get("function_call"), dict) and not message.get("tool_calls"):
        message = {**message, "tool_calls": [{"type": "function", "function": message["function_call"]}]}
    return {key: inner for key, inner in message.items() if key != "function_call"}


def join_parts(parts: list[Any], place: str) -> str:
    """Return the text of a content in parts, [{"type": "text", "text": "..."}]; raises DataError for any other part."""
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind != "text":
            raise DataError(
                f'{place}: "content" has a part of type "{kind}", and this trains on texts', expected="parts of text",
                fix="take the part out, or remove the row",
            )  # fmt: skip
        if not (isinstance(part, dict) and isinstance(part.get("text"), str)):
            raise DataError(
                f'{place}: "content" is a list, and not of texts', expected='a text, or [{"type": "text", "text"}]'
            )
    return "".join(part["text"] for part in parts)


def from_sharegpt(turn: Any, place: str) -> Any:
    """Return a turn as a message, one that is a message already as it is; raises DataError for an unknown speaker."""
    if not (isinstance(turn, dict) and "from" in turn and "role" not in turn):
        return turn
    speaker, said = turn["from"], turn.get("value")
    if speaker == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": [read_call(said, place)]}
    if isinstance(speaker, str) and speaker not in SPEAKERS:
        raise DataError(f'{place} has role "{speaker}" in "from"', fix=did_you_mean(speaker.lower(), SPEAKERS))
    role = SPEAKERS[speaker] if isinstance(speaker, str) else speaker
    return {"role": role, "content": said, **{key: turn[key] for key in ("weight", "train") if key in turn}}


def read_call(said: Any, place: str) -> dict[str, Any]:
    """Return the call of a function that ShareGPT keeps as JSON text; raises DataError."""
    call = None
    if isinstance(said, str):
        with suppress(ValueError, RecursionError):
            call = json.loads(said)
    if not (isinstance(call, dict) and isinstance(call.get("name"), str)):
        raise DataError(f"{place}: a function_call that is no call", expected='{"name": "...", "arguments": {...}}')
    return {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}
