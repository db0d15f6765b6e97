"""A model's own chat template, run in a sandbox, and the places in its text that the assistant says.

A template is somebody else's program: it cannot reach Python objects (ImmutableSandboxedEnvironment), may
write at most 1 MB, loop over at most 10,000 numbers at once, and take 1 second each time it runs, and 256 MB.
"""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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

    Only the main thread of a POSIX process can be limited: others ask rendering.py.
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


def renew_time() -> None:
    """Give the render that begins a time of its own, where time is limited: a long conversation takes many."""
    main = threading.current_thread() is threading.main_thread()
    if main and hasattr(signal, "getitimer") and signal.getitimer(signal.ITIMER_VIRTUAL)[0]:
        signal.setitimer(signal.ITIMER_VIRTUAL, MAX_SECONDS)


@contextmanager
def memory_limit(num_bytes: int) -> Iterator[None]:
    """Raise MemoryError in the block where the process grows by more; only Linux can tell and limit its size.

    The limit is the whole process's, so another thread, beside which a model may be training, asks rendering.py.
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
        full = f"more than {MAX_BYTES // 2**20} MB of memory" if isinstance(error, MemoryError) else ""
        raise DataError(
            f"the chat template failed: {str(error) or full or type(error).__name__}",
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
        return write_chat(source, messages, add_generation_prompt=add_generation_prompt, **values)[0]


def write_chat(
    source: str, messages: list[dict[str, Any]], *, add_generation_prompt: bool, **values: Any
) -> tuple[str, list[dict[str, Any]]]:
    """Return a conversation's text, and its messages in the form that the template takes; without limits."""
    values["add_generation_prompt"] = add_generation_prompt
    forms = list(forms_of(messages))
    for form in forms[:-1]:
        with suppress(*TEMPLATE_FAULTS):
            return write_text(source, messages=form, **values), form
    return write_text(source, messages=forms[-1], **values), forms[-1]


def write_text(source: str, **values: Any) -> str:
    """Return what a template writes, without limits of time and memory."""
    renew_time()
    parts: list[str] = []
    size = 0
    for part in compile_template(source).generate(**values):
        parts.append(part)
        size += len(part)
        if size > MAX_OUTPUT:
            raise jinja2.TemplateError(f"wrote more than {MAX_OUTPUT} characters")
    return "".join(parts)


MARK = "\ue000"  # a private-use character, which no conversation or template holds
AGREEING = 4  # characters before a turn that have to be those the model is asked with: "ST]" and more
REASONING = ("reasoning_content", "reasoning", "thinking")  # one thing, under the names that templates ask for
Render = Callable[[list[dict[str, Any]], bool], str]


def render_chat(source: str, *, messages: list[dict[str, Any]], **values: Any) -> Rendered:
    """Return a conversation's text and the spans of its assistant turns.

    A turn is what the template adds between "assistant, speak" (the generation prompt) and the end of that
    message. Where earlier turns come out differently in the full text, marks in their place tell where they are.
    """

    def render(chosen: list[dict[str, Any]], prompt: bool) -> str:
        return write_text(source, messages=chosen, add_generation_prompt=prompt, **values)

    with limits():
        text, chosen = write_chat(source, messages, add_generation_prompt=False, **values)
        return Rendered(text, find_turns(text, chosen, render))


