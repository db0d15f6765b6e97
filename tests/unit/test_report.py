"""The report page: whatever the run folder and the samples hold, it is whole, quiet and true to metrics.jsonl."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from shared.callbacks import Metrics
from shared.errors import StorageError
from shared.watching.charts import BOTTOM, LIMIT, TOP, thin, tick_labels, ticks
from shared.watching.report import Sample, write_report
from shared.watching.words import duration, short

MANIFEST = {
    "created": "2026-01-02T03:04:05+00:00",
    "command": ["__main__.py", "train", "--model", "a model", "--set", "train.updates=20"],
    "backend": "torch",
    "device": "CPU",
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "hardware": {"machine": "x86_64", "cores": 2},
    "seeds": {"train": 7},
    "base_sha256": {"model.safetensors": "ab" * 32},
    "data_sha256": {"train.jsonl": "cd" * 32},
    "model": "a model",
    "quantization": ["none"],
    "trained_parameters": 38912,
    "rows": {"train": 1000, "valid": 100, "kind": "prompt"},
    "tokens": {"train": 2000, "supervised": 500, "cut_at_max_length": 3},
    "updates": 20,
    "updates_per_epoch": 10,
}
EVIL = "<script>alert('x')</script><img src=http://example.com/a.png onerror=alert(1)>\"' &amp; \ud800 \x00"
VOID = {"meta", "link", "img", "br", "hr", "input"}


def row(step, **changes):
    """Return a row of metrics.jsonl."""
    values = {"loss": 4 / step, "lr": 1e-3 / step, "grad_norm": 1.0, "tokens": 100, "tokens_per_s": 50.0}
    return {"step": step, **values, "peak_memory_bytes": 2**29, "time_s": 2.0 * step, **changes}


ROWS = [{"step": 0, "eval_loss": 5.0}, *(row(step) for step in range(1, 21)), {"step": 20, "eval_loss": 0.5}]


@pytest.fixture
def report(tmp_path):
    """Return a writer of the page of a run folder with these rows."""

    def write(rows=ROWS, *, samples=(), manifest=MANIFEST, config="model: a model\n"):
        folder = tmp_path / "my run"
        folder.mkdir(exist_ok=True)
        for item in rows:
            Metrics(folder / "metrics.jsonl").write(item)
        (folder / "manifest.json").write_text(manifest if isinstance(manifest, str) else json.dumps(manifest))
        (folder / "config.yaml").write_text(config)
        target = write_report(folder, samples=samples)
        assert sorted(file.name for file in folder.iterdir() if file.name.startswith(".")) == []
        return target.read_text(encoding="utf-8")

    return write


class Page(HTMLParser):
    """The tags, attributes and texts of a page; every tag is closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.open += [] if tag in VOID else [tag]

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def pictures(text):
    """Return every SVG, parsed as XML, by the title of its figure."""
    found = re.findall(r"<h3>([^<]*)</h3>(<svg.*?</svg>)", text, re.DOTALL)
    assert len(found) == text.count("<svg")
    return {title: ET.fromstring(picture) for title, picture in found}


def places(picture):
    """Return the points of each curve of a picture."""
    paths = [path.get("d") for path in picture.iter("path") if "curve" in path.get("class")]
    return [[tuple(map(float, pair.split())) for pair in path[1:].split("L")] for path in paths]


def test_the_page_shows_what_the_run_folder_holds(report):
    text = Page(report(samples=[Sample("ask", "want", "old", "new")])).text
    for part in ("my run", "4 → 0.2", "5 → 0.5", "50 tokens/s", "512 MiB", "40.0 s", "20 of 20", "2.00 epochs"):
        assert part in text
    for part in ("1,000", "500 (25.0%)", "38,912", "2.13.0", "ab" * 32, "model: a model", "want", "old", "new"):
        assert part in text
    assert "mlxlora train --model 'a model' --set train.updates=20" in text
    assert "/my run/config.yaml' --output '" in text


def test_there_is_a_picture_of_every_quantity(report):
    assert set(pictures(report())) == {"Loss", "Learning rate", "Gradient norm", "Speed", "Peak memory"}


def test_every_picture_has_axes_ticks_and_labels(report):
    for picture in pictures(report()).values():
        texts = ["".join(text.itertext()) for text in picture.iter("text")]
        assert "update" in texts
        assert {"0", "5", "10", "15", "20"} <= set(texts)
        assert len(list(picture.iter("line"))) >= 6
        assert all(0 <= x <= 460 and 0 <= y <= 240 for line in places(picture) for x, y in line)


