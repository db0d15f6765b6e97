"""report.html: one self-contained page of a run folder, from its own files; no script, no request to anywhere."""

from __future__ import annotations

import html
import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from shared.callbacks import Metrics
from shared.display import megabytes
from shared.errors import StorageError
from shared.runs import write_atomic

Point = tuple[float, float]
Rows = Sequence[Mapping[str, Any]]
Flat = Mapping[str, Any]  # the manifest, one level deep: "rows.train" -> value

LIMIT = 1000  # points per curve; 100k of them would make a page of 10 MB
LARGEST = 3.5e38  # beyond float32: as good as infinite
WIDTH, HEIGHT = 460, 240
LEFT, RIGHT, TOP, BOTTOM = 58, 436, 26, 196  # the plot's box inside the picture
ARROW, DOT = " \u2192 ", " \u00b7 "
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
DATA = {
    "rows.train": "training rows",
    "rows.valid": "validation rows",
    "rows.kind": "kind of rows",
    "tokens.train": "tokens in the training rows",
    "tokens.supervised": "of these supervised",
    "tokens.cut_at_max_length": "rows that fill max_length, cut if longer",
}
MODEL = {
    "family": "family",
    "quantization": "quantization of the base",
    "adapter": "adapter",
    "modules": "modules",
    "trained_parameters": "trained parameters",
}

CSS = """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--text:#1a1d21;--muted:#59626e;--line:#dde1e6;--a:#1d5fd1;--b:#b4540a}
@media(prefers-color-scheme:dark){
:root{--bg:#121518;--card:#1b1f24;--text:#e7e9ec;--muted:#a0a9b4;--line:#343b43;--a:#74aaff;--b:#ffb057}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--text);overflow-wrap:anywhere;font:15px/1.5 system-ui,"Segoe UI",Roboto,sans-serif}
main{max-width:1000px;margin:0 auto;padding:24px 16px 40px}p{margin:6px 0}
h1{font-size:26px;line-height:1.25;margin:0}h2{font-size:18px;margin:32px 0 12px}h3{font-size:15px;margin:0 0 4px}
small,.label,footer{font-size:13px}.muted,.label,small,footer{color:var(--muted)}footer{margin-top:32px}
.figures,.grid,.three,.stack{display:grid;gap:12px;align-items:start}.figures{margin-top:20px;align-items:stretch}
.figures{grid-template-columns:repeat(auto-fit,minmax(min(200px,100%),1fr))}
.grid{grid-template-columns:repeat(auto-fit,minmax(min(380px,100%),1fr))}
.three{grid-template-columns:repeat(auto-fit,minmax(min(240px,100%),1fr));margin-top:10px}.stack>*,.three>*{min-width:0}
.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px 14px;margin:0;min-width:0}
.figures b{display:block;font-size:21px;line-height:1.3}.figures small{display:block}
table{width:100%;border-collapse:collapse;font-size:14px}tr:first-child>*{border-top:0}
th,td{text-align:left;vertical-align:top;padding:4px 0;border-top:1px solid var(--line)}
th{font-weight:400;color:var(--muted);padding-right:14px;width:42%}
pre{margin:0;white-space:pre-wrap;max-height:90em;overflow:auto;font:13px/1.5 ui-monospace,Menlo,Consolas,monospace}
.sample pre{max-height:18em}svg{display:block;width:100%;height:auto;overflow:visible}
svg text{fill:var(--muted);font:12px system-ui,"Segoe UI",Roboto,sans-serif}
.rule{stroke:var(--line)}.axis{stroke:var(--muted);fill:none}.curve{fill:none;stroke-width:1.6;stroke-linejoin:round}
.a{stroke:var(--a)}.b{stroke:var(--b);stroke-dasharray:5 3}.dot-a{fill:var(--a)}.dot-b{fill:var(--b)}
.key{margin-right:14px;font-size:13px}.key svg{display:inline-block;width:22px;height:8px;margin-right:6px}
"""  # noqa: E501


