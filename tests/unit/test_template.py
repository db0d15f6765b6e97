"""A chat template is somebody else's program: it renders what it should and can do nothing else."""

from __future__ import annotations

import signal
import time

import pytest

from shared.data.template import MAX_OUTPUT, MAX_SECONDS, render_chat, run_template, time_limit
from shared.errors import DataError

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def run(source, **values):
    return run_template(source, messages=TALK, add_generation_prompt=False, **values)


def refusal(source):
    with pytest.raises(DataError, match="the chat template failed") as caught:
        run(source)
    return str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ lipsum.__globals__['os'] }}",
        "{{ self.__init__.__globals__ }}",
        "{{ (messages|attr('__class__')).mro() }}",
        "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
        "{{ messages[0].update({'role': 'system'}) }}",
        "{{ messages.pop() }}",
        "{% import 'os' as os %}",
        "{% include '/etc/passwd' %}",
        "{% extends 'base' %}",
        "{{ ('{0.__class__.__mro__}').format(1).x.y }}",
        "{{ open('/etc/passwd') }}",
    ],
)
def test_a_template_cannot_reach_python(source):
    assert "\nfix: " in refusal(source)
    assert TALK == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__code__ }}",
        "{{ ''.join.__self__ }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ '{a.__init__}'.format_map({'a': 1}) }}",
    ],
)
def test_what_python_keeps_inside_comes_out_as_nothing(source):
    assert run(source) == ""


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(9999) %}{% for j in range(9999) %}{% set x = i * j %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% for i in range(99) %}{{ f(n + 1) if n < 9 }}{% endfor %}{% endmacro %}{{ f(0) }}",
    ],
)
def test_an_endless_loop_is_stopped_within_two_seconds_of_work(source):
    started = time.process_time()
    assert "took longer than 1 s" in refusal(source)
    assert time.process_time() - started < 2


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timers on this system")
def test_time_in_which_the_process_rests_is_not_the_templates():
    with time_limit(0.05):
        time.sleep(0.2)


@pytest.mark.parametrize("source", ["{% for i in range(9999) %}{{ 'a' * 999 }}{% endfor %}"])
def test_the_output_is_capped(source):
    assert f"wrote more than {MAX_OUTPUT} characters" in refusal(source)


def test_ranges_are_bounded():
    assert "range of 1000000000, at most 10000" in refusal("{% for i in range(1000000000) %}{% endfor %}")


def test_endless_recursion_is_refused():
    assert "endless recursion" in refusal("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}")


@pytest.mark.parametrize("source", ["{{ 'a' * 10**13 }}", "{{ 1 / 0 }}", "{{ 1 // 0 }}", "{{ 1 % 0 }}"])
def test_arithmetic_that_fails_is_the_templates_fault(source):
    refusal(source)


@pytest.mark.parametrize(
    "source", ["{{ unclosed", "{% if %}", "{% for x in messages %}", "{% frobnicate %}", "{{ messages | nofilter }}"]
)
def test_a_template_that_does_not_parse_is_one_clear_error(source):
    refusal(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content.nothing.at.all }}",
        "{{ messages[9].role }}",
        "{{ 'a' + 1 }}",
        "{{ messages[0]() }}",
        "{{ int('x') }}",
    ],
)
def test_a_template_that_fails_at_work_is_one_clear_error(source):
    refusal(source)


def test_generation_marks_are_accepted_and_leave_no_trace():
    assert run("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}") == "hi;yo;"
    assert (
        run("{%- for m in messages -%}{%- generation -%} {{ m.content }} {%- endgeneration -%}{%- endfor -%}") == "hiyo"
    )


def test_raise_exception_is_shown_in_the_templates_own_words():
    assert "the chat template failed: only one system message, please" in refusal(
        "{{ raise_exception('only one system message, please') }}"
    )


def test_what_real_templates_use_is_there():
    assert run("{{ messages|tojson }}") == '[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]'
    assert run("{{ {'a': '<é>'}|tojson(indent=1) }}") == '{\n "a": "<é>"\n}'
    assert len(run("{{ strftime_now('%Y') }}")) == 4
    assert (
        run("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% break %}{% endfor %}")
        == "yo"
    )
    assert (
        run("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}")
        == "2"
    )
    assert run("{{ eos_token }}{{ undefined_name }}", eos_token="</s>") == "</s>"


def test_blocks_are_trimmed_as_transformers_does_it():
    assert (
        run("{% for m in messages %}\n  {% if m.role == 'user' %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}\n")
        == "hi\n"
    )


def test_spans_are_what_the_template_adds_behind_its_own_prompt():
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>\n{% endfor %}"
    source += "{% if add_generation_prompt %}<assistant>{% endif %}"
    rendered = render_chat(source, messages=TALK * 2)
    assert rendered.text == "<user>hi</>\n<assistant>yo</>\n" * 2
    assert [rendered.text[start:end] for start, end in rendered.spans] == ["yo</>\n", "yo</>\n"]


def test_a_template_that_drops_a_turn_is_refused_by_the_turns_number():
    source = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{{ loop.revindex }}{% endfor %}"
    with pytest.raises(DataError, match="cannot find message 1"):
        render_chat(source, messages=TALK)


@pytest.mark.parametrize("written", ["c.function.arguments|tojson", "'call ' + c.function.arguments"])
def test_the_prompt_of_a_tool_call_is_how_its_training_text_begins(written):
    source = "{% for m in messages %}<{{ m.role }}>{{ m.thinking }}{{ m.content }}{% for c in m.tool_calls %}{{ "
    source += written + " }}{% endfor %}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city":"Paris"}'}}
    asked = [TALK[0], {"role": "assistant", "content": "", "reasoning": "hm", "tool_calls": [call]}, TALK[0]]
    prompt = run_template(source, messages=asked, add_generation_prompt=True)
    assert "Paris" in prompt
    assert "hm" in prompt
    assert render_chat(source, messages=[*asked, TALK[1]]).text.startswith(prompt)


def test_a_conversation_of_many_turns_has_time_for_each_of_them():
    slow = "{% for j in range(30) %}{% for i in range(9000) %}{% set x = i %}{% endfor %}{% endfor %}"
    slow += "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    began = time.process_time()
    assert len(render_chat(slow, messages=TALK * 40).spans) == 40
    assert time.process_time() - began > MAX_SECONDS, "or the test shows nothing"
