"""SIGKILL at random moments and at every point of a save: the script of the benchmark, at the suite's length."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KILLS = 25


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_rows_01_to_06_every_killed_run_ends_bit_identical(backend, tmp_path):
    output = tmp_path / "kills.json"
    words = ["--backend", backend, "--kills", str(KILLS), "--seed", "1", "--output", str(output)]
    done = subprocess.run(
        [sys.executable, "benchmarks/kill9.py", *words], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert output.exists(), done.stderr
    found = json.loads(output.read_text())
    assert not found["failures"]
    assert found["identical"] == found["runs"] > 0
    assert found["kills"] == KILLS
    assert found["inside_a_save"] >= KILLS / 5
    assert len(found["points"]) == 8, "every point of a save, and anywhere"
    assert done.returncode == 0


# Forks the command line at every fault point, then runs the same command again; prints what lies where.
COMMANDS = """
import hashlib, importlib, json, os, shutil, sys
from pathlib import Path
from tests.recovery.golden.make import BASE, recipe
from shared.config_file import build_config, to_yaml

root, names = Path(sys.argv[1]), sys.argv[2:]
shutil.copytree(BASE, root / "base")
main = importlib.import_module("mlxlora.cli.main")
for name in ("transformers", "torch", "torch_backend.loading") if len(names) > 1 else ():
    importlib.import_module(name)

def run(*words, fault=""):
    pid = os.fork()
    if pid == 0:
        os.environ["MLXLORA_FAULT"] = fault
        log = os.open(root / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os._exit(main.run([str(word) for word in words]))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def contents(folder):
    if not folder.exists():
        return None
    found = {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}
    return {name: hashlib.sha256(data).hexdigest() for name, data in found.items()}

if len(names) > 1:
    (root / "recipe.yaml").write_text(to_yaml(build_config(recipe(root / "run", backend="torch"))))
    assert run("train", root / "recipe.yaml") == 0, (root / "log").read_text()
base, adapter = root / "base", root / "run/adapter"
words = {
    "quantize": ["quantize", base, "--scheme", "affine-4bit-g64"],
    "convert": ["convert", base, "--to", "mlx"],
    "merge": ["merge", adapter, adapter, "--method", "linear"],
    "fuse": ["fuse", base, "--adapter", adapter, "--backend", "torch"],
}
before = [contents(folder) for folder in (base, adapter)]
for name in names:
    whole = root / f"{name}-whole"
    assert run(*words[name], "--output", whole) == 0, (root / "log").read_text()
    for point in ("folder.written", "folder.before_rename"):
        for old in (False, True):
            output = root / f"{name}-{point}-{old}"
            if old:
                shutil.copytree(whole, output)
            code = run(*words[name], "--output", output, *(["--force"] if old else []), fault=f"{point}:1")
            left = contents(output)
            again = run(*words[name], "--output", output, "--force")
            assert again == 0, (root / "log").read_text()
            print(json.dumps({
                "case": output.name, "code": code, "whole_or_absent": left in (None, contents(whole)),
                "again": contents(output) == contents(whole),
                "strays": [path.name for path in root.glob(f".{output.name}*")],
                "sources": [contents(folder) for folder in (base, adapter)] == before,
            }))
"""


@pytest.mark.parametrize(
    "names", [["quantize"], pytest.param(["quantize", "convert", "merge", "fuse"], marks=pytest.mark.slow)]
)
def test_row_07_a_killed_command_leaves_its_folder_whole_or_absent_and_its_source_untouched(names, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, str(tmp_path), *names], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 4 * len(names)
    for row in found:
        wanted = {"code": -9, "whole_or_absent": True, "again": True, "strays": [], "sources": True}
        assert row == {"case": row["case"], **wanted}