@dataclass(frozen=True)
class Sample:
    """One prompt: what was wanted (empty: not known), and what the model said before and after training."""

    prompt: str
    wanted: str
    before: str
    after: str


@dataclass(frozen=True)
class Curve:
    """One line of a chart; style: "a", or "b" (dashed, with a dot at each point)."""

    name: str
    points: tuple[Point, ...]
    style: str = "a"
    num_left_out: int = 0


def write_report(folder: Path, *, samples: Sequence[Sample]) -> Path:
    """Write report.html from the run folder's config, manifest and metrics; raises StorageError."""
    rows = sorted(Metrics(folder / "metrics.jsonl").read(), key=lambda row: row["step"])
    manifest = read_manifest(folder / "manifest.json")
    name = folder.resolve().name
    body = [
        heading(name, manifest),
        key_figures(rows, manifest),
        curves_and_data(rows, manifest),
        samples_section(samples),
        setup(folder, manifest),
        reproduce(folder, manifest),
        "<footer>Made by mlxlora from config.yaml, manifest.json and metrics.jsonl of this run.</footer>",
    ]
    target = folder / "report.html"
    try:
        write_atomic(target, page(name, body="\n".join(filter(None, body))))
    except OSError as error:
        raise StorageError(f"cannot write {target}: {error.strerror}", fix="free some space") from None
    return target


def page(title: str, *, body: str) -> str:
    """Return the document; its policy refuses every request, whatever the texts hold."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}: mlxlora run</title><style>{CSS}</style></head>\n"
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


def read_text(path: Path) -> str:
    """Return the text of a file, empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest one level deep, empty where it is missing or damaged."""
    flat: dict[str, Any] = {}
    try:
        found = json.loads(read_text(path))
    except ValueError:
        return flat
    for key, value in found.items() if isinstance(found, dict) else ():
        flat.update(
            {f"{key}.{name}": inner for name, inner in value.items()} if isinstance(value, dict) else {key: value}
        )
    return flat


def escape(value: object) -> str:
    """Return a value as HTML text; what neither HTML nor UTF-8 can hold becomes a mark."""
    text = CONTROL.sub("\ufffd", str(value)).encode("utf-8", "replace").decode("utf-8")
    return html.escape(text, quote=True)


def number(value: object) -> float | None:
    """Return a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < LARGEST else None  # false for nan, too


def shown(value: object) -> str:
    """Return a value of the manifest for people."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def short(value: float) -> str:
    """Return a number with four significant digits."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Return a time for people: 26.0 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def points(rows: Rows, key: str, *, scale: float = 1.0) -> tuple[Point, ...]:
    """Return (step, value / scale) of every row with a finite value."""
    pairs = ((row["step"], number(row.get(key))) for row in rows)
    return tuple((float(step), value / scale) for step, value in pairs if value is not None)


def curve(rows: Rows, key: str, name: str, *, style: str = "a", scale: float = 1.0) -> Curve:
    """Return one line of a chart, thinned."""
    found = points(rows, key, scale=scale)
    return Curve(name, thin(found), style, sum(key in row for row in rows) - len(found))


