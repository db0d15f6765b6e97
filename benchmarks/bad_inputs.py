"""Bad inputs, ours beside mlx-lm's, each a real command in a process of its own: exit code, lines, time, what is left.

    python benchmarks/bad_inputs.py [--only TEXT] [--ours-only] [--output FILE.json]

The cases are those of tests/cli/test_bad_input.py. mlx-lm gets the same folders, and the same mistake in its own option
or key; a validation file stands beside the training rows, without which it does not train. Times are seconds of
processor time, which other work on the machine does not change; 20 of them are taken for a hang. mlx-lm's
do not hold its imports (5 s).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import heading, write  # noqa: E402
from tests.cli.test_bad_input import CASES, OTHER, ROWS, World, check_message, files_in  # noqa: E402
from tests.conftest import save_model  # noqa: E402

HANG_S, MEMORY = 20, 16 * 2**30
LIMITS = [(resource.RLIMIT_CPU, HANG_S), (resource.RLIMIT_AS, MEMORY)]
QUICK_S = 2.0  # the contract, for what can be known before the model is loaded
LORA = {"rank": 8, "scale": 20.0, "dropout": 0.0}


def lora(**changes: Any) -> str:
    return json.dumps({"lora_parameters": {**LORA, **changes}})


# Case -> mlx-lm's options ("--x y"), or the text of its config file; nothing: the same folders say it all.
MEASURED: dict[str, str | bytes] = {  # the rows that mlx-lm 0.32.2 was measured on before this project began
    "config: unknown key": "{learning_rat: 1}",
    "config: lr is a word": "{learning_rate: abc}",
    "config: a list at the top": "- model\n- data\n",
    "config: broken YAML": "model: m\ndata: {path: d\ntrain: 1\n",
    "config: config file missing": "-c no.yaml",
    "config: rank 0": lora(rank=0),
    "config: rank -1": lora(rank=-1),
    "config: dropout 1.5": lora(dropout=1.5),
    "model: targets that match nothing": lora(keys=["q_prj"]),
    "config: lr is nan": "--learning-rate nan",
    "config: lr is negative": "--learning-rate -1",
    "model: training diverges": "--learning-rate 1e30 --iters 8",
    "config: batch 0": "--batch-size 0",
    "config: batch -4": "--batch-size -4",
    "config: updates 0": "--iters 0",
    "config: updates -5": "--iters -5",
    "model: more layers to adapt than there are": "--num-layers 99",
    "config: max_length 0": "--max-seq-length 0",
    "config: max_length 1": "--max-seq-length 1",
    "config: log.every 0": "--steps-per-report 0",
    "config: seed -1": "--seed -1",
    "command: unknown option": "--ouptut x",
    **dict.fromkeys(
        (
            "data: no data folder", "data: no rows", "data: broken JSON in line 3", "data: no known key",
            "rows of three kinds", "data: content null", "data: messages empty", "data: unknown role",
            "data: text is a number", "data: text empty",
        ), ""
    ),
    "data: completion empty": "--mask-prompt",
    "fewer rows than a batch": "",
    "data: prompt longer than max_length": "--mask-prompt --max-seq-length 4",
    "data: not UTF-8 in line 2": "",
    "the validation rows are the training rows": "",
    **dict.fromkeys(
        (
            "model: no model folder", "model: weights cut short", "model: NaN in a weight", "model: tensor missing",
            "model: config.json empty", "model: hidden_size mismatch", "model: no layers", "model: ten million layers",
            "model: model_type unknown", "model: model_type climbs out", "model: code in the folder",
            "model: vocabulary smaller than the tokenizer's", "data: a template that reaches for Python",
            "data: a template that never ends", "data: messages and no chat template", "model: no tokenizer",
        ), ""
    ),
    "command: generate: no adapter": "--resume-adapter-file no.safetensors",
    "adapter: shapes of another width": "--resume-adapter-file foreign/adapter_model.safetensors",
    "adapter: names of another model": "--resume-adapter-file foreign/adapter_model.safetensors",
    "adapter: random bytes": "--resume-adapter-file foreign/adapter_model.safetensors",
    "command: output is a file": "--adapter-path taken",
}  # fmt: skip
MORE: dict[str, str | bytes] = {
    "config: lr is infinite": "--learning-rate inf",
    "config: lr is null": "{learning_rate: null}",
    "config: rank is a fraction": lora(rank=8.5),
    "config: optimizer misspelt": "--optimizer adm",
    "config: schedule misspelt": "{lr_schedule: {name: cosin_decay, arguments: [0.1, 10]}}",
    "config: betas of three": "{optimizer: adamw, optimizer_config: {adamw: {betas: [0.9, 0.9, 0.9]}}}",
    "config: seed beyond 32 bits": "--seed 4294967296",
    "config: batch is true": "{batch_size: true}",
    "config: updates is true": "{iters: true}",
    "config: a key twice": "iters: 2\niters: 3\n",
    "config: an alias": "a: &x [1]\nb: *x\n",
    "config: a python tag": "model: !!python/object/apply:os.system ['true']\n",
    "config: 2 MB of YAML": b"# " + b"x" * 2_000_000,
    "config: not UTF-8": b"model: caf\xe9\n",
    "config: a NUL byte in YAML": b"model: m\x00\n",
    "config: nested 1000 deep": "a: " + "[" * 1000,
    "config: a number of 5,000 digits in YAML": "iters: " + "7" * 5000,
    "config: config is a folder": "-c .",
    "command: unknown command": "trian",
    "command: option without value": "--adapter-path",
    **dict.fromkeys(
        (
            "data: a folder without train.jsonl", "data: only blank lines", "data: a JSON array over lines",
            "data: a line with a list", "data: prompt without completion", "data: messages are texts",
            "data: messages without assistant", "data: role near a real one", "data: UTF-16", "data: NUL bytes",
            "data: half a surrogate pair", "data: JSON 10,000 deep", "data: a line of 50 MB",
            "data: a number of 5,000 digits", "data: NaN in place of a row", "data: tools are text",
            "data: valid.jsonl broken", "data: a template that is not Jinja", "data: a template that writes a flood",
            "data: a template that doubles forever", "data: a template that says no", "model: an empty model folder",
            "model: config.json is a list", "model: config.json 10,000 deep", "model: no model_type",
            "model: auto_map in the folder", "model: more layers than weights", "model: hidden_size of text",
            "model: hidden_size 0", "model: no attention heads", "model: a vocabulary of -1", "model: tensor too many",
            "model: infinity in a weight", "model: weights are random bytes", "model: weights with an absurd shape",
            "model: weights as pickle", "model: shard missing", "model: tokenizer.json broken",
            "model: quantized to 7 bits", "model: quantized in groups of 0",
        ), ""
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What a command did: exit code (None: a hang), lines and words on stderr, processor seconds, new files."""

    code: int | None
    error: str
    cpu_s: float
    new: list[str]
    nan: bool  # whether it told of a loss of NaN

    @property
    def kind(self) -> str:
        if self.code is None:
            return "hang"
        if self.code < 0:
            return f"killed by signal {-self.code}"
        if "Traceback" in self.error:
            return "traceback"
        if self.code:
            return "error"
        return "accepted, loss NaN" if self.nan else "accepted"


