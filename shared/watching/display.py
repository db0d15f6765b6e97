"""What a user sees of a run: a live bar on a terminal, plain lines elsewhere; both on stderr."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TextIO, cast

from shared.callbacks import Callback
from shared.machine import process_age
from shared.watching.words import duration

Row = Mapping[str, Any]
WIDE, NARROW = 110, 60  # columns from which a bar is long, and below which there is none
BAR = {WIDE: 24, NARROW: 10}  # its length from so many columns on

TITLES = {"lora": "LoRA", "rslora": "rsLoRA", "dora": "DoRA"}  # a user's own adapter goes by its own name


def make_display(stream: TextIO | None = None) -> Callback:
    """Return the live display where the stream is a terminal, else plain lines."""
    target = cast(TextIO, Sturdy(stream or sys.stderr))
    return LiveDisplay(target) if target.isatty() else PlainDisplay(target)


class Sturdy:
    """A stream whose reader may go away, a closed terminal or `head`: the run does not stop for that."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        """Write what can be written."""
        with suppress(OSError, ValueError):
            self.stream.write(text)

    def flush(self) -> None:
        """Flush what can be flushed."""
        with suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        """Return what else the stream has: isatty, fileno, encoding."""
        return getattr(self.stream, name)


def start_line(facts: Row) -> str:
    """Return one line on what is about to run."""
    kind = facts["adapter"]
    what = "full fine-tuning" if kind == "none" else f"{TITLES.get(kind, kind)} on {facts['modules']} modules"
    return (
        f"{facts['family']} on {facts['backend']} ({facts['device']}): {what}, "
        f"{facts['trained_parameters']:,} trained parameters; {facts['rows']['train']} rows, {of_tokens(facts)}; "
        f"{facts['updates']} updates"
    )


def of_tokens(facts: Row) -> str:
    """Return what is known of the rows' tokens before the first update."""
    if facts.get("streamed"):
        return "streamed from their files"
    tokens = facts["tokens"]
    cut = f", {tokens['cut_at_max_length']} rows cut at max_length" if tokens["cut_at_max_length"] else ""
    return f"{tokens['train']:,} tokens, {tokens['supervised'] / tokens['train']:.0%} supervised{cut}"


def first_update(step: int) -> str:
    """Return one line on how long the command took to get to its first update."""
    return f"update {step} done {process_age():.1f} s after the command"


def evaluation_words(row: Row) -> str:
    """Return the metrics of an evaluation.

    >>> evaluation_words({"step": 5, "eval_loss": 2.5, "eval_exact_match": 0.25, "eval_sql_loss": 2.0})
    'validation loss 2.5000  exact match 25.0 %  sql loss 2.0000'
    """
    words: list[str] = []
    for key, value in row.items():
        name = key.removeprefix("eval_")
        if name != key:
            number = f"{value:.4f}" if name.endswith("loss") else f"{value:.1%}".replace("%", " %")
            words.append(f"{'validation ' if name == 'loss' else ''}{name.replace('_', ' ')} {number}")
    return "  ".join(words)


def megabytes(count: int) -> str:
    """Return bytes for people.

    >>> megabytes(3_221_225_472), megabytes(52_428_800)
    ('3.0 GiB', '50 MiB')
    """
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


@dataclass
class Pace:
    """How long the rest of a run takes, by how long it took so far, evaluations and checkpoints included."""

    step: int
    began: float = field(default_factory=time.perf_counter)

    def left(self, step: int, *, updates: int, still_s: float = 0.0) -> str:
        """Return in words how long the updates after `step` take, empty where there are none; still_s: stood still."""
        done, took = step - self.step, time.perf_counter() - self.began - still_s
        return f"  {duration(took / done * (updates - step))} left" if done > 0 and step < updates else ""


def numbers_of(row: Row, *, eval_loss: float | None) -> list[str]:
    """Return what to show of a logged update, the most important first."""
    save = row.get("next_save")
    return [
        f"loss {row.get('loss', math.nan):.4f}",
        *([f"valid {eval_loss:.4f}"] if eval_loss is not None else []),
        f"{row['tokens_per_s']:,.0f} tokens/s",
        megabytes(row["peak_memory_bytes"]),
        *([f"save at {save:,}"] if save is not None else []),
    ]


