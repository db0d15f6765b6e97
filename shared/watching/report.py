"""report.html: one self-contained page of a run folder, from its own files; no script, no request to anywhere."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import yaml

from shared.callbacks import Metrics
from shared.durable import write_whole
from shared.errors import StorageError
from shared.watching.charts import Curve, Point, Rows, chart, curve, noisy, points
from shared.watching.display import megabytes
from shared.watching.heat import gradient_section
from shared.watching.sets import set_charts
from shared.watching.words import duration, escape, moment, number, short, shown

Flat = Mapping[str, Any]  # the manifest, one level deep: "rows.train" -> value

ARROW, DOT = " \u2192 ", " \u00b7 "
DATA = {
    "rows.train": "training rows",
    "rows.valid": "validation rows",
    "rows.kind": "kind of rows",
    "tokens.train": "tokens in the training rows",
    "tokens.supervised": "of these supervised",
    "tokens.cut_at_max_length": "rows that fill max_length (cut if longer)",
}
MODEL = ("family", "quantization", "adapter", "modules", "trained_parameters")

CSS = """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--text:#1a1d21;--muted:#59626e;--line:#dde1e6;--a:#1d5fd1;--b:#b4540a;--s2:#1b7f3b;--s3:#8a3fb5;--s4:#b5123e;--s5:#0b7f8a}
@media(prefers-color-scheme:dark){:root{--bg:#121518;--card:#1b1f24;--text:#e7e9ec;--muted:#a0a9b4;--line:#343b43;--a:#74aaff;--b:#ffb057;--s2:#6fd08c;--s3:#d49bf5;--s4:#ff8fa8;--s5:#5fd3de}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--text);overflow-wrap:anywhere;font:15px/1.5 system-ui,"Segoe UI",sans-serif}
main{max-width:1000px;margin:0 auto;padding:24px 16px 40px}p{margin:6px 0}footer{margin-top:32px}h1{font-size:26px;line-height:1.25;margin:0}
h2{font-size:18px;margin:32px 0 12px}h3{font-size:15px;margin:0 0 4px}small,.label,footer{font-size:13px}.muted,.label,small,footer{color:var(--muted)}
.figures,.grid,.three,.stack{display:grid;gap:12px}.figures{grid-template-columns:repeat(3,1fr);margin-top:20px}.figures b,.figures small{display:block}
.grid{align-items:start;grid-template-columns:repeat(auto-fit,minmax(min(380px,100%),1fr))}.figures b{font-size:20px}.three{margin-top:10px;grid-template-columns:repeat(auto-fit,minmax(min(240px,100%),1fr))}.card,.stack>*,.three>*{min-width:0}
.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px 14px;margin:0}
table{width:100%;border-collapse:collapse;font-size:14px}th,td{text-align:left;vertical-align:top;padding:4px 0;border-top:1px solid var(--line)}tr:first-child>*{border-top:0}th{font-weight:400;color:var(--muted);width:45%}td{padding-left:14px}
pre{margin:0;white-space:pre-wrap;overflow:auto;font:13px/1.5 ui-monospace,Menlo,Consolas,monospace}.sample pre{max-height:18em}svg{display:block;width:100%;height:auto;overflow:visible}text{fill:var(--muted);font-size:12px}.rule{stroke:var(--line)}.axis{stroke:var(--muted);fill:none}
.curve{fill:none;stroke-width:1.6;stroke-linejoin:round}.dense{stroke-width:1.2;opacity:.8}.faint{stroke-width:1;stroke-dasharray:none;opacity:.4}.heat rect{shape-rendering:crispEdges}.zero{fill:none;stroke:var(--b)}.warning{border-left:4px solid var(--b);padding-left:10px}.a{stroke:var(--a)}.b,.c{stroke:var(--b);stroke-dasharray:5 3}.dot-a,rect{fill:var(--a)}.dot-b,.dot-c{fill:var(--b)}
.legend span{white-space:nowrap;margin-right:14px}.s0{stroke:var(--a)}.s1{stroke:var(--b)}.s2{stroke:var(--s2)}.s3{stroke:var(--s3)}.s4{stroke:var(--s4)}.s5{stroke:var(--s5)}.dot-s0{fill:var(--a);color:var(--a)}.dot-s1{fill:var(--b);color:var(--b)}.dot-s2{fill:var(--s2);color:var(--s2)}.dot-s3{fill:var(--s3);color:var(--s3)}.dot-s4{fill:var(--s4);color:var(--s4)}.dot-s5{fill:var(--s5);color:var(--s5)}
@media(max-width:600px){.figures{grid-template-columns:repeat(2,1fr);gap:8px}.figures b{font-size:17px}.figures .card{padding:8px 10px}text{font-size:15px}}
@media print{:root{--bg:#fff;--card:#fff;--text:#000;--muted:#444;--line:#ccc;--a:#1d5fd1;--b:#b4540a;--s2:#1b7f3b;--s3:#8a3fb5;--s4:#b5123e;--s5:#0b7f8a}main{max-width:none;padding:0}.grid{grid-template-columns:1fr 1fr}.figures{grid-template-columns:repeat(3,1fr)}text{font-size:12px}.figures .card,figure,.sample,table{break-inside:avoid}h2,h3{break-after:avoid}.sample pre{max-height:none}svg *{print-color-adjust:exact}}
"""  # noqa: E501


@dataclass(frozen=True)
class Sample:
    """One prompt: what was wanted (empty: not known), and what the model said before and after training."""

    prompt: str
    wanted: str
    before: str
    after: str


def write_report(folder: Path, *, samples: Sequence[Sample]) -> Path:
    """Write report.html of a run that has ended from its config, manifest and metrics; raises StorageError."""
    return write_page(folder, folder / "report.html", samples=samples, end="stopped early")


def write_page(folder: Path, target: Path, *, samples: Sequence[Sample], end: str) -> Path:
    """Write the page of a run folder; end: what to say where updates are missing. Raises StorageError."""
    rows = sorted(Metrics(folder / "metrics.jsonl").read(), key=lambda row: row["step"])
    manifest = read_manifest(folder / "manifest.json")
    body = [
        key_figures(rows, manifest, end=end),
        warning(manifest),
        curves_and_data(rows, {**manifest, **read_settings(folder)}),
        gradient_section(rows),
        samples_section(samples),
        setup(folder / "config.yaml", manifest),
        reproduce(folder, manifest),
    ]
    try:
        write_whole(target, page(folder.resolve().name, manifest, body="\n".join(body)))
    except OSError as error:
        raise StorageError(f"cannot write {target}: {error.strerror}", fix="free some space") from None
    return target


def page(title: str, manifest: Flat, *, body: str) -> str:
    """Return the document; its policy refuses every request, whatever the texts hold."""
    facts = {**manifest, "created": moment(str(manifest.get("created", "")))}
    ran = DOT.join(str(facts[key]) for key in ("model", "backend", "device", "created") if facts.get(key))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}: mlxlora run</title><style>{CSS}</style></head>\n<body><main>\n"
        f'<h1>{escape(title)}</h1><p class="muted">{escape(ran)}</p>\n{body}\n'
        "<footer>Made by mlxlora from config.yaml, manifest.json and metrics.jsonl.</footer></main></body></html>\n"
    )


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest one level deep, empty where it is missing or damaged."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return flatten(found)


def read_settings(folder: Path) -> dict[str, Any]:
    """Return a run's config.yaml one level deep, empty where it is missing or damaged."""
    try:
        return flatten(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def flatten(found: Any) -> dict[str, Any]:
    """Return a mapping one level deep: "rows.train" -> value; empty for anything else.

    >>> flatten({"rows": {"train": 3}, "model": "m"})
    {'rows.train': 3, 'model': 'm'}
    """
    flat: dict[str, Any] = {}
    for key, value in found.items() if isinstance(found, dict) else ():
        flat |= {f"{key}.{name}": inner for name, inner in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def curves_and_data(rows: Rows, manifest: Flat) -> str:
    """Return the charts and the facts on the data."""
    steps = max((row["step"] for row in rows), default=0)
    memory = max((y for _, y in points(rows, "peak_memory_bytes")), default=0.0)
    unit, scale = ("GiB", 2.0**30) if memory >= 2**30 else ("MiB", 2.0**20)
    losses = (*noisy(rows, "loss", "training"), curve(rows, "eval_loss", "validation", style="b"))
    norms = (*noisy(rows, "grad_norm", "gradient norm"), *clipping(rows, manifest))
    tiles = [
        chart("Loss", "nats per supervised token", *losses, last_step=steps, from_zero=False),
        *set_charts(rows, last_step=steps),
        chart("Learning rate", "per update", curve(rows, "lr", "learning rate"), last_step=steps),
        chart("Gradient norm", "L2, before clipping", *norms, last_step=steps),
        chart("Speed", "tokens per second", *noisy(rows, "tokens_per_s", "speed"), last_step=steps),
        chart("Peak memory", unit, curve(rows, "peak_memory_bytes", "memory", scale=scale), last_step=steps),
        card("Data", data_facts(rows, manifest)),
    ]
    bad = sum(number(value) is None for row in rows for value in row.values() if not isinstance(value, dict))
    missing = f"{bad:,} values are not finite numbers and are left out." if bad else ""
    note = missing if rows else "metrics.jsonl has no rows."
    return f'<h2>Curves and data</h2><p class="muted">{note}</p><div class="grid">{"".join(tiles)}</div>'


def clipping(rows: Rows, settings: Flat) -> tuple[Curve, ...]:
    """Return the norm that longer gradients are clipped to, where some are."""
    limit, norms = number(settings.get("optimizer.max_grad_norm")), points(rows, "grad_norm")
    clipped = sum(norm > limit for _, norm in norms) if limit else 0
    if limit is None or not clipped:
        return ()
    ends = tuple((x, float(limit)) for x in (norms[0][0], norms[-1][0]))
    return (Curve(f"clipped above {limit:g}: {clipped / len(norms):.0%}", ends, "c"),)


def data_facts(rows: Rows, manifest: Flat) -> dict[str, str]:
    """Return what is known of the rows and the tokens."""
    facts = labelled(manifest, DATA)
    train, supervised = number(manifest.get("tokens.train")), number(manifest.get("tokens.supervised"))
    if train and supervised is not None:
        facts[DATA["tokens.supervised"]] += f" ({supervised / train:.1%})"
    facts |= section(manifest, "notices")
    trained_on = sum(y for _, y in points(rows, "tokens"))
    return {**facts, "tokens trained on, without padding": f"{trained_on:,.0f}"} if trained_on else facts


def labelled(manifest: Flat, labels: Mapping[str, str]) -> dict[str, str]:
    """Return the known values under their labels."""
    return {label: shown(manifest[key]) for key, label in labels.items() if manifest.get(key) is not None}


def section(manifest: Flat, *names: str) -> dict[str, str]:
    """Return all values of sections of the manifest, as they are."""
    parts = ((*key.partition("."), value) for key, value in manifest.items())
    return {inner: str(value) for name, dot, inner, value in parts if dot and name in names}


def card(title: str, facts: Mapping[str, str]) -> str:
    """Return a table under a title, empty where no fact is known."""
    lines = [f"<tr><th>{escape(label)}</th><td>{escape(value)}</td></tr>" for label, value in facts.items()]
    return f'<section class="card"><h3>{title}</h3><table>{"".join(lines)}</table></section>' if lines else ""


def key_figures(rows: Rows, manifest: Flat, *, end: str) -> str:
    """Return the numbers to look at first; what was not measured is left out."""
    losses, evals, times = points(rows, "loss"), points(rows, "eval_loss"), points(rows, "time_s")
    memory, tokens = points(rows, "peak_memory_bytes"), sum(y for _, y in points(rows, "tokens"))
    time_s = times[-1][1] if times else 0.0
    done = max((row["step"] for row in rows), default=0)
    planned, per_epoch = number(manifest.get("updates")), number(manifest.get("updates_per_epoch"))
    updates = f"{done:,} of {planned:,.0f}" if planned else f"{done:,}"
    parts = (f"{done / per_epoch:.2f} epochs" if per_epoch else "", end if planned and done < planned else "")
    figures = [
        ("Training loss", *first_to_last(losses)),
        ("Validation loss", *first_to_last(evals, best=True)),
        ("Speed", f"{short(tokens / time_s)} tokens/s" if tokens and time_s else None, "mean over the training time"),
        ("Peak memory", megabytes(round(max(y for _, y in memory))) if memory else None, ""),
        ("Training time", duration(time_s) if times else None, "without evaluation"),
        ("Updates", updates if rows else None, ", ".join(filter(None, parts))),
    ]
    tile = '<div class="card"><span class="label">{}</span><b>{}</b><small>{}</small></div>'
    return f'<div class="figures">{"".join(tile.format(*figure) for figure in figures if figure[1])}</div>'


def warning(manifest: Flat) -> str:
    """Return that training diverged, empty where it did not."""
    bad = manifest.get("result.diverged")
    return f'<p class="warning">Training diverged: {escape(bad)}.</p>' if bad else ""


def first_to_last(found: Sequence[Point], *, best: bool = False) -> tuple[str, str]:
    """Return the first and the last value, empty where there is none, and the updates they are of.

    best: name the lowest value too, where it is not the last.
    """
    ends = (*found[:1], *found[1:][-1:])
    where = f"update {ARROW.join(f'{x:,.0f}' for x, _ in ends)}"
    lowest = min(found, key=itemgetter(1), default=None)
    if best and lowest and lowest[1] < found[-1][1]:
        where += f"; best {short(lowest[1])} at {lowest[0]:,.0f}"
    return ARROW.join(short(y) for _, y in ends), where


def samples_section(samples: Sequence[Sample]) -> str:
    """Return the samples before and after, empty where there are none."""
    cards = []
    for sample in samples:
        texts = {"wanted": sample.wanted, "before": sample.before, "after": sample.after}
        boxes = "".join(block(label, text) for label, text in texts.items() if text or label != "wanted")
        inner = f'{block("prompt", sample.prompt)}<div class="three">{boxes}</div>'
        cards.append(f'<section class="card sample">{inner}</section>')
    return f'<h2>Samples before and after</h2><div class="stack">{"".join(cards)}</div>' if cards else ""


def block(label: str, text: str) -> str:
    """Return a text as it is under its label, an empty one by name."""
    inner = f'<pre dir="auto">{escape(text)}</pre>' if text else '<p class="muted">(empty)</p>'
    return f'<div><div class="label">{label}</div>{inner}</div>'


def setup(config: Path, manifest: Flat) -> str:
    """Return the resolved config next to versions, hardware and hashes."""
    text = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""
    cards = [
        card("Model", labelled(manifest, {key: key.replace("_", " ") for key in MODEL})),
        card("Machine", {**labelled(manifest, {"device": "device"}), **section(manifest, "hardware")}),
        card("Versions", section(manifest, "versions")),
        card("Seeds", section(manifest, "seeds")),
        card("SHA-256", section(manifest, "base_sha256", "data_sha256")),
    ]
    left = f'<section class="card"><h3>Config</h3>{block("every value resolved", text)}</section>'
    return f'<h2>Set-up</h2><div class="grid">{left}<div class="stack">{"".join(cards)}</div></div>'


def reproduce(folder: Path, manifest: Flat) -> str:
    """Return the command that makes the run anew, and the one it was started with."""
    config, started = folder / "config.yaml", manifest.get("command")
    again = ["mlxlora", "train", str(config), "--output", f"{folder}-again"] if config.is_file() else []
    words = [str(word) for word in started] if isinstance(started, list) else []
    words[:1] = ["mlxlora"] if words[:1] == ["__main__.py"] else words[:1]  # python -m mlxlora
    commands = {"from the resolved config, into another folder": again, "as this run was started": words}
    blocks = [block(label, shlex.join(command)) for label, command in commands.items() if command]
    return f'<h2>Reproduce</h2><div class="card stack">{"".join(blocks)}</div>' if blocks else ""
