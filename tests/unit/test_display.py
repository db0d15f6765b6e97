"""What a terminal shows of a run: as much as there is room for, the most important first; plain lines elsewhere."""

from __future__ import annotations

import io
import re

import pytest

from shared.watching.display import LiveDisplay, PlainDisplay, make_display, start_line

FACTS = {
    "family": "llama", "backend": "torch", "device": "CPU", "adapter": "lora", "modules": 14, "trained_parameters": 9,
    "rows": {"train": 3}, "tokens": {"train": 90, "supervised": 30, "cut_at_max_length": 0}, "updates": 1000, "from": 0,
}  # fmt: skip
PARTS = ["loss 1.2346", "valid 2.5000", "12,346 tokens/s", "512 MiB", "save at 300"]


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def row(step: int) -> dict[str, float]:
    numbers = {"loss": 1.23456, "lr": 1e-3, "tokens_per_s": 12345.6, "peak_memory_bytes": 2**29}
    return {"step": step, "updates": 1000, "next_save": 300, **numbers}


def follow(display, steps=(10, 250)) -> None:
    display.on_start(FACTS)
    display.on_evaluate({"step": 0, "eval_loss": 2.5})
    for step in steps:
        display.on_update(step)
        display.on_step(row(step))
    display.on_end({})


@pytest.mark.parametrize(("width", "shown"), [(140, 5), (110, 4), (80, 3), (60, 2), (50, 2), (40, 1), (30, 0)])
def test_the_bar_has_as_many_numbers_as_there_is_room_for(monkeypatch, width, shown):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    display = make_display(stream)
    assert isinstance(display, LiveDisplay)
    follow(display)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    last = [line for line in re.split(r"[\r\n]", text) if "250/1000" in line][-1].rstrip()
    assert len(last) <= width
    assert [part for part in PARTS if part in last] == PARTS[:shown]
    assert "left" in last


def test_plain_lines_say_how_long_the_rest_takes():
    stream = io.StringIO()
    display = make_display(stream)
    assert isinstance(display, PlainDisplay)
    follow(display, steps=(500, 1000))
    lines = [line for line in stream.getvalue().splitlines() if "tokens/s" in line]
    assert re.search(r"update 500/1000  loss 1\.2346 .* peak 512 MiB  [\d.]+ s left$", lines[0])
    assert lines[1].endswith("peak 512 MiB")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("lora", "LoRA on 14 modules"),
        ("rslora", "rsLoRA on 14 modules"),
        ("dora", "DoRA on 14 modules"),
        ("my.adapters:IA3", "my.adapters:IA3 on 14 modules"),
        ("none", "full fine-tuning"),
    ],
)
def test_the_first_line_names_what_is_trained(kind, words):
    assert f": {words}, " in start_line({**FACTS, "adapter": kind})