def fitting(parts: Sequence[str], *, room: int) -> str:
    """Return the first parts that fit into so many columns.

    >>> fitting(["loss 1.0000", "9 tokens/s", "1 MiB"], room=24)
    'loss 1.0000  9 tokens/s'
    """
    text = ""
    for part in parts:
        longer = f"{text}  {part}" if text else part
        if len(longer) > room:
            break
        text = longer
    return text


class PlainDisplay:
    """One line per event."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.started = False
        self.pace = Pace(0)

    def say(self, text: str) -> None:
        """Write a line; a reader that has gone, or a full disk, does not stop the run."""
        with suppress(OSError, ValueError):
            print(text, file=self.stream, flush=True)

    def on_start(self, facts: Row) -> None:
        """Say what runs, and from where."""
        self.say(start_line(facts))
        if facts["from"]:
            self.say(f"going on after update {facts['from']}")
        self.pace = Pace(facts["from"])

    def on_update(self, step: int) -> None:
        """Say how long the first one took to come; a line per logged update is enough for the others."""
        if not self.started:
            self.say(first_update(step))
        self.started = True

    def on_step(self, row: Row) -> None:
        """Say where training stands."""
        self.say(
            f"update {row['step']}/{row['updates']}  loss {row.get('loss', math.nan):.4f}  lr {row['lr']:.2e}  "
            f"{row['tokens_per_s']:,.0f} tokens/s  peak {megabytes(row['peak_memory_bytes'])}"
            f"{self.pace.left(row['step'], updates=row['updates'], still_s=row.get('still_s', 0.0))}"
        )

    def on_evaluate(self, row: Row) -> None:
        """Say what an evaluation found."""
        self.say(f"update {row['step']}  {evaluation_words(row)}")

    def on_note(self, text: str) -> None:
        """Say something a user should know."""
        self.say(f"note: {text}")

    def on_end(self, facts: Row) -> None:
        """Say that the run is over."""
        self.say("done")


class LiveDisplay:
    """A bar with time left, loss, tokens/s, memory and the next checkpoint, as far as there is room."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = Console(file=stream, highlight=False)
        self.length = next((length for width, length in BAR.items() if self.console.width >= width), 0)
        front = [BarColumn(bar_width=self.length)] if self.length else []
        self.bar = Progress(
            *front, MofNCompleteColumn(), TimeRemainingColumn(compact=True), TextColumn("left"),
            TextColumn("{task.fields[numbers]}", markup=False), console=self.console, refresh_per_second=4,
        )  # fmt: skip
        self.task: Any = None
        self.started = False
        self.eval_loss: float | None = None

    def on_start(self, facts: Row) -> None:
        """Say what runs and show the bar."""
        self.console.print(start_line(facts), style="dim")
        if facts["from"]:
            self.console.print(f"going on after update {facts['from']}")
        if self.task is not None:  # started again, with smaller micro-batches
            self.bar.remove_task(self.task)
        self.task = self.bar.add_task("training", total=facts["updates"], completed=facts["from"], numbers="")
        self.bar.start()

    def on_update(self, step: int) -> None:
        """Move the bar; above it, how long the first update took to come."""
        if not self.started:
            self.console.print(first_update(step), style="dim")
        self.started = True
        self.bar.update(self.task, completed=step)

    def on_step(self, row: Row) -> None:
        """Show the numbers of a logged update."""
        taken = self.length + 2 * len(str(row["updates"])) + len(" / 0:00:00 left ")
        parts = numbers_of(row, eval_loss=self.eval_loss)
        numbers = fitting(parts, room=self.console.width - taken)
        self.bar.update(self.task, completed=row["step"], numbers=numbers)

    def on_evaluate(self, row: Row) -> None:
        """Print what an evaluation found above the bar."""
        self.eval_loss = row.get("eval_loss", self.eval_loss)
        self.console.print(f"update {row['step']:>6}  {evaluation_words(row)}")

    def on_note(self, text: str) -> None:
        """Print a note above the bar."""
        self.console.print(f"note: {text}", style="yellow", markup=False)

    def on_end(self, facts: Row) -> None:
        """Stop the bar; the command says where the result is."""
        self.close()

    def close(self) -> None:
        """Leave the terminal in order, also after an error."""
        self.bar.stop()