# Runs `python -m mlx_lm ARGUMENTS` again and again, each in a fork of a process that has imported it and no more.
SERVER = """
import json, os, resource, runpy, sys
import mlx_lm.lora
for line in sys.stdin:
    task = json.loads(line)
    child = os.fork()
    if child == 0:
        os.chdir(task["folder"])
        for stream, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(task["told"] + name, os.O_CREAT | os.O_WRONLY), stream)
        for limit, value in task["limits"]:
            resource.setrlimit(limit, (value, value))
        sys.argv = ["mlx_lm", *task["arguments"]]
        runpy.run_module("mlx_lm", run_name="__main__")
        break
    _, status, used = os.wait4(child, 0)
    print(json.dumps([os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime]), flush=True)
"""


def ours(arguments: list[str], *, folder: Path) -> Outcome:
    """Return what our command line did in a folder."""
    before, used = files_in(folder), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "mlxlora", *arguments], cwd=folder, env=environment(), stdin=subprocess.DEVNULL,
        capture_output=True, text=True, errors="replace", check=False, preexec_fn=bound,
    )  # fmt: skip
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = spent.ru_utime + spent.ru_stime - used.ru_utime - used.ru_stime
    return outcome(done.returncode, done.stdout, done.stderr, cpu_s=cpu, before=before, folder=folder)


