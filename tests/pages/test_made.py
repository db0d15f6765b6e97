"""The pages of docs/ that are made from the code are what the code says, and the site shows every page."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from shared.config import USUAL, SourceConfig, schema
from shared.config_file import build_config

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
GOLDEN = ROOT / "tests/unit/golden_config.json"
GOLDEN_USUAL = ROOT / "tests/unit/golden_optimizers.json"


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    """Return scripts/make_docs.py as a module."""
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "scripts/make_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_made_pages_are_what_the_code_says(maker):
    """Run `python scripts/make_docs.py` where this fails."""
    stale = [name for name, text in maker.pages().items() if (DOCS / name).read_text(encoding="utf-8") != text]
    assert not stale


def test_the_reference_has_every_key_with_its_default():
    """Read from the golden config, not from the schema that the page is made of."""
    page = (DOCS / "config.md").read_text()
    for section, value in json.loads(GOLDEN.read_text()).items():
        part = page.split(f"\n## {section}\n")[1].split("\n## ")[0] if isinstance(value, dict) else page
        for key in value if isinstance(value, dict) else [section]:
            assert f"\n| `{key}` |" in part, f"{section}.{key}"


def test_golden_files_hold_every_section_and_every_default():
    golden, whole = json.loads(GOLDEN.read_text()), schema()
    for key, value in whole["properties"].items():
        section = whole["$defs"].get(value.get("$ref", "").rpartition("/")[2])
        assert key in golden
        if section:
            assert set(golden[key]) == set(section["properties"]), key


def test_no_default_of_an_optimizer_or_a_source_moves_unnoticed():
    """Fails when a default changes: change golden_optimizers.json with it, and say so in CHANGELOG.md."""
    least = {"model": "m", "data": {"path": "d"}}
    found = {
        name: build_config({**least, "optimizer": {"name": name}}).optimizer.model_dump(mode="json")
        for name in ("adamw", "adam", "sgd", "adafactor", *USUAL)
    }
    golden = json.loads(GOLDEN_USUAL.read_text())
    assert {"optimizers": found, "source": SourceConfig(path="d").model_dump(mode="json")} == golden


def test_the_site_shows_every_page():
    """No page of docs/ is left out of the navigation, and none of it is missing."""
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    shown = list(names_in(site["nav"]))
    assert sorted(shown) == sorted(str(file.relative_to(DOCS)) for file in DOCS.rglob("*.md"))


def names_in(entry: object):
    """Yield the files that a navigation names."""
    if isinstance(entry, str):
        yield entry
    elif isinstance(entry, dict):
        for inner in entry.values():
            yield from names_in(inner)
    elif isinstance(entry, list):
        for inner in entry:
            yield from names_in(inner)
