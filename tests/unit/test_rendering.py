"""A chat template is held to its limits whichever thread asks for it, and gives the same text and spans there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from shared.config_file import build_config
from shared.data import rendering
from shared.data.ahead import Ahead
from shared.data.batch import update_batches
from shared.data.layout import Layout
from shared.errors import DataError
from shared.jobs.prepare import prepare
from tests.unit.chat_templates import CHATML, STYLES

TALK = [{"role": "user", "content": "hi \u2028 \u00e4"}, {"role": "assistant", "content": "hello"}]
ENDLESS = "{% for i in range(9999) %}{% for j in range(9999) %}{% set x = i * j %}{% endfor %}{% endfor %}"
DOUBLED = "{% set ns = namespace(x='aaaa') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
ONE_STEP = "{{ ('a' * 1000000 ~ 'b') in [('a' * 1000000) ~ 'c'] * 1000000 }}"  # minutes, and Python sees no signal


@pytest.fixture
def elsewhere():
    """Return what a function gives in another thread."""
    with ThreadPoolExecutor(1) as pool:
        yield lambda function, *given, **named: pool.submit(function, *given, **named).result()


@pytest.mark.parametrize("name", STYLES)
def test_another_thread_gets_the_text_and_the_spans_of_the_main_one(elsewhere, name):
    asked = {"messages": TALK, "bos_token": "<s>", "eos_token": "</s>", "tools": None}
    assert elsewhere(rendering.chat, STYLES[name].template, **asked) == rendering.chat(STYLES[name].template, **asked)
    asked["add_generation_prompt"] = True
    assert elsewhere(rendering.text, STYLES[name].template, **asked) == rendering.text(STYLES[name].template, **asked)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (ENDLESS, "took longer than 1 s"),
        (DOUBLED, "more than 256 MB of memory"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "endless recursion"),
        ("{{ raise_exception('no system') }}", "no system"),
    ],
)
def test_another_thread_has_the_limits_of_the_main_one(elsewhere, source, reason):
    if source == DOUBLED and sys.platform != "linux":
        pytest.skip("only Linux limits the memory of a process")
    with pytest.raises(DataError, match=reason):
        elsewhere(rendering.chat, source, messages=TALK)
    assert elsewhere(rendering.chat, CHATML, messages=TALK) == rendering.chat(CHATML, messages=TALK)


@pytest.mark.slow
def test_a_step_of_pythons_own_that_takes_minutes_ends_the_process_and_the_next_one_is_anew(elsewhere):
    before = os.times()
    with pytest.raises(DataError, match="it ended the process that it runs in"):
        elsewhere(rendering.chat, ONE_STEP, messages=TALK)
    assert os.times().children_user - before.children_user < 20
    assert elsewhere(rendering.chat, CHATML, messages=TALK) == rendering.chat(CHATML, messages=TALK)


def test_a_process_that_is_killed_costs_one_conversation_and_between_two_none(elsewhere):
    elsewhere(rendering.chat, CHATML, messages=TALK)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(rendering.chat, ENDLESS, messages=TALK)
        while not rendering.RENDERER.lock.locked():
            time.sleep(0.01)
        time.sleep(0.3)
        rendering.RENDERER.process.kill()
        with pytest.raises(DataError, match="it ended the process that it runs in"):
            asked.result()
    for _ in range(2):
        assert elsewhere(rendering.chat, CHATML, messages=TALK) == rendering.chat(CHATML, messages=TALK)
        rendering.RENDERER.process.kill()
        rendering.RENDERER.process.wait()


def test_a_streamed_row_that_makes_a_template_loop_ends_the_run_with_its_line(tiny_model_folder, tmp_path):
    model = shutil.copytree(tiny_model_folder(), tmp_path / "model")
    template = f"{{% if messages[0].content == '!' %}}{ENDLESS}{{% endif %}}{CHATML}"
    (model / "chat_template.jinja").write_text(template, encoding="utf-8")
    rows = [{"messages": [{**TALK[0], "content": f"{n}"}, TALK[1]]} for n in range(800)]
    hostile = 335  # no row of the sample that is made before the first update
    rows[hostile]["messages"][0]["content"] = "!"
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = {"path": str(tmp_path), "streaming": True}
    found = prepare(build_config({"model": str(model), "data": data, "train": {"batch_size": 4, "epochs": 1}}))
    ahead = Ahead(lambda step, layout: update_batches(found.train, found.plan, step, layout))
    steps = range(1, found.plan.updates_per_epoch + 1)
    due = next(step for step in steps if hostile in found.plan.rows(step))
    assert due > 1
    started = time.monotonic()
    ahead.take(due - 1, Layout(64))
    with pytest.raises(DataError, match=r"train\.jsonl:336: the chat template failed: took longer than 1 s"):
        ahead.take(due, Layout(64))
    assert time.monotonic() - started < 60  # without a limit some five minutes
    ahead.pool.shutdown()


def test_the_process_ends_with_the_one_that_started_it():
    code = """
import os, sys, threading
from shared.data import rendering
asked = {"messages": [{"role": "user", "content": "a"}], "add_generation_prompt": False}
thread = threading.Thread(target=rendering.text, args=("{{ messages[0].content }}",), kwargs=asked)
thread.start(), thread.join()
print(rendering.RENDERER.process.pid, flush=True)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), 9)
"""
    for how in ("killed", "ends"):
        command = [sys.executable, "-W", "error", "-c", code, how]
        found = subprocess.run(command, capture_output=True, text=True)
        assert found.stderr == ""
        assert_gone(int(found.stdout))


def assert_gone(process):
    """Wait until no process has this id."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail(f"process {process} is still there")
