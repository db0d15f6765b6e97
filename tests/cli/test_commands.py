"""The commands do what they say, and their numbers are those of transformers and mlx-lm."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mlxlora.cli.main import run

ROOT = Path(__file__).resolve().parents[2]
BACKENDS = ("torch", "mlx")
ROWS = [{"prompt": f"{n} and {n}? ", "completion": f"{2 * n} hello"} for n in range(9)]
VALID = [{"prompt": "hello? ", "completion": "hello"}, {"text": "hello world"}]
TRAIN_ROW = {
    "step", "loss", "lr", "grad_norm", "tokens", "supervised_tokens", "padding_share", "tokens_per_s",
    "peak_memory_bytes", "time_s",
}  # fmt: skip
PROMPT = "hello? hello wor"


@dataclass(frozen=True)
class Trained:
    """A finished run: its folder, what it was started with, and what it printed."""

    folder: Path
    arguments: list[str]
    data: Path
    out: str
    error: str


def write_rows(file: Path, rows: list[Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def answer_of(out: str) -> dict[str, Any]:
    """Return the object in the last line of stdout."""
    return json.loads(out.rstrip("\n").splitlines()[-1])


def call(capsys: pytest.CaptureFixture[str], *arguments: Any, code: int = 0) -> str:
    """Return what a command printed on stdout."""
    capsys.readouterr()
    found = run([str(argument) for argument in arguments])
    out, error = capsys.readouterr()
    assert found == code, error
    return out


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def digests(folder: Path) -> dict[str, str]:
    """Return the hash of every file below a folder."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def weights(folder: Path) -> dict[str, str]:
    """Return the hashes of a run's adapter; its card names the run folder, so it is left out."""
    return {name: value for name, value in digests(folder / "adapter").items() if name != "README.md"}


def command(*arguments: str, cwd: Path = ROOT, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the real command in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "mlxlora", *arguments],
        cwd=cwd, env=environment, capture_output=True, text=True, check=True, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tiny_model_folder, tmp_path_factory):
    """Return a factory of finished runs, one per backend, made by the real command."""
    made: dict[str, Trained] = {}

    def make(backend: str) -> Trained:
        if backend not in made:
            root = tmp_path_factory.mktemp(f"trained-{backend}")
            write_rows(root / "data" / "train.jsonl", ROWS)
            write_rows(root / "data" / "valid.jsonl", VALID)
            config = {
                "model": str(tiny_model_folder()),
                "data": {"path": str(root / "data")},
                "adapter": {"dropout": 0.1},
                "optimizer": {"lr": 1e-2},
                "train": {"batch_size": 4, "updates": 6, "dtype": "float32"},
                "evaluation": {"every": 3}, "checkpoint": {"every": 2, "keep": 2}, "log": {"every": 2},
                "backend": backend, "output": str(root / "run"),
            }  # fmt: skip
            (root / "run.yaml").write_text(yaml.safe_dump(config))
            arguments = ["train", str(root / "run.yaml"), "--json"]
            done = command(*arguments, cwd=root)
            made[backend] = Trained(root / "run", arguments, root / "data", done.stdout, done.stderr)
        return made[backend]

    return make


# start-up