def thin(found: Sequence[Point], *, limit: int = LIMIT) -> tuple[Point, ...]:
    """Return at most `limit` points: the ends, and the lowest and highest of equal buckets between them."""
    if len(found) <= limit:
        return tuple(found)
    inner, num_buckets = found[1:-1], (limit - 2) // 2
    edges = [len(inner) * n // num_buckets for n in range(num_buckets + 1)]
    kept = [found[0]]
    for begin, end in pairwise(edges):
        bucket = inner[begin:end]
        extremes = {min(bucket, key=lambda point: point[1]), max(bucket, key=lambda point: point[1])}
        kept += sorted(extremes)
    return (*kept, found[-1])


def ticks(low: float, high: float, *, num: int = 5, smallest: float = 0.0) -> list[float]:
    """Return about `num` round values from at most `low` to at least `high`.

    >>> ticks(4.66, 7.21), ticks(0, 60)
    ([4.5, 5.0, 5.5, 6.0, 6.5, 7.0, 7.5], [0.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0])
    """
    if high - low <= 1e-4 * max(abs(low), abs(high)):  # flat: the noise of one value is no scale
        pad = 0.1 * max(abs(low), abs(high)) or 1.0
        low, high = low - pad if low else 0.0, high + pad
    rough = (high - low) / num
    decade = 10.0 ** math.floor(math.log10(rough))
    step = max(next(m for m in (1, 2, 5, 10) if m * decade >= rough * 0.75) * decade, smallest)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, last + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """Return the values with as many digits as their distance needs: 4.50, 2,000, 2e-4."""
    step, largest = values[1] - values[0], max(abs(value) for value in values)
    place = math.floor(math.log10(step) + 1e-9)
    if 0.01 <= largest < 1e6:
        return [f"{value:,.{max(0, -place)}f}" if round(value / step) else "0" for value in values]
    return [f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e") if round(value / step) else "0" for value in values]


def chart(title: str, unit: str, curves: Sequence[Curve], *, last_step: int, from_zero: bool = True) -> str:
    """Return a figure with its legend, empty where there is nothing to draw."""
    left_out = sum(line.num_left_out for line in curves)
    notes = [f"<small>{left_out:,} values that are not finite are left out</small>"] if left_out else []
    curves = [line for line in curves if line.points]
    if not curves:
        return ""
    if len(curves) > 1:
        swatch = '<svg viewBox="0 0 22 8"><path class="curve {0}" d="M0 4H22"/></svg>'
        notes = [f'<span class="key">{swatch.format(line.style)}{line.name}</span>' for line in curves] + notes
    picture = svg(title, unit, curves, last_step=last_step, from_zero=from_zero)
    return f'<figure class="card"><h3>{title}</h3>{picture}<figcaption>{"".join(notes)}</figcaption></figure>'


def svg(title: str, unit: str, curves: Sequence[Curve], *, last_step: int, from_zero: bool) -> str:
    """Return the picture of a chart; x is the update, from 0 to the last one."""
    ys = [y for line in curves for _, y in line.points]
    y_ticks = ticks(min(0.0, *ys) if from_zero else min(ys), max(ys))
    bottom, top, end = y_ticks[0], y_ticks[-1], max(last_step, 1)

    def at(x: float, y: float) -> tuple[float, float]:
        return LEFT + (RIGHT - LEFT) * x / end, BOTTOM - (BOTTOM - TOP) * (y - bottom) / (top - bottom)

    parts = [f'<text x="0" y="12">{escape(unit)}</text>']
    for value, label in zip(y_ticks, tick_labels(y_ticks), strict=True):
        y = at(0, value)[1]
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    x_ticks = [value for value in ticks(0, end, smallest=1.0) if value <= end]
    for value, label in zip(x_ticks, tick_labels(x_ticks), strict=True):
        x = at(value, bottom)[0]
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{BOTTOM}" y2="{BOTTOM + 4}"/>')
        parts.append(f'<text x="{x:.1f}" y="{BOTTOM + 18}" text-anchor="middle">{label}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}"/>')
    parts.append(f'<text x="{(LEFT + RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">update</text>')
    for line in curves:
        places = [at(x, y) for x, y in line.points]
        parts.append(f'<path class="curve {line.style}" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in places)}"/>')
        parts += dots(line, places)
    summary = "; ".join(f"{line.name} {short(line.points[0][1])} to {short(line.points[-1][1])}" for line in curves)
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{title}, {unit}: {summary}")}">'
    return "".join([head, *parts, "</svg>"])


def dots(line: Curve, places: Sequence[Point]) -> list[str]:
    """Return a dot with its numbers at each point, where there are few or no line would show."""
    if len(places) > 1 and (line.style == "a" or len(places) > 60):
        return []
    texts = [f"update {x:,.0f}: {short(y)}" for x, y in line.points]
    return [
        f'<circle class="dot-{line.style}" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{text}</title></circle>'
        for (x, y), text in zip(places, texts, strict=True)
    ]


def curves_and_data(rows: Rows, manifest: Flat) -> str:
    """Return the charts and the facts on the data."""
    steps = max((row["step"] for row in rows), default=0)
    memory = max((y for _, y in points(rows, "peak_memory_bytes")), default=0.0)
    unit, scale = ("GiB", 2.0**30) if memory >= 2**30 else ("MiB", 2.0**20)
    losses = [curve(rows, "loss", "training"), curve(rows, "eval_loss", "validation", style="b")]
    tiles = [
        chart("Loss", "nats per supervised token", losses, last_step=steps, from_zero=False),
        chart("Learning rate", "per update", [curve(rows, "lr", "learning rate")], last_step=steps),
        chart("Gradient norm", "L2, before clipping", [curve(rows, "grad_norm", "gradient norm")], last_step=steps),
        chart("Speed", "tokens per second", [curve(rows, "tokens_per_s", "speed")], last_step=steps),
        chart("Peak memory", unit, [curve(rows, "peak_memory_bytes", "memory", scale=scale)], last_step=steps),
        card("Data", data_facts(rows, manifest)),
    ]
    empty = "" if rows else '<p class="muted">metrics.jsonl has no rows, so there are no curves.</p>'
    return f'<h2>Curves and data</h2>{empty}<div class="grid">{"".join(tiles)}</div>'


def data_facts(rows: Rows, manifest: Flat) -> dict[str, str]:
    """Return what is known of the rows and the tokens."""
    facts = labelled(manifest, DATA)
    train, supervised = number(manifest.get("tokens.train")), number(manifest.get("tokens.supervised"))
    if train and supervised is not None:
        facts[DATA["tokens.supervised"]] = f"{supervised:,.0f} ({supervised / train:.1%})"
    trained_on = sum(y for _, y in points(rows, "tokens"))
    return {**facts, "tokens trained on, without padding": f"{trained_on:,.0f}"} if trained_on else facts


def labelled(manifest: Flat, labels: Mapping[str, str]) -> dict[str, str]:
    """Return the known values under their labels."""
    return {label: shown(manifest[key]) for key, label in labels.items() if manifest.get(key) is not None}


def section(manifest: Flat, *names: str) -> dict[str, str]:
    """Return all values of sections of the manifest, as they are."""
    return {key.partition(".")[2]: str(value) for key, value in manifest.items() if key.partition(".")[0] in names}


def card(title: str, facts: Mapping[str, str]) -> str:
    """Return a table under a title, empty where no fact is known."""
    lines = [f"<tr><th>{escape(label)}</th><td>{escape(value)}</td></tr>" for label, value in facts.items()]
    return f'<section class="card"><h3>{title}</h3><table>{"".join(lines)}</table></section>' if lines else ""


def heading(name: str, manifest: Flat) -> str:
    """Return the title and one line on what ran where."""
    facts = [manifest.get(key) for key in ("model", "backend", "device", "created")]
    return f'<h1>{escape(name)}</h1><p class="muted">{escape(DOT.join(str(fact) for fact in facts if fact))}</p>'


def key_figures(rows: Rows, manifest: Flat) -> str:
    """Return the numbers to look at first; what was not measured is left out."""
    losses, evals, times = points(rows, "loss"), points(rows, "eval_loss"), points(rows, "time_s")
    memory, tokens = points(rows, "peak_memory_bytes"), sum(y for _, y in points(rows, "tokens"))
    time_s = times[-1][1] if times else 0.0
    done = max((row["step"] for row in rows), default=0)
    planned, per_epoch = number(manifest.get("updates")), number(manifest.get("updates_per_epoch"))
    updates = f"{done:,} of {planned:,.0f}" if planned else f"{done:,}"
    figures = [
        ("Training loss", *first_to_last(losses)),
        ("Validation loss", *first_to_last(evals)),
        ("Speed", f"{short(tokens / time_s)} tokens/s" if tokens and time_s else None, "mean over the training time"),
        ("Peak memory", megabytes(round(max(y for _, y in memory))) if memory else None, ""),
        ("Training time", duration(time_s) if times else None, "without evaluation"),
        ("Updates", updates, f"{done / per_epoch:.2f} epochs" if per_epoch else ""),
    ]
    cards = [
        f'<div class="card"><span class="label">{label}</span><b>{value}</b><small>{below}</small></div>'
        for label, value, below in figures
        if value is not None
    ]
    return f'<div class="figures">{"".join(cards)}</div>'


def first_to_last(found: Sequence[Point]) -> tuple[str | None, str]:
    """Return the first and the last value, and the updates they are of."""
    if not found:
        return None, ""
    (x0, y0), (x1, y1) = found[0], found[-1]
    if x0 == x1:
        return short(y0), f"update {x0:,.0f}"
    return f"{short(y0)}{ARROW}{short(y1)}", f"update {x0:,.0f}{ARROW}{x1:,.0f}"


def samples_section(samples: Sequence[Sample]) -> str:
    """Return the samples before and after, empty where there are none."""
    cards = []
    for sample in samples:
        wanted = [("wanted", sample.wanted)] if sample.wanted else []
        boxes = [block(label, text) for label, text in [*wanted, ("before", sample.before), ("after", sample.after)]]
        prompt = block("prompt", sample.prompt)
        cards.append(f'<section class="card sample">{prompt}<div class="three">{"".join(boxes)}</div></section>')
    return f'<h2>Samples before and after</h2><div class="stack">{"".join(cards)}</div>' if cards else ""


def block(label: str, text: str) -> str:
    """Return a text as it is under its label, an empty one by name."""
    inner = f'<pre dir="auto">{escape(text)}</pre>' if text else '<p class="muted">(empty)</p>'
    return f'<div><div class="label">{label}</div>{inner}</div>'


def setup(folder: Path, manifest: Flat) -> str:
    """Return the resolved config next to versions, hardware and hashes."""
    config = escape(read_text(folder / "config.yaml"))
    cards = [
        card("Model", labelled(manifest, MODEL)),
        card("Machine", {**labelled(manifest, {"device": "device"}), **section(manifest, "hardware")}),
        card("Versions", section(manifest, "versions")),
        card("Seeds", section(manifest, "seeds")),
        card("SHA-256", section(manifest, "base_sha256", "data_sha256")),
    ]
    left = f'<section class="card"><h3>Resolved config</h3><pre>{config}</pre></section>' if config else ""
    right = f'<div class="stack">{"".join(cards)}</div>' if any(cards) else ""
    return f'<h2>Set-up</h2><div class="grid">{left}{right}</div>' if left or right else ""


def reproduce(folder: Path, manifest: Flat) -> str:
    """Return the command that makes the run anew, and the one it was started with."""
    blocks = []
    if (folder / "config.yaml").is_file():
        again = ["mlxlora", "train", str(folder / "config.yaml"), "--output", f"{folder}-again"]
        blocks.append(block("from the resolved config, into another folder", shlex.join(again)))
    command = manifest.get("command")
    if isinstance(command, list) and command:
        first = "mlxlora" if command[0] == "__main__.py" else str(command[0])  # python -m mlxlora
        blocks.append(block("as this run was started", shlex.join([first, *map(str, command[1:])])))
    return f'<h2>Reproduce</h2><div class="card stack">{"".join(blocks)}</div>' if blocks else ""