def test_texts_cannot_become_markup(report):
    sample = Sample(EVIL, EVIL, EVIL, EVIL)
    manifest = {key: {EVIL: EVIL} if isinstance(value, dict) else EVIL for key, value in MANIFEST.items()}
    manifest["command"] = ["mlxlora", EVIL]
    text = report(samples=[sample], manifest=manifest, config="model: <script>alert(1)</script>\n")
    page = Page(text)
    assert not {"script", "img", "iframe", "object", "base"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "<script>alert(1)</script>" in page.text
    assert "<script>alert('x')</script>" in page.text
    assert "\x00" not in text


def test_the_page_asks_nobody_for_anything(report):
    text = report(samples=[Sample(EVIL, EVIL, EVIL, EVIL)])
    page = Page(text)
    assert not [pair for pair in page.attributes if pair[0] in ("href", "src", "srcset", "action", "data", "style")]
    assert not {"link", "script"} & set(page.tags)
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    assert style
    assert not re.search(r"url\(|@import|//", style[1])
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def test_the_section_of_samples_is_left_out_where_there_are_none(report):
    assert "Samples" not in report()
    assert "(empty)" in report(samples=[Sample("ask", "", "", "new")])


def test_no_metrics_give_a_page_without_curves_or_figures(report):
    text = report([])
    assert pictures(text) == {}
    assert "metrics.jsonl has no rows" in text
    assert "Training loss" not in text
    assert "Updates" not in text


def test_an_empty_folder_gives_a_page(tmp_path):
    Page(write_report(tmp_path, samples=()).read_text(encoding="utf-8"))


@pytest.mark.parametrize("manifest", ["", "{", "[]", "3", '{"rows": 3, "tokens": [1], "versions": null}'])
def test_a_damaged_manifest_gives_a_page(report, manifest):
    text = report(manifest=manifest)
    assert set(pictures(text)) >= {"Loss"}
    assert "<h3>Versions</h3>" not in text


@pytest.mark.parametrize("rows", [[row(1)], [{"step": 0, "eval_loss": 5.0}]], ids=["update", "evaluation"])
def test_one_row_gives_a_dot(report, rows):
    assert len(list(pictures(report(rows))["Loss"].iter("circle"))) == 1


def test_without_evaluations_only_the_training_loss_is_drawn(report):
    text = report([row(step) for step in range(1, 9)])
    assert len(places(pictures(text)["Loss"])) == 1
    assert "Validation loss" not in text


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None, "high", True, 10**400])
def test_values_that_are_not_finite_are_left_out_and_counted(report, bad):
    text = report([row(1), row(2, loss=bad, grad_norm=bad), row(3)])
    drawn = pictures(text)
    assert [len(places(drawn[name])[0]) for name in ("Loss", "Gradient norm", "Speed")] == [2, 2, 3]
    assert "2 values are not finite numbers" in text
    assert not re.search(r"\b(nan|inf)\b", text)


@pytest.mark.parametrize("value", [0.0, 5e-324, 1e-300, 1e-12, 3.0, 1e6, 3e38, -2.0])
def test_any_size_of_value_can_be_drawn(report, value):
    rows = [row(step, loss=value, grad_norm=value * (1 + step % 2), lr=value) for step in range(1, 6)]
    for picture in pictures(report(rows)).values():
        assert all(0 <= x <= 460 and 0 <= y <= 240 for line in places(picture) for x, y in line)


def test_gradient_norms_by_module_are_two_heat_maps_with_a_verdict(report):
    norms = {f"layers.{n}.{kind}": 10.0 ** (-3 * (n == 2)) for n in range(4) for kind in ("q_proj", "up_proj")}
    norms |= {"lm_head": 0.0}
    text = report([row(step, grad_norms=norms) for step in range(1, 101)])
    drawn = {title: [box for box in picture.iter("rect") if len(box)] for title, picture in pictures(text).items()}
    assert len(drawn["By layer"]) == (4 + 1) * 40
    assert len(drawn["By module"]) == 2 * 4
    shades = {box[0].text: float(box.get("fill-opacity")) for box in drawn["By module"]}
    assert shades["q_proj, layer 1: 1"] == 1.0 > shades["q_proj, layer 2: 0.001"] > 0
    assert sum(box.get("class") == "zero" for box in drawn["By layer"]) == 40
    assert "Gradients vanish" in text
    assert "in layers.2, lm_head" in text.replace("layers.2 and", "layers.2,")
    assert "not finite" not in text