def forms_of(messages: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Yield a conversation in the forms that templates take: arguments as objects or texts, content null or "".

    DeepSeek's template joins arguments to its own text; ChatML's does so with content, which is null beside calls.
    """
    seen: list[list[dict[str, Any]]] = []
    blank = [{**message, "content": message.get("content") or ""} for message in messages]
    for said in (messages, blank):
        for form in (from_json, to_text):
            found = [with_aliases(message, form) for message in said]
            if found not in seen:
                seen.append(found)
                yield found


def with_aliases(message: dict[str, Any], form: Callable[[Any], Any]) -> dict[str, Any]:
    """Return a message with its reasoning under every name of it, and the arguments of its calls in a form."""
    said = next((message[key] for key in REASONING if message.get(key)), None)
    if said is not None:
        message = {**message, **dict.fromkeys(REASONING, said)}
    calls = message.get("tool_calls")
    if not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        return message
    return {**message, "tool_calls": [change_call(call, arguments=form) for call in calls]}


def change_call(call: dict[str, Any], **change: Callable[[Any], Any]) -> dict[str, Any]:
    """Return a tool call with fields of its function changed."""
    inner = call.get("function")
    if isinstance(inner, dict):
        return {**call, "function": change_call(inner, **change)}
    return {**call, **{key: made(call[key]) for key, made in change.items() if key in call}}


def from_json(arguments: Any) -> Any:
    """Return arguments as the object that templates write as JSON; as JSON text, as OpenAI has them, it is quoted."""
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):
            found = json.loads(arguments)
            return found if isinstance(found, dict) else arguments
    return arguments


def to_text(arguments: Any) -> Any:
    """Return arguments as JSON text."""
    return arguments if isinstance(arguments, str) else to_json(arguments)


def find_turns(text: str, messages: list[dict[str, Any]], render: Render) -> tuple[tuple[int, int], ...]:
    """Return the spans of the assistant turns in a conversation's text."""
    spans: list[tuple[int, int]] = []
    for n, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        behind = spans[-1][1] if spans else 0
        span = turn_by_prefix(text, messages, n, render) or turn_by_mark(text, messages, n, render, behind=behind)
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


def turn_by_mark(
    text: str, messages: list[dict[str, Any]], n: int, render: Render, *, behind: int
) -> tuple[int, int] | None:
    """Return where message n stands: all that marks in its place change, from its header to its end.

    behind: the turn is not before this place. None where no mark comes through.
    """
    start, end, last = len(text), -1, {}
    for marked in marks(messages[n]):
        with suppress(*TEMPLATE_FAULTS):
            other = render([*messages[:n], marked, *messages[n + 1 :]], False)
            if MARK in other:
                start = min(start, common_start(text, other))
                edge = len(text) - common_start(text[::-1], other[::-1])
                end, last = max((end, last), (edge, marked), key=lambda found: found[0])
    if end < 0 or start < behind:
        return None
    start = min(start, end)
    if answer_begins(text, messages, n, render) < end:  # Gemma 4 writes what a tool said before the turn's words
        return None
    header = find_header(text[behind:start], messages[:n], render)
    return behind + header if header else start, end + length_of_end(text[end:], messages[: n + 1], last, render)


def answer_begins(text: str, messages: list[dict[str, Any]], n: int, render: Render) -> int:
    """Return where the text of the message behind message n begins; the text's end where there is none."""
    if n + 1 == len(messages):
        return len(text)
    with suppress(*TEMPLATE_FAULTS):
        other = render([*messages[: n + 1], {**messages[n + 1], "content": MARK}, *messages[n + 2 :]], False)
        return common_start(text, other) if MARK in other else len(text)
    return len(text)


def marks(message: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a message with a mark in place of its words, its reasoning, and names and arguments of its calls."""
    yield {**message, "content": MARK}
    if any(message.get(key) for key in REASONING):
        yield {**message, **dict.fromkeys(REASONING, MARK)}
    if message.get("tool_calls"):
        for change in ({"name": lambda _: MARK}, {"arguments": lambda _: {MARK: MARK}}, {"arguments": lambda _: MARK}):
            yield {**message, "tool_calls": [change_call(call, **change) for call in message["tool_calls"]]}


def find_header(text: str, before: list[dict[str, Any]], render: Render) -> int:
    """Return where "assistant, speak" ends in the text in front of a turn's words, as far as it agrees; 0: nowhere."""
    try:
        bare, asked = render(before, False), render(before, True)
    except TEMPLATE_FAULTS:
        return 0
    asked = asked[common_start(bare, asked) :]
    if not asked:  # nothing asks: the turn begins behind what was said before it, with the blanks in front of its words
        behind, blanks = len(text.rstrip()), bare[len(bare.rstrip()) :]
        known = common_start(text[:behind][::-1], bare.rstrip()[::-1]) >= AGREEING
        return behind + common_start(text[behind:], blanks) if known else 0
    least = len(asked.partition("\n")[0]) + 1  # its first line at least: behind it stands what may be thought
    for length in range(len(asked), min(least, len(asked)) - 1, -1):
        if asked and (at := text.rfind(asked[:length])) >= 0:
            return at + length
    return 0


def length_of_end(text: str, upto: list[dict[str, Any]], marked: dict[str, Any], render: Render) -> int:
    """Return how much of a text that begins behind a turn's words is its end, "<|im_end|>", not the next turn's header.

    The end is what stands there as well when the turn is the last one.
    """
    try:
        whole, other = render(upto, False), render([*upto[:-1], marked], False)
    except TEMPLATE_FAULTS:
        return 0
    closing = whole[len(whole) - common_start(whole[::-1], other[::-1]) :]
    end = closing[: common_start(closing, text)]
    if end != closing:  # of "<|end|>\n<|endoftext|>" and "<|end|>\n<|user|>" no more than whole tokens is the end
        end = re.sub(r"[<\[][^<>\[\]]*$", "", end)
    return len(end)


def common_start(one: str, other: str) -> int:
    """Return how many characters both begin with."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # halves of what is left: texts are long, and a loop over characters slow
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low
