"""Every snippet of the README and of docs/ is run: bash and Python on the demo base, YAML as a config, JSON as rows.

A comment in front of a block says what else is to be done with it:

    <!-- snippet: skip, REASON -->      not run here; REASONS counts them
    <!-- snippet: slow -->              run with -m slow only
    <!-- snippet: file NAME -->         written into the page's folder before anything of the page is run
"""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlxlora import DEMO
from mlxlora.cli.main import run
from shared.config import DataConfig, RunConfig
from shared.config_file import build_config, merge
from shared.data.sources import load_rows

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?:<!-- snippet: ([^\n]*?) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OUTPUT = ("", "text")  # what a command prints, and drawings
# What the pages call a base, a recipe and the like, and what stands for it here.
NAMES = {
    "mlx-community/Llama-3.2-3B-Instruct-4bit": "base",
    "MODEL": "base",
    "BASE": "base",
    "BASE-4bit": "base-4bit",
    "DIR": "made",
}
SMALL = ["train.updates=2", "train.batch_size=2", "train.dtype=float32", "evaluation.batches=1"]
# What a command gets behind its own arguments, so that it takes a second and not an hour.
EXTRA = {
    "train": [part for setting in SMALL for part in ("--set", setting)],
    "generate": ["--max-tokens", "2"],
    "chat": ["--max-tokens", "2"],
    "parity": ["--updates", "1"],
    "bench": ["--size", "tiny"],
    "fuse": ["--accept-loss"],  # what two updates learn is small beside half precision
}
# Why blocks are not run, and how many for each reason.
REASONS = {
    "installs packages": 3,
    "needs a CUDA device": 1,
    "needs chromium and tmux": 1,
}
SLOW = {f"docs/howto/{name}.md" for name in ("chat", "full", "less-memory", "sql", "use")}  # the rest show the like
LEAST = {"model": "base", "data": {"path": "data"}}


@dataclass(frozen=True)
class Block:
    """A fenced block: what its marker says, its language, its text, and where it stands."""

    marker: str
    language: str
    text: str
    place: str


def blocks_of(page: Path) -> list[Block]:
    """Return a page's blocks but for output."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        if match[2] not in OUTPUT:
            found.append(Block(match[1] or "", match[2], match[3], f"{page.relative_to(ROOT)}:{line}"))
    return found


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def cases() -> list[Any]:
    """Return each page that has something to run, once without its slow blocks and once, slow, whole."""
    found = []
    for page in PAGES:
        blocks = blocks_of(page)
        slow_page = name_of(page) in SLOW
        if blocks and not slow_page:
            found.append(pytest.param(page, False, id=name_of(page)))
        if slow_page or any(block.marker == "slow" for block in blocks):
            found.append(pytest.param(page, True, id=f"{name_of(page)}-whole", marks=pytest.mark.slow))
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Return a folder with what pages take as given: a base, rows, a recipe, a run and two lines of prompts."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(DEMO / "base", folder / "base")
    (folder / "data").mkdir()
    for split in ("train", "valid", "test"):
        lines = (DEMO / "task" / f"{split}.jsonl").read_text().splitlines(keepends=True)
        (folder / "data" / f"{split}.jsonl").write_text("".join(lines[:8]))
    (folder / "questions.jsonl").write_text('{"prompt": "Request: Open the gate."}\n{"prompt": "Request: Close it."}\n')
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**LEAST, "output": "runs/first"}))
    here = Path.cwd()
    os.chdir(folder)
    try:
        assert run(["train", "recipe.yaml", *EXTRA["train"]]) == 0
        assert run(["quantize", "base", "--scheme", "affine-4bit-g64", "--output", "base-4bit"]) == 0
    finally:
        os.chdir(here)
    return folder


@pytest.mark.parametrize(("page", "whole"), cases())
def test_every_snippet_runs(page, whole, world, tmp_path, monkeypatch):
    folder = tmp_path / "here"
    shutil.copytree(world, folder)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    blocks = [block for block in blocks_of(page) if not block.marker.startswith("skip")]
    for block in blocks:
        if block.marker.startswith("file "):
            Path(block.marker.removeprefix("file ")).write_text(renamed(block.text))
            if block.marker == "file recipe.yaml":  # a page with a recipe of its own makes the run of its own
                shutil.rmtree("runs")
    for block in blocks:
        if whole or block.marker != "slow":
            run_block(block, folder, monkeypatch)


def run_block(block: Block, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run one block; every bash block begins in the folder of the page, or where the last one went with cd."""
    if block.language == "bash":
        for line in commands_of(block.text):
            run_command(line, block.place, monkeypatch)
    elif block.language == "python":
        if not block.marker.startswith("file "):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT names keys that are mlx-lm's
                exec(compile(renamed(block.text), block.place, "exec", dont_inherit=True), {"__name__": "snippet"})
        else:
            importlib.import_module(Path(block.marker.removeprefix("file ")).stem)
    elif block.language == "yaml":
        values = yaml.safe_load(block.text)
        if set(values) <= set(RunConfig.model_fields):
            build_config(merge(LEAST, values))
        else:
            assert block.marker.startswith("file "), f"{block.place}: no config, and no file that is used"
    else:
        assert block.language == "json", f"{block.place}: what is {block.language}?"
        file = folder / "rows.jsonl"
        file.write_text(block.text)
        assert load_rows(DataConfig(path=str(file))).train, block.place


def commands_of(text: str) -> list[str]:
    """Return the commands of a block: lines, joined where a line ends with a backslash or inside quotes."""
    found, open_line = [], ""
    for line in text.replace("\\\n", " ").splitlines():
        open_line = f"{open_line}\n{line}" if open_line else line
        try:
            words = shlex.split(open_line, comments=True)
        except ValueError:  # a quote is still open
            continue
        found += [open_line] if words else []
        open_line = ""
    assert not open_line
    return found


def run_command(line: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run one command: ours in this process, as a shell would start it; any other in bash."""
    words = [NAMES.get(word, word) for word in shlex.split(line, comments=True)]
    if words[0] == "cd":
        monkeypatch.chdir(words[1])
    elif words[0] == "mlxlora" and not {"|", ">", "&&"} & set(words):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
        assert run([*words[1:], *EXTRA.get(words[1], [])]) == 0, f"{place}: {line}"
    else:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        subprocess.run(["bash", "-ec", line], check=True, env={**os.environ, "PATH": path}, timeout=120)


def renamed(text: str) -> str:
    """Return a text with the names of bases that are not here replaced."""
    for name, ours in NAMES.items():
        if "/" in name:
            text = text.replace(name, ours)
    return text


def test_what_is_not_run_has_a_reason_and_is_counted():
    skipped = [block.marker for page in PAGES for block in blocks_of(page) if block.marker.startswith("skip")]
    assert Counter(marker.removeprefix("skip, ") for marker in skipped) == REASONS
    markers = {block.marker.split(" ")[0].strip(",") for page in PAGES for block in blocks_of(page)}
    assert markers <= {"", "skip", "slow", "file"}


def test_every_block_of_the_pages_is_found():
    """A fence in a list or with blanks in front of it would not be."""
    for page in PAGES:
        fences = len(re.findall(r"^\s*```", page.read_text(encoding="utf-8"), re.MULTILINE))
        assert fences == 2 * len(BLOCK.findall(page.read_text(encoding="utf-8"))), name_of(page)


def test_the_names_that_are_replaced_are_used():
    text = "\n".join(block.text for page in PAGES for block in blocks_of(page))
    assert [name for name in NAMES if name not in text] == []
    assert json.dumps(EXTRA)  # plain words