def test_a_long_run_has_a_running_mean_before_the_noise_and_says_how_much_was_clipped(report):
    rows = [row(step, loss=2.0 + (-1) ** step, grad_norm=float(step % 2)) for step in range(1, 201)]
    text = report(rows, config="model: m\noptimizer: {max_grad_norm: 0.5}\n")
    noise, mean = places(pictures(text)["Loss"])
    height = [max(y for _, y in line) - min(y for _, y in line) for line in (noise, mean)]
    assert height[1] < 0.3 * height[0]
    assert "clipped above 0.5: 50%" in text


def test_a_run_that_stopped_early_says_so_and_names_its_best_evaluation(report):
    evals = [{"step": step, "eval_loss": loss} for step, loss in ((0, 5.0), (5, 1.5), (10, 2.0))]
    text = report([*(row(step) for step in range(1, 11)), *evals])
    assert "stopped early" in text
    assert "best 1.5 at 5" in text


def test_a_long_run_is_thinned_and_keeps_its_extremes(report):
    rows = [row(step, loss=2 + math.sin(step)) for step in range(1, 100_001)]
    rows[54_321]["loss"], rows[76_543]["loss"] = 9.0, 0.125
    text = report(rows)
    line = places(pictures(text)["Loss"])[0]
    ends = [y for _, y in (min(line, key=lambda point: point[1]), max(line, key=lambda point: point[1]))]
    top, bottom = ticks(0.125, 9.0)[-1], ticks(0.125, 9.0)[0]
    assert ends == pytest.approx(
        [BOTTOM - (BOTTOM - TOP) * (value - bottom) / (top - bottom) for value in (9.0, 0.125)], abs=0.06
    )
    assert len(line) <= LIMIT
    assert len(text) < 200_000


@pytest.mark.parametrize("num", [0, 1, 2, 999, 1000, 1001, 1999, 50_000])
def test_thinning_keeps_ends_extremes_and_order(num):
    found = [(float(x), math.sin(x * x)) for x in range(num)]
    kept = thin(found)
    assert len(kept) <= LIMIT
    assert list(kept) == sorted(set(kept))
    assert set(kept) <= set(found)
    if found:
        assert (kept[0], kept[-1]) == (found[0], found[-1])
        assert {min(y for _, y in kept), max(y for _, y in kept)} == {
            min(y for _, y in found),
            max(y for _, y in found),
        }


def test_ticks_are_round_enclose_the_values_and_have_labels_of_their_own():
    assert ticks(4.66, 7.21) == [4.5, 5.0, 5.5, 6.0, 6.5, 7.0, 7.5]
    assert ticks(0, 1, smallest=1.0) == [0, 1]
    for low, high in [(0, 1e-3), (0, 9), (0.012, 0.013), (-3, 40), (0, 1e7), (4.6, 4.7), (0, 123_456), (7, 7)]:
        found = ticks(low, high)
        assert found[0] <= low + 1e-9
        assert found[-1] >= high - 1e-9
        assert 3 <= len(found) <= 9
        assert len(set(tick_labels(found))) == len(found)
        assert max(map(len, tick_labels(found))) <= 8


def test_numbers_are_written_for_people():
    assert tick_labels([4.5, 5.0]) == ["4.5", "5.0"]
    assert tick_labels([0.0, 2e-5]) == ["0", "2e-5"]
    assert [short(7.0508645), short(5641.99), short(0.00066666)] == ["7.051", "5,642", "0.0006667"]
    assert [duration(26.04), duration(59.96), duration(200), duration(7500)] == [
        "26.0 s",
        "1 min 0 s",
        "3 min 20 s",
        "2 h 5 min",
    ]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(StorageError, match=r"cannot write .*report\.html"):
        write_report(tmp_path / "missing", samples=())


def test_every_set_and_metric_of_evaluations_has_its_curve_under_its_name(report):
    names = ["", *(f"set_{n}_" for n in range(7))]
    rows = [
        {"step": step, **{f"eval_{name}{metric}": 1.0 / (step + 1 + n) for n, name in enumerate(names)
                          for metric in ("loss", "rouge_l")}}
        for step in (0, 10, 20)
    ]  # fmt: skip
    page = report(rows=rows)
    found = pictures(page)
    assert {"Loss", "Loss by set", "ROUGE-L"} <= set(found)
    assert "Exact match" not in found
    for title in ("Loss by set", "ROUGE-L"):
        assert len(places(found[title])) == len(names)
    text = Page(page).text
    assert all(text.count(f"● {name.rstrip('_') or 'validation'}") == 2 for name in names)


def test_without_sets_no_chart_of_them_is_drawn(report):
    assert "Loss by set" not in pictures(report())
