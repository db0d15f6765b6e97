"""A model's own chat template, run in a sandbox, and the places in its text that the assistant says.

A template is somebody else's program: it cannot reach Python objects (ImmutableSandboxedEnvironment), may
write at most 1 MB, loop over at most 10,000 numbers at once, and take 2 seconds.
"""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, ClassVar

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from shared.errors import DataError

MAX_OUTPUT = 1_000_000
MAX_RANGE = 10_000
MAX_SECONDS = 2.0


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and [start, end) of each assistant turn with its end token, in characters."""

    text: str
    spans: tuple[tuple[int, int], ...]


class _Generation(Extension):
    """Accept {% generation %}...{% endgeneration %}, which some templates use to mark assistant text."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=8)
def compile_template(source: str) -> jinja2.Template:
    """Return a template compiled in the sandbox; raises jinja2.TemplateError."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.globals["range"] = bounded_range
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters["tojson"] = to_json
    return environment.from_string(source)


def bounded_range(*args: int) -> range:
    """Return a range; raises where it is longer than templates have use for."""
    result = range(*args)
    if len(result) > MAX_RANGE:
        raise jinja2.TemplateError(f"range of {len(result)}, at most {MAX_RANGE}")
    return result


def refuse(message: str) -> None:
    """Raise the message a template gives for a conversation that it does not accept."""
    raise jinja2.TemplateError(message)


def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **other: Any) -> str:
    """Return JSON as transformers' templates expect it: without HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **other)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after `seconds`; only the main thread of a POSIX process can be limited."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def expire(_signal: int, _frame: Any) -> None:
        raise TimeoutError(f"took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_template(source: str, *, messages: list[dict[str, Any]], add_generation_prompt: bool, **values: Any) -> str:
    """Return the text of a conversation; raises DataError with the template's own words."""
    parts: list[str] = []
    size = 0
    try:
        with time_limit(MAX_SECONDS):
            stream = compile_template(source).generate(
                messages=messages, add_generation_prompt=add_generation_prompt, **values
            )
            for part in stream:
                parts.append(part)
                size += len(part)
                if size > MAX_OUTPUT:
                    raise jinja2.TemplateError(f"wrote more than {MAX_OUTPUT} characters")
    except (
        jinja2.TemplateError,
        TimeoutError,
        TypeError,
        ValueError,
        KeyError,
        AttributeError,
        OverflowError,
    ) as error:
        raise DataError(
            f"the chat template failed: {error}", fix="change the row, or the model's chat template"
        ) from None
    except RecursionError:
        raise DataError("the chat template failed: endless recursion", fix="change the model's chat template") from None
    return "".join(parts)


def render_chat(source: str, *, messages: list[dict[str, Any]], **values: Any) -> Rendered:
    """Return a conversation's text and the spans of its assistant turns.

    A turn is what the template adds between "assistant, speak" (the generation prompt) and the end of that
    message. Where earlier turns come out differently in the full text, its content is searched for instead.
    """

    def render(upto: int, prompt: bool) -> str:
        return run_template(source, messages=messages[:upto], add_generation_prompt=prompt, **values)

    text = render(len(messages), False)
    spans: list[tuple[int, int]] = []
    cursor = 0
    for n, message in enumerate(messages):
        span = turn_by_prefix(text, render, n) or turn_by_search(text, messages, n, cursor, render)
        if span is None and message["role"] == "assistant":
            raise DataError(f"cannot find message {n} in what the chat template made of it", fix="change the row")
        if message["role"] == "assistant" and span:
            spans.append(span)
        cursor = span[1] if span else cursor
    return Rendered(text, tuple(spans))


def turn_by_prefix(text: str, render: Callable[[int, bool], str], n: int) -> tuple[int, int] | None:
    """Return where message n stands, if the renderings before and after it are prefixes of the text."""
    try:
        before, after = render(n, True), render(n + 1, False)
    except DataError:
        return None
    if text.startswith(after) and after.startswith(before):
        return len(before), len(after)
    return None


def turn_by_search(
    text: str, messages: list[dict[str, Any]], n: int, cursor: int, render: Callable[[int, bool], str]
) -> tuple[int, int] | None:
    """Return where message n stands by its content, to the start of the next message or the text's end."""
    content = (messages[n].get("content") or "").strip()
    start = text.find(content, cursor) if content else -1
    if start < 0:
        return None
    end = start + len(content)
    return start, end + end_marker(text[end:], messages[n + 1 :])


def end_marker(rest: str, following: list[dict[str, Any]]) -> int:
    """Return how many characters behind a turn's content still belong to it: to the line's end or next content."""
    next_content = next((c for m in following if (c := (m.get("content") or "").strip())), None)
    stop = rest.find(next_content) if next_content else len(rest)
    newline = rest.find("\n")
    return min(n for n in (stop, newline, len(rest)) if n >= 0)