def theirs(server: Any, arguments: list[str], *, folder: Path) -> Outcome:
    """Return what mlx-lm's command line did in a folder; its processor time does not hold its imports."""
    before = files_in(folder)
    with tempfile.TemporaryDirectory() as told:
        task = {"arguments": arguments, "folder": str(folder), "told": f"{told}/", "limits": LIMITS}
        server.stdin.write(json.dumps(task) + "\n")
        server.stdin.flush()
        code, cpu = json.loads(server.stdout.readline())
        out, error = ((Path(told) / name).read_text(errors="replace") for name in ("stdout", "stderr"))
    return outcome(code, out, error, cpu_s=cpu, before=before, folder=folder)


def outcome(code: int, out: str, error: str, *, cpu_s: float, before: set[str], folder: Path) -> Outcome:
    """Return an outcome, texts without this machine's folders; who used up his time hangs."""
    hangs = code in (-signal.SIGXCPU, -signal.SIGKILL) and cpu_s > HANG_S - 1
    told = error.replace(str(folder), ".").replace(str(folder.parent), ".")
    new = sorted(files_in(folder) - before)
    return Outcome(None if hangs else code, told, round(cpu_s, 2), new, " nan" in out)


def environment() -> dict[str, str]:
    """Return the environment of both: no network, no cache of the user's."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "MLXLORA_CACHE": tempfile.gettempdir()}


def bound() -> None:
    """Limit the processor time and the memory of the process that is about to start."""
    for limit, value in LIMITS:
        resource.setrlimit(limit, (value, value))


def prepare(name: str, world: World) -> list[str]:
    """Make a case's folders; return our arguments."""
    if name in CASES:
        world.backend = "mlx" if CASES[name].both else "torch"
        return CASES[name].make(world)
    if name in OTHER:
        return world.train(data=world.data(*OTHER[name]))
    world.data(*ROWS, name="valid.jsonl")
    return world.train()


