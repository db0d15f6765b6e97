"""`mlxlora preview`: real rows token by token, and what would become of all of them; as text, HTML or JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlxlora.cli.options import ConfigFile, Data, Debug, Json, Model, Set, given
from mlxlora.cli.output import check_page, emit, emit_object, say

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from shared.config import RunConfig
    from shared.jobs.preview import Piece, Preview, Shown, Split

PLAIN, LEARNED = ("grey50", "grey58"), ("bold green", "bold dark_green")  # by turns, so that tokens can be told apart
WIDTH = 10_000  # in characters: the page wraps lines itself
PAGE = (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
    '<meta name="viewport" content="width=device-width, initial-scale=1"><title>mlxlora preview</title>'
    "<style>{stylesheet} html{{background:#fff}}body{{color:{foreground};background:{background};margin:1.5em}}"
    "pre{{font:13px/1.5 ui-monospace,Menlo,Consolas,monospace;white-space:pre-wrap;"
    "overflow-wrap:anywhere;max-width:100ch}}"
    "@media(prefers-color-scheme:dark){{html{{background:#141414}}body{{filter:invert(.92) hue-rotate(180deg)}}}}"
    "@media(max-width:600px){{body{{margin:.8em}}}}</style></head>\n"
    "<body><pre>{code}</pre></body></html>\n"
)


def preview(
    config: ConfigFile = None,
    model: Model = None,
    data: Data = None,
    rows: Annotated[int, typer.Option("--rows", min=0, help="Training rows to show.")] = 5,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write it as a page, too.")] = None,
    schedule: Annotated[bool, typer.Option("--schedule", help="Draw the learning rate of the run instead.")] = False,
    overrides: Set = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Rows as the model gets them, supervised tokens coloured, and counts; loads no model."""
    import mlxlora

    check_page(html)
    checked = mlxlora.load_config(config, overrides=overrides or [], **given(model, data))
    if schedule:
        show_schedule(checked, as_json=as_json)
        return
    found = mlxlora.preview(checked, rows=rows)
    if html is not None:
        write_page(found, html)
    if as_json:
        emit(found, html=html)
        return
    from rich.console import Console

    write(found, Console(highlight=False))
    if html is not None:
        print(f"wrote {html}")


def show_schedule(config: RunConfig, *, as_json: bool) -> None:
    """Print the learning rate of every update, as a drawing or as JSON."""
    from shared.jobs.preview import count_updates
    from shared.schedules import build_schedule, draw

    updates = count_updates(config)
    at = build_schedule(config.schedule, lr=config.optimizer.lr, updates=updates)
    if as_json:
        emit_object({"updates": updates, "lr": [at(step) for step in range(1, updates + 1)]})
        return
    print(
        f"{config.schedule.name}, warmup {config.schedule.warmup:g}, final {config.schedule.final:g}, {updates} updates"
    )
    print("\n".join(draw(at, updates=updates)))
    if config.schedule.warmup >= updates:
        say(f"schedule.warmup is {config.schedule.warmup:g} updates, the run has {updates}")


def write_page(found: Preview, file: Path) -> None:
    """Write a preview as one HTML page; raises OSError."""
    import io

    from rich.console import Console
    from rich.terminal_theme import DEFAULT_TERMINAL_THEME

    console = Console(record=True, file=io.StringIO(), width=WIDTH, highlight=False, force_terminal=True)
    write(found, console)
    console.save_html(str(file), theme=DEFAULT_TERMINAL_THEME, code_format=PAGE)


def write(found: Preview, console: Console) -> None:
    """Write a preview on a console."""
    from rich.text import Text

    legend = Text.assemble("tokens: ", ("supervised", LEARNED[0]), ", ", ("read only", PLAIN[0]), ", special ones ")
    console.print(legend.append("underlined", style="underline"), f"(train_on: {found.train_on})")
    for row in found.shown:
        console.print(row_text(row))
    for split in found.splits:
        console.print(split_text(split, found))
    for why, rows in found.dropped.items():
        console.print(f"left out: {rows:,} {why.replace('_', ' ')} rows")
    if found.padding is not None:
        at = found.padding
        console.print(
            f"an update takes {batches(at.packed_batches)} of {at.micro_tokens:,} tokens with rows packed, no padding; "
            f"with rows sorted by length {batches(at.sorted_batches)}, {at.sorted_share:.1%} padding"
        )


def batches(count: float) -> str:
    """Return a mean number of micro-batches in words.

    >>> batches(1.0), batches(2.25)
    ('1 micro-batch', '2.2 micro-batches')
    """
    return f"{count:.1f}".removesuffix(".0") + (" micro-batch" if f"{count:.1f}" == "1.0" else " micro-batches")


def row_text(row: Shown) -> Text:
    """Return a row: its place, its counts, and its tokens in colours."""
    from rich.text import Text

    cut = f", {row.cut} more are cut" if row.cut else ""
    text = Text(f"\n{row.source}: {row.tokens} tokens, {row.supervised} supervised{cut}\n", style="bold", end="\n")
    for number, piece in enumerate(row.pieces):
        style = (LEARNED if piece.supervised else PLAIN)[number % 2]
        text.append(visible(piece), style=f"not bold {style} underline" if piece.special else f"not bold {style}")
    return text


def visible(piece: Piece) -> str:
    """Return a piece's text such that newlines are seen and nothing in it reaches the terminal as a command.

    >>> from shared.jobs.preview import Piece
    >>> visible(Piece("a\\n\\x1b[2J", (1,), True, False))
    'a⏎\\n\\\\x1b[2J'
    """
    return "".join(
        "⏎\n" if c == "\n" else c if c.isprintable() else c.encode("unicode_escape").decode() for c in piece.text
    )


def split_text(split: Split, found: Preview) -> Text:
    """Return a split's counts and its histogram."""
    from rich.text import Text

    kinds = ", ".join(f"{count:,} {kind}" for kind, count in split.kinds.items())
    share = split.supervised / max(split.tokens, 1)
    text = Text(f"\n{split.name}: {split.rows:,} rows ({kinds})\n", style="bold", end="\n")
    lines = [f"{split.tokens:,} tokens, {split.supervised:,} supervised ({share:.1%}), longest row {split.longest:,}"]
    if split.name == "train":
        lines.append(f"{found.updates_per_epoch:,} updates are one epoch")
        lines += (
            [f"{rows:,} rows from {path}" for path, rows in found.sources.items()] if len(found.sources) > 1 else []
        )
    if split.cut_rows:
        lines.append(f"{split.cut_rows:,} rows lose {split.cut_tokens:,} tokens to data.max_length {found.max_length}")
    if split.duplicates:
        lines.append(f"{split.duplicates:,} rows repeat an earlier one")
    if split.leaks:
        lines.append(f"{split.leaks:,} rows also stand in the training rows")
    for line in lines:
        text.append(f"  {line}\n", style="not bold")
    for notice in split.notices:
        text.append(f"  {notice}\n", style="not bold yellow")
    for problem in split.problems:
        text.append(f"  refused: {problem}\n", style="not bold red")
    if split.num_problems:
        refused = f"{split.num_problems:,} of {split.rows:,} rows are refused, at which training stops"
        text.append(f"  {refused}\n", style="not bold red")
    most = max((bar.rows for bar in split.lengths), default=1)
    for bar in split.lengths:
        length = f"  {f'{bar.low:,}-{bar.high:,}':>15} {bar.rows:>9,} "
        text.append(f"{length}{'█' * round(40 * bar.rows / most) or '▏' * bool(bar.rows)}\n", style="not bold")
    text.right_crop(1)
    return text
