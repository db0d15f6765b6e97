"""A model's own chat template, run in a sandbox, and the places in its text that the assistant says.

A template is somebody else's program: it cannot reach Python objects (ImmutableSandboxedEnvironment), may
write at most 1 MB, loop over at most 10,000 numbers at once, and take 1 second and 256 MB.
"""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from shared.errors import DataError

MAX_OUTPUT = 1_000_000
MAX_RANGE = 10_000
MAX_SECONDS = 1.0
TODAY = datetime(2024, 7, 26)  # Llama 3's own default: the tokens of a row must not depend on when it is read
MAX_BYTES = 256 * 2**20
TEMPLATE_FAULTS = (
    jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, MemoryError,
)  # fmt: skip


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


class _Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox, with bounds on the operators that can take minutes or gigabytes in a single step."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and (abs(right) > 64 or abs(left) > MAX_OUTPUT):
            raise jinja2.TemplateError(f"{left} ** {right} is too large")
        if operator == "*":
            for text, count in ((left, right), (right, left)):
                if isinstance(text, str | list | tuple) and isinstance(count, int) and len(text) * count > MAX_OUTPUT:
                    raise jinja2.TemplateError(f"a repetition of {len(text) * count} elements")
        if operator == "%" and isinstance(left, str) and re.search(r"\d{5}|\*", left):
            raise jinja2.TemplateError("a format with a width of five digits or more")
        return super().call_binop(context, operator, left, right)


@lru_cache(maxsize=8)
def compile_template(source: str) -> jinja2.Template:
    """Return a template compiled in the sandbox; raises jinja2.TemplateError."""
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.globals["range"] = bounded_range
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = TODAY.strftime
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
    """Raise TimeoutError in the block after `seconds` of the process's own work, so that no pause counts.

    Only the main thread of a POSIX process can be limited.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def expire(_signal: int, _frame: Any) -> None:
        raise TimeoutError(f"took longer than {seconds:g} s")

    before = signal.signal(signal.SIGVTALRM, expire)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextmanager
def memory_limit(num_bytes: int) -> Iterator[None]:
    """Raise MemoryError in the block where the process grows by more; only Linux can tell and limit its size.

    The limit is the whole process's, so another thread, beside which a model may be training, does without.
    """
    statm = Path("/proc/self/statm")
    if not statm.is_file() or threading.current_thread() is not threading.main_thread():
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = int(statm.read_text().split()[0]) * resource.getpagesize() + num_bytes
    limit = most if soft == resource.RLIM_INFINITY else min(most, soft)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def limits() -> Iterator[None]:
    """Bound time and memory in the block; raises DataError with the template's own words."""
    try:
        with time_limit(MAX_SECONDS), memory_limit(MAX_BYTES):
            yield
    except DataError:
        raise
    except (*TEMPLATE_FAULTS, TimeoutError) as error:
        raise DataError(
            f"the chat template failed: {error or type(error).__name__}",
            code="E214",
            fix="change the row, or the model's chat template",
        ) from None
    except RecursionError:
        raise DataError(
            "the chat template failed: endless recursion", code="E214", fix="change the model's chat template"
        ) from None


def run_template(source: str, *, messages: list[dict[str, Any]], add_generation_prompt: bool, **values: Any) -> str:
    """Return the text of a conversation; raises DataError with the template's own words."""
    with limits():
        return write_text(source, messages=messages, add_generation_prompt=add_generation_prompt, **values)


def write_text(source: str, **values: Any) -> str:
    """Return what a template writes, without limits of time and memory."""
    parts: list[str] = []
    size = 0
    for part in compile_template(source).generate(**values):
        parts.append(part)
        size += len(part)
        if size > MAX_OUTPUT:
            raise jinja2.TemplateError(f"wrote more than {MAX_OUTPUT} characters")
    return "".join(parts)


MARK = "\ue000"  # a private-use character, which no conversation or template holds
Render = Callable[[list[dict[str, Any]], bool], str]


def render_chat(source: str, *, messages: list[dict[str, Any]], **values: Any) -> Rendered:
    """Return a conversation's text and the spans of its assistant turns.

    A turn is what the template adds between "assistant, speak" (the generation prompt) and the end of that
    message. Where earlier turns come out differently in the full text, a mark in its place tells where it is.
    """

    def render(chosen: list[dict[str, Any]], prompt: bool) -> str:
        return write_text(source, messages=chosen, add_generation_prompt=prompt, **values)

    with limits():
        text = render(messages, False)
        return Rendered(text, find_turns(text, messages, render))


def find_turns(text: str, messages: list[dict[str, Any]], render: Render) -> tuple[tuple[int, int], ...]:
    """Return the spans of the assistant turns in a conversation's text."""
    spans: list[tuple[int, int]] = []
    for n, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        span = turn_by_prefix(text, messages, n, render) or turn_by_mark(text, messages, n, render)
        if span is None:
            raise DataError(
                f"cannot find message {n} in what the chat template made of it", code="E214", fix="change the row"
            )
        spans.append(span)
    return tuple(spans)


def turn_by_prefix(text: str, messages: list[dict[str, Any]], n: int, render: Render) -> tuple[int, int] | None:
    """Return where message n stands, if the renderings before and after it are prefixes of the text."""
    try:
        before, after = render(messages[:n], True), render(messages[: n + 1], False)
    except TEMPLATE_FAULTS:  # some templates refuse a part of a conversation
        return None
    if text.startswith(after) and after.startswith(before):
        return len(before), len(after)
    return None


def turn_by_mark(text: str, messages: list[dict[str, Any]], n: int, render: Render) -> tuple[int, int] | None:
    """Return where message n stands: what a mark for its content changes, and the end the template puts behind it.

    The end is what follows the mark when message n is the last one: "<|im_end|>", never the next turn's header.
    """
    marked = {**messages[n], "content": MARK}
    before, found, behind = render([*messages[:n], marked, *messages[n + 1 :]], False).partition(MARK)
    end_marker = render([*messages[:n], marked], False).partition(MARK)[2]
    if not found or not text.startswith(before) or not text.endswith(behind):
        return None
    end = len(text) - len(behind)
    return len(before), end + (len(end_marker) if behind.startswith(end_marker) else 0)