def cpu_seconds(*arguments: str) -> float:
    """Return the CPU seconds (user and system) of a run of Python: other programs change them little."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, check=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("word", ["--help", "--version"])
def test_help_takes_less_than_a_fifth_of_a_second(word):
    took = [cpu_seconds("-m", "mlxlora", word) for _ in range(5)]
    assert statistics.median(took) < 0.2


@pytest.mark.parametrize(
    "words",
    [[], ["--help"], ["train", "--help"], ["generate", "--help"], ["chat", "--help"], ["version"], ["--version"]],
)
def test_no_framework_is_loaded_to_say_what_there_is(words):
    code = (
        "import sys, mlxlora\nfrom mlxlora.cli.main import run\n"
        f"words = {words}\nif words: run(words)\n"
        "heavy = {'torch', 'mlx', 'mlx_lm', 'transformers', 'tokenizers', 'accelerate', 'huggingface_hub', 'numpy',\n"
        "    'safetensors', 'jinja2', 'yaml', 'psutil', 'rich'}\n"
        "print(sorted(heavy & {name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("[]")
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("after_s", "words"), [(0.1, ["doctor"]), (1.0, ["doctor", "--json"])], ids=["loading", "running"]
)
def test_ctrl_c_while_a_command_starts_is_one_line_and_130(after_s, words):
    code = (
        "import signal, sys, threading\nfrom mlxlora.cli.start import main\n"
        f"sys.argv = ['mlxlora', *{words}]\n"
        f"threading.Timer({after_s}, signal.raise_signal, [signal.SIGINT]).start()\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "stopped\n")
    assert not done.stdout or json.loads(done.stdout)["exit_code"] == 130


def test_every_command_is_listed_and_explains_itself(capsys):
    listed = call(capsys, "--help")
    for name in (
        "train",
        "estimate",
        "evaluate",
        "generate",
        "chat",
        "parity",
        "doctor",
        "quickstart",
        "schema",
        "version",
    ):
        assert re.search(rf"^\s+{name}\s+\w", listed, re.MULTILINE)
        assert "--json" in call(capsys, name, "--help")


# train


@pytest.mark.parametrize("backend", BACKENDS)
def test_train_writes_the_run_folder_of_the_contract(backend, trained):
    folder = trained(backend).folder
    found = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    checkpoint = ("adapter.safetensors", "optimizer.safetensors", "state.json", "manifest.json", "COMMITTED")
    assert {f"checkpoints/step-{step:06d}/{name}" for step in (4, 6) for name in checkpoint} <= found
    adapter = ("adapter_config.json", "adapter_model.safetensors", "adapters.safetensors", "README.md")
    assert {f"adapter/{name}" for name in adapter} <= found
    assert {"config.yaml", "manifest.json", "metrics.jsonl"} <= found
    allowed = {"report.html", ".lock"}
    rest = {name for name in found if not name.startswith(("checkpoints/", "adapter/"))}
    assert rest <= {"config.yaml", "manifest.json", "metrics.jsonl"} | allowed
    assert not [name for name in found if "tmp" in name or "trash" in name]


@pytest.mark.parametrize("backend", BACKENDS)
def test_metrics_rows_have_exactly_the_keys_of_the_contract(backend, trained):
    rows = metrics(trained(backend).folder)
    steps = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "eval_loss" in row]
    assert [row["step"] for row in steps] == [2, 4, 6]
    assert [row["step"] for row in evaluations] == [0, 3, 6]
    assert all(set(row) == TRAIN_ROW for row in steps)
    assert all(set(row) == {"step", "eval_loss"} for row in evaluations)
    assert all(np.isfinite(value) for row in rows for value in row.values())
    assert all(0 <= row["padding_share"] < 1 and row["supervised_tokens"] < row["tokens"] for row in steps)
    assert steps == sorted(steps, key=lambda row: row["time_s"])
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_manifest_says_what_ran_on_what(backend, trained):
    run_ = trained(backend)
    manifest = json.loads((run_.folder / "manifest.json").read_text())
    assert manifest["backend"] == backend
    assert manifest["command"][1:] == run_.arguments
    rows = hashlib.sha256((run_.data / "train.jsonl").read_bytes()).hexdigest()
    assert manifest["data_sha256"]["train.jsonl"] == rows
    assert set(manifest["data_sha256"]) == {"train.jsonl", "valid.jsonl"}
    assert set(manifest["base_sha256"]) == {"model.safetensors", "config.json"}
    assert manifest["seeds"] == {"train": 0}
    assert {"python", backend} <= set(manifest["versions"])


def test_train_prints_one_object_on_stdout_and_plain_lines_on_stderr(trained):
    run_ = trained("torch")
    answer = answer_of(run_.out)
    assert answer["ok"] is True
    assert answer["updates"] == 6
    assert answer["adapter"] == str(run_.folder / "adapter")
    assert answer["loss"] == [row["loss"] for row in metrics(run_.folder) if "loss" in row][-1]
    assert answer["already_complete"] is False
    assert len(run_.out.splitlines()) == 1
    assert "\x1b" not in run_.error
    assert "\r" not in run_.error
    lines = run_.error.splitlines()
    assert lines[0].startswith("note: micro-batches of 1024 tokens, recompute off: ")
    assert lines[1].startswith("note: rows of another kind than the first (1 prompt, 1 text): 1 of 2 rows")
    assert re.match(r"llama on torch \(.*\): LoRA on 14 modules, .* 9 rows, .* 6 updates", lines[2])
    assert sum(bool(re.match(r"update \d/6  loss \d+\.\d+  lr ", line)) for line in lines) == 3
    assert sum(bool(re.match(r"update \d  validation loss", line)) for line in lines) == 3
    assert lines[-1] == "done"


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_command_again_says_it_is_complete_and_changes_nothing(backend, trained, capsys):
    run_ = trained(backend)
    before = digests(run_.folder)
    answer = answer_of(call(capsys, *run_.arguments))
    after = digests(run_.folder)
    assert (answer["already_complete"], answer["updates"]) == (True, 6)
    told = {"manifest.json", "report.html", ".lock"}  # they say when and by whom the folder was last written
    assert {name: value for name, value in before.items() if name not in told} == {
        name: value for name, value in after.items() if name not in told
    }
    out = call(capsys, *run_.arguments[:-1])
    assert "was complete already: 6 updates" in out
    assert "next: mlxlora generate" in out


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_file_the_written_config_repeats_the_run_bit_for_bit(backend, tiny_model_folder, tmp_path, capsys):
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    first, second = tmp_path / "first", tmp_path / "second"
    short = ["--set", "train.updates=3", "--set", "train.batch_size=4", "--set", "log.every=1"]
    call(
        capsys, "train", "--model", tiny_model_folder(), "--data", data, *short, "--set", "adapter.dropout=0.2",
        "--backend", backend, "--output", first,
    )  # fmt: skip
    call(capsys, "train", first / "config.yaml", "--output", second)
    assert weights(first) == weights(second)
    ours, theirs = (yaml.safe_load((folder / "config.yaml").read_text()) for folder in (first, second))
    assert {**ours, "output": None} == {**theirs, "output": None}
    assert ours["train"]["dtype"] == "bfloat16", "every default is written down"
    timed = ("tokens_per_s", "time_s", "peak_memory_bytes")
    kept = [[{k: v for k, v in row.items() if k not in timed} for row in metrics(folder)] for folder in (first, second)]
    assert kept[0] == kept[1]


def test_what_the_command_line_says_wins_over_the_file(trained, tmp_path, capsys):
    file = trained("torch").folder / "config.yaml"
    call(
        capsys, "train", file, "--set", "train.epochs=1", "--set", "train.seed=7", "--set", "optimizer.lr=2e-3",
        "--set", "train.seed=8", "--backend", "mlx", "--output", tmp_path / "other",
    )  # fmt: skip
    resolved = yaml.safe_load((tmp_path / "other" / "config.yaml").read_text())
    assert (resolved["train"]["seed"], resolved["optimizer"]["lr"]) == (8, 2e-3)
    assert (resolved["train"]["epochs"], resolved["train"]["updates"]) == (1, None)
    assert resolved["backend"] == "mlx"
    assert json.loads((tmp_path / "other" / "manifest.json").read_text())["backend"] == "mlx"
    assert metrics(tmp_path / "other")[-1]["step"] == 3  # one pass over nine rows, four at a time


def test_resume_never_starts_anew_and_resume_from_a_checkpoint_goes_on(trained, tmp_path, capsys):
    run_, output = trained("torch"), tmp_path / "run"
    whole = weights(run_.folder)
    given = ["train", run_.folder / "config.yaml", "--output", output, "--json"]
    step4 = run_.folder / "checkpoints" / "step-000004"
    assert answer_of(call(capsys, *given, "--resume", step4))["already_complete"] is False
    assert weights(output) == whole
    assert [row["step"] for row in metrics(output) if "loss" in row] == [6]
    assert answer_of(call(capsys, *given, "--resume", "never"))["already_complete"] is False
    assert weights(output) == whole
    assert [row["step"] for row in metrics(output) if "loss" in row] == [2, 4, 6]


# evaluate and generate, against the libraries


@pytest.fixture(scope="module")
def reference(tiny_model_folder):
    """Return the tiny model and its tokenizer as transformers loads them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(tiny_model_folder())
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def loss_by_hand(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> tuple[float, int]:
    """Return nats per supervised token of prompt rows, and how many tokens that are, in float64."""
    import torch

    total, count = 0.0, 0
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = [*tokenizer(row["prompt"] + row["completion"])["input_ids"], tokenizer.eos_token_id]
        assert ids[: len(prompt)] == prompt
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double()
        log_probs = torch.log_softmax(logits, dim=-1)
        for place in range(len(prompt), len(ids)):
            total -= float(log_probs[place - 1, ids[place]])
            count += 1
    return total / count, count


def test_evaluate_reads_columns_of_other_names(tiny_model_folder, tmp_path, capsys):
    (tmp_path / "a.csv").write_text("question,answer\nq,hello\n")
    (tmp_path / "b.csv").write_text("prompt,completion\nq,hello\n")
    asked = ["evaluate", tiny_model_folder(), "--backend", "mlx", "--json"]
    columns = ["--set", "data.columns={prompt: question, completion: answer}"]
    found = answer_of(call(capsys, *asked, "--data", tmp_path / "a.csv", *columns))
    assert found["loss"] == answer_of(call(capsys, *asked, "--data", tmp_path / "b.csv"))["loss"]


@pytest.mark.parametrize("command", ["preview", "estimate"])
def test_a_command_takes_model_and_data_in_place_of_a_config(tiny_model_folder, write_jsonl, tmp_path, capsys, command):
    folder, file = tiny_model_folder(), write_jsonl({"text": "hello"})
    (tmp_path / "run.yaml").write_text(json.dumps({"model": str(folder), "data": {"path": str(file)}}))
    options = answer_of(call(capsys, command, "--model", folder, "--data", file, "--json"))
    assert options == answer_of(call(capsys, command, tmp_path / "run.yaml", "--json"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_evaluate_gives_the_loss_that_transformers_logits_give(backend, trained, tiny_model_folder, reference, capsys):
    wanted, count = loss_by_hand(*reference, ROWS)
    data = trained(backend).data
    options = ["--data", data, "--split", "train", "--backend", backend]
    answer = answer_of(call(capsys, "evaluate", tiny_model_folder(), *options, "--json"))
    assert answer["loss"] == pytest.approx(wanted, rel=1e-6)
    assert answer["perplexity"] == pytest.approx(np.exp(wanted), rel=1e-5)
    assert (answer["supervised_tokens"], answer["rows"], answer["file"]) == (count, len(ROWS), "train.jsonl")
    assert (answer["ok"], answer["backend"]) == (True, backend)
    text = call(capsys, "evaluate", tiny_model_folder(), *options)
    assert f"train.jsonl: loss {wanted:.4f} nats/token" in text


@pytest.mark.parametrize("backend", BACKENDS)
def test_evaluate_with_the_adapter_gives_the_loss_the_run_ended_with(backend, trained, tiny_model_folder, capsys):
    run_ = trained(backend)
    answer = answer_of(
        call(
            capsys, "evaluate", tiny_model_folder(), "--adapter", run_.folder / "adapter", "--data", run_.data,
            "--backend", backend, "--json",
        )
    )  # fmt: skip
    assert answer["file"] == "valid.jsonl"
    assert answer["loss"] == pytest.approx(metrics(run_.folder)[-1]["eval_loss"], rel=1e-6)


def test_evaluate_gives_transformers_loss_with_the_adapter_in_peft(trained, tiny_model_folder, capsys):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, run_ = str(tiny_model_folder()), trained("mlx")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(run_.folder / "adapter")).eval()
    wanted, _ = loss_by_hand(model, AutoTokenizer.from_pretrained(folder), ROWS)
    found = call(
        capsys, "evaluate", folder, "--adapter", run_.folder / "adapter", "--data", run_.data / "train.jsonl",
        "--backend", "torch", "--json",
    )  # fmt: skip
    assert answer_of(found)["loss"] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_generate_is_what_transformers_and_mlx_lm_generate(backend, tiny_model_folder, reference, capsys):
    import torch
    from mlx_lm import load, stream_generate

    model, tokenizer = reference
    ids = tokenizer(PROMPT)["input_ids"]
    with torch.no_grad():
        wanted = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, len(ids) :].tolist()
    theirs, their_tokenizer = load(str(tiny_model_folder()))[:2]
    mlx_lm = [part.token for part in stream_generate(theirs, their_tokenizer, ids, max_tokens=24)]
    options = ["--prompt", PROMPT, "--max-tokens", 24, "--backend", backend]
    answer = answer_of(call(capsys, "generate", tiny_model_folder(), *options, "--json"))
    assert answer["tokens"] == wanted == mlx_lm
    assert answer["text"] == tokenizer.decode(wanted, skip_special_tokens=True)
    assert (answer["prompt_tokens"], answer["stopped"], answer["backend"]) == (len(ids), False, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_streamed_text_is_the_text(backend, trained, tiny_model_folder, capsys):
    asked = [
        "generate", tiny_model_folder(), "--prompt", PROMPT, "--max-tokens", 40, "--backend", backend,
        "--adapter", trained(backend).folder / "adapter", "--temperature", 1.0,
    ]  # fmt: skip
    whole = call(capsys, *asked)
    assert call(capsys, *asked, "--stream") == whole
    assert len(whole) > 20


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_seed_repeats_a_sample_and_another_gives_another(backend, tiny_model_folder, capsys):
    asked = ["generate", tiny_model_folder(), "--prompt", PROMPT, "--max-tokens", 12, "--backend", backend, "--json"]

    def tokens(*options: Any) -> list[int]:
        return answer_of(call(capsys, *asked, *options))["tokens"]

    once = tokens("--temperature", 1.0, "--seed", 3)
    assert tokens("--temperature", 1.0, "--seed", 3) == once
    assert tokens("--temperature", 1.0, "--seed", 4) != once
    assert tokens("--seed", 3) == tokens("--seed", 4), "greedy needs no seed"


# the others


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_parity_is_within_tolerance_and_says_so(family, tiny_model_folder, tmp_path, capsys):
    data = write_rows(tmp_path / "train.jsonl", ROWS)
    config = {
        "model": str(tiny_model_folder(family, tied=True)),
        "data": {"path": str(data)},
        "adapter": {"dropout": 0.1},
        "train": {"batch_size": 4, "updates": 8, "dtype": "float32"},
        "output": str(tmp_path / "run"),
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    answer = answer_of(call(capsys, "parity", tmp_path / "run.yaml", "--updates", 4, "--json"))
    assert answer["ok"] is True
    assert {gap["quantity"] for gap in answer["gaps"]} >= {"first loss", "gradients", "loss curve", "final adapter"}
    assert [len(curve) for curve in answer["curves"]] == [4, 4]
    assert not (tmp_path / "run").exists(), "parity writes nothing"
    if family == "llama":
        text = call(capsys, "parity", tmp_path / "run.yaml", "--updates", 2, "--set", "train.seed=1")
        assert text.rstrip().endswith("within tolerance")
        assert "FAIL" not in text


def test_doctor_tries_every_backend_and_gives_one_object(capsys):
    capsys.readouterr()
    code = run(["doctor", "--json"])
    answer = answer_of(capsys.readouterr().out)
    checks = {check["name"]: check for check in answer["checks"]}
    assert {"machine", "system", "disk", "mlx", "torch", "mlx step", "torch step"} <= set(checks)
    for name in BACKENDS:
        assert "trains affine-{2,3,4,5,6,8}bit-g{32,64,128}, " in checks[f"{name} quantization"]["found"]
    assert {check["status"] for check in checks.values()} <= {"PASS", "FAIL", "INFO"}
    assert all(check["fix"] for check in checks.values() if check["status"] == "FAIL")
    usable = any(checks[f"{name} step"]["status"] == "PASS" for name in BACKENDS)
    assert (answer["ok"], code) == (usable, 0 if usable else 4)


def test_schema_describes_the_config_file(capsys):
    found = answer_of(call(capsys, "schema", "--json"))
    assert found == json.loads(call(capsys, "schema"))
    keys = found["properties"]
    assert set(found["required"]) == {"model", "data"}
    assert found["additionalProperties"] is False
    train, adapter = (found["$defs"][name]["properties"] for name in ("TrainConfig", "AdapterConfig"))
    assert (train["batch_size"]["minimum"], train["batch_size"]["default"]) == (1, 16)
    assert train["seed"]["minimum"] == 0
    assert set(train["dtype"]["enum"]) == {"float32", "bfloat16", "float16"}
    assert adapter["dropout"]["exclusiveMaximum"] == 1
    assert set(keys["backend"]["enum"]) == {"auto", "mlx", "torch"}
    assert all("description" in found["$defs"]["DataConfig"]["properties"][key] for key in ("path", "max_length"))
    assert all(section["additionalProperties"] is False for section in found["$defs"].values())


@pytest.mark.parametrize("key", ["data.path", "model"])
def test_a_path_that_lies_only_beside_the_recipe_is_told(key, tiny_model_folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "recipes/mine/x").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    values = {"model": str(tiny_model_folder()), "data": {"path": "mine/x"}}
    if key == "model":
        (tmp_path / "train.jsonl").write_text('{"text": "a"}')
        values = {"model": "mine/x", "data": {"path": str(tmp_path)}}
    file = tmp_path / "recipes/run.yaml"
    file.write_text(json.dumps(values))
    assert run(["train", str(file)]) == (3 if key == "model" else 2)
    said = " ".join(capsys.readouterr().err.splitlines()[-1:])
    assert said.startswith(f"fix: mine/x is beside run.yaml, but paths go from {tmp_path}/elsewhere: cd ")
    assert said.endswith(f"--set {key}={tmp_path}/recipes/mine/x")
    assert run(["train", str(file), "--set", f"{key}=mine/y"]) in (2, 3)
    assert "beside" not in capsys.readouterr().err


def test_explain_tells_cause_and_remedy_of_every_code(capsys):
    listed = call(capsys, "explain").splitlines()
    found = answer_of(call(capsys, "explain", "--json"))["errors"]
    assert [line[:4] for line in listed] == list(found)
    for code, kind in found.items():
        text = call(capsys, "explain", code[1:])
        assert all(part in text for part in kind.values())
        assert len(text.splitlines()) == 3
    assert answer_of(call(capsys, "explain", "e304", "--json"))["exit_code"] == "3"
    assert run(["explain", "E302O"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == 'fix: did you mean "E302"?'


def test_version_is_that_of_the_package(capsys):
    import mlxlora

    for word in ("version", "--version"):
        assert call(capsys, word) == f"{mlxlora.__version__}\n"
        assert answer_of(call(capsys, word, "--json"))["version"] == mlxlora.__version__


@pytest.mark.parametrize("words", [["trian", "--json"], ["train", "no.yaml", "--json"], ["generate", "m", "--json"]])
def test_a_mistake_is_one_object_too(words, capsys):
    assert run(words) == 2
    answer = answer_of(capsys.readouterr().out)
    assert (answer["ok"], answer["exit_code"]) == (False, 2)
    assert answer["error"]


def test_python_gives_the_same_as_the_command_line(trained, tiny_model_folder, capsys):
    import mlxlora

    run_, folder = trained("torch"), tiny_model_folder()
    adapter = run_.folder / "adapter"
    asked = ["--adapter", adapter, "--backend", "torch", "--json"]
    shown = answer_of(call(capsys, "evaluate", folder, "--data", run_.data, *asked))
    assert mlxlora.evaluate(folder, data=run_.data, adapter=adapter, backend="torch").loss == shown["loss"]
    text = answer_of(call(capsys, "generate", folder, "--prompt", PROMPT, "--max-tokens", 9, *asked))["text"]
    assert mlxlora.generate(folder, PROMPT, adapter=adapter, max_tokens=9, backend="torch") == text


def test_python_takes_a_mapping_of_sections_and_says_what_is_no_config(trained, tiny_model_folder, tmp_path):
    import mlxlora

    data = str(trained("torch").data)
    given = {"model": str(tiny_model_folder()), "data": data, "train": {"updates": 2}, "output": str(tmp_path)}
    found = mlxlora.load_config(given, train={"epochs": 1}, overrides=["optimizer.lr=0.5"])
    assert (found.data.path, found.train.updates, found.train.epochs, found.optimizer.lr) == (data, None, 1, 0.5)
    assert mlxlora.load_config(found) is found
    assert mlxlora.load_config(found, output="other").output == "other"
    assert given["data"] == data
    small = {"batch_size": 2, "updates": 1, "dtype": "float32"}
    assert mlxlora.train(given, train=small, evaluation={"every": None}, backend="torch").updates == 1
    for wrong, words in ((5, "config is 5"), ({"modle": "m"}, 'did you mean "model"')):
        with pytest.raises(mlxlora.MlxloraError, match=words):
            mlxlora.train(wrong)


def test_python_shows_its_own_names_only():
    import mlxlora

    assert {"train", "MlxloraError"} <= set(dir(mlxlora))
    assert not {"Any", "Callable", "importlib", "Path"} & set(dir(mlxlora))
    with pytest.raises(AttributeError, match="nothing"):
        getattr(mlxlora, "nothing")  # noqa: B009
    code = "import sys, mlxlora; print('shared.errors' in sys.modules); mlxlora.MlxloraError"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "False\n"


@pytest.mark.parametrize("name", ["run", "run/adapter"])
def test_a_run_as_the_model_is_answered_with_the_right_command(trained, tiny_model_folder, capsys, name):
    run_ = trained("torch")
    place, adapter = run_.folder.parent / name, run_.folder / "adapter"
    for word, rest in (("generate", "--prompt 'a b'"), ("evaluate", "--data d"), ("chat", "--system be")):
        assert run([word, str(place), *shlex.split(rest)]) == 3
        wanted = f"fix: mlxlora {word} {tiny_model_folder()} --adapter {adapter} {rest}"
        assert capsys.readouterr().err.splitlines()[1] == wanted
    assert run(["generate", str(place), "--adapter", "x", "--prompt", "a"]) == 3
    assert f"mlxlora generate {tiny_model_folder()} --adapter x --prompt a" in capsys.readouterr().err