def their_arguments(world: World, spoilt: str | bytes) -> list[str]:
    """Return mlx-lm's arguments for the folders of a case, with the same mistake."""
    stated: dict[str, Any] = {"model": str(world.base), "data": {"path": str(world.folder / "data")}}
    try:
        found = yaml.safe_load((world.folder / "config.yaml").read_text())
        stated |= {key: value for key, value in found.items() if key in stated and Path(str(value)).is_absolute()}
        stated["data"] = found["data"] if Path(found["data"]["path"]).is_absolute() else stated["data"]
    except (OSError, ValueError, yaml.YAMLError, RecursionError, AttributeError, TypeError, KeyError):
        world.config()  # the mistake was in the file: whole model and rows
    data = Path(stated["data"]["path"])
    if data.is_dir() and not (data / "valid.jsonl").is_file():
        (data / "valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    if spoilt == "trian":
        return ["trian"]
    usual = "--train --batch-size 2 --num-layers 2 --iters 2 --adapter-path run"
    usual += f" --model {stated['model']} --data {data}"
    if isinstance(spoilt, str) and re.match(r"--?\w|$", spoilt):
        return ["lora", *usual.split(), *spoilt.split()]
    (world.folder / "theirs.yaml").write_bytes(spoilt.encode() if isinstance(spoilt, str) else spoilt)
    keys = ("--iters", "--batch-size", "--learning-rate")
    words = usual.split()
    for key in keys:  # an option would hide what the file says
        if key in words and key[2:].replace("-", "_").encode() in (world.folder / "theirs.yaml").read_bytes()[:200]:
            at = words.index(key)
            del words[at : at + 2]
    return ["lora", *words, "-c", "theirs.yaml"]


def judge(name: str, found: Outcome) -> str:
    """Return what our answer lacks of the contract, or nothing."""
    if name not in CASES:
        return "" if found.code == 0 else f"exit code {found.code}"
    case = CASES[name]
    try:
        check_message(case, found.code if found.code is not None else -1, found.error)
    except AssertionError as error:
        return f"message: {str(error)[:200]}"
    if case.quick and found.cpu_s > QUICK_S:
        return f"{found.cpu_s} s"
    left = set(found.new) - {"run/.lock"}
    return f"left behind: {sorted(left)[:3]}" if left and not case.started else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--ours-only", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = []
    server = None
    if not options.ours_only:
        server = subprocess.Popen(
            [sys.executable, "-c", SERVER], env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    with tempfile.TemporaryDirectory() as made:
        base, smaller = [
            save_model(Path(made) / f"base-{n}", family="llama", tied=False, dtype="float32", seed=0, layers=n)
            for n in (2, 1)
        ]
        for group, name, spoilt in [
            *(("measured", *item) for item in MEASURED.items()), *(("more", *item) for item in MORE.items()),
        ]:  # fmt: skip
            if options.only not in name:
                continue
            with tempfile.TemporaryDirectory() as place:
                world = World(Path(place), base, smaller, "torch")
                mine = ours(prepare(name, world), folder=world.folder)
                other = theirs(server, their_arguments(world, spoilt), folder=world.folder) if server else None
            rows.append(row_of(group, name, mine, other))
            print(line_of(rows[-1]), flush=True)
    summary = summarize(rows)
    print(json.dumps(summary, indent=1))
    write(options.output, {**heading(["mlx"]), "summary": summary, "cases": rows})
    sys.exit(1 if any(row["fault"] for row in rows) else 0)


def row_of(group: str, name: str, mine: Outcome, other: Outcome | None) -> dict[str, Any]:
    """Return one row of the result; texts without this machine's folders."""
    last = [] if other is None else [line for line in other.error.splitlines() if line.strip()][-1:]
    return {
        "group": group, "case": name, "exit_code": mine.code, "kind": mine.kind, "lines": len(mine.error.splitlines()),
        "cpu_s": mine.cpu_s, "fault": judge(name, mine), "says": mine.error.splitlines()[-3:][0] if mine.error else "",
        "mlx_lm": None if other is None else {
            "kind": other.kind, "exit_code": other.code, "cpu_s": other.cpu_s, "last_line": "".join(last)[:160],
            "wrote": len(other.new),
        },
    }  # fmt: skip


def line_of(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    theirs = row["mlx_lm"]
    told = "" if theirs is None else f"{theirs['kind']} | {theirs['cpu_s']:.1f}"
    ours = f"{row['exit_code']} | {row['lines']} | {row['cpu_s']:.1f} | {row['fault'] or 'ok'}"
    return f"| {row['case']} | {ours} | {told} |"


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the counts per kind, for the measured rows and for the others."""
    result: dict[str, Any] = {}
    for group in ("measured", "more"):
        some = [row for row in rows if row["group"] == group]
        kinds = [row["mlx_lm"]["kind"] for row in some if row["mlx_lm"]]
        result[group] = {
            "cases": len(some), "ours_as_promised": sum(not row["fault"] for row in some),
            "ours_tracebacks": sum(row["kind"] == "traceback" for row in some),
            "mlx_lm": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
        }  # fmt: skip
    return result


if __name__ == "__main__":
    main()
