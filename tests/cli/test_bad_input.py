"""Every mistake a user can make gets a short answer: what is wrong and where, and what to do. Nothing is left behind.

The rows are those that mlx-lm 0.32.2 was measured on (15 accepted silently, 39 tracebacks, 3 hangs), and more.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxlora.cli.main import run
from shared.tensors import load_file, save_file
from shared.types import Tensor

ROOT = Path(__file__).resolve().parents[2]
ROWS = [{"prompt": f"{n} + {n} = ", "completion": str(2 * n)} for n in range(6)]
SECONDS = 4.0  # of CPU time; the contract says 2, and with others at work each second of it takes longer
PACKED = "model.layers.0.mlp.up_proj"
SSTI = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
DOUBLING = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
ENDLESS = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"


@dataclass
class World:
    """A folder with a tiny model, data and a config, each spoilt as a case likes."""

    folder: Path
    base: Path
    smaller: Path  # a model of the same family with one layer
    backend: str

    @property
    def output(self) -> Path:
        return self.folder / "run"

    def model(self, **changes: Any) -> Path:
        """Return a copy of the model, keys of its config.json replaced; None removes one."""
        target = self.folder / "model"
        shutil.copytree(self.base, target, dirs_exist_ok=True)
        edit(target / "config.json", **changes)
        return target

    def weights(self, change: Callable[[dict[str, Tensor]], Any], **changes: Any) -> Path:
        """Return a copy of the model whose tensors a function has changed."""
        target = self.model(**changes)
        tensors = dict(load_file(target / "model.safetensors"))
        change(tensors)
        (target / "model.safetensors").unlink()
        save_file(target / "model.safetensors", tensors.items(), metadata={"format": "pt"})
        return target

    def data(self, *rows: Any, name: str = "train.jsonl", end: bytes = b"\n") -> Path:
        """Return a data folder; objects are dumped, text and bytes stand as they are."""
        target = self.folder / "data"
        target.mkdir(exist_ok=True)
        lines = [row if isinstance(row, bytes) else as_text(row).encode() for row in rows]
        (target / name).write_bytes(b"".join(line + end for line in lines))
        return target

    def config(self, more: str = "", **keys: Any) -> Path:
        """Return a config file: five lines with model, data, backend, output and train, and more behind them."""
        values = {
            "model": str(self.base),
            "data": f"{{path: {self.data(*ROWS) if 'data' not in keys else ''}}}",
            "backend": self.backend,
            "output": str(self.output),
            "train": "{batch_size: 2, updates: 2, dtype: float32}",
        }
        values.update({key: f"{{path: {value}}}" if isinstance(value, Path) and key == "data" else str(value)
                       for key, value in keys.items()})  # fmt: skip
        return self.text("".join(f"{key}: {value}\n" for key, value in values.items()) + more)

    def text(self, text: str | bytes) -> Path:
        """Return a config file with these very contents."""
        file = self.folder / "config.yaml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return file

    def train(self, more: str = "", **keys: Any) -> list[str]:
        """Return the arguments that train by `config`."""
        return ["train", str(self.config(more, **keys))]

    def rows(self, *rows: Any, **options: Any) -> list[str]:
        """Return the arguments that train on these rows."""
        return self.train(data=self.data(*rows, **options))

    def ask(self, *options: str, model: Path | None = None) -> list[str]:
        """Return the arguments that generate a few tokens."""
        return [
            "generate", str(model or self.base), "--prompt", "hello", "--max-tokens", "3", "--backend", self.backend,
            *options,
        ]  # fmt: skip

    def score(self, *options: str, data: Path | None = None) -> list[str]:
        """Return the arguments that evaluate the base."""
        where = str(data or self.data(*ROWS))
        return ["evaluate", str(self.base), "--data", where, "--backend", self.backend, *options]

    def trained(self) -> Path:
        """Return the adapter folder of a run of two updates, made for real."""
        assert run(self.train("checkpoint: {every: 1}\n")) == 0
        return self.output / "adapter"

    def peft(self, **changes: Any) -> Path:
        """Return an adapter folder with PEFT's files only, keys of its config replaced."""
        target = self.folder / "foreign"
        shutil.copytree(self.trained(), target)
        (target / "adapters.safetensors").unlink()
        edit(target / "adapter_config.json", **changes)
        return target

    def adapter_tensors(self, change: Callable[[dict[str, Tensor]], Any], **changes: Any) -> Path:
        """Return PEFT's adapter with changed tensors; it has no notes of ours, which would tell of a change."""
        target = self.peft(**{"mlxlora": None, **changes})
        file = target / "adapter_model.safetensors"
        tensors = dict(load_file(file))
        change(tensors)
        file.unlink()
        save_file(file, tensors.items(), metadata={"format": "pt"})
        return target


def as_text(row: Any) -> str:
    return row if isinstance(row, str) else json.dumps(row)


def edit(file: Path, **changes: Any) -> None:
    """Replace keys of a JSON file; None removes one."""
    values = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def filled(*shape: int, value: float = 0.0) -> Tensor:
    return Tensor("F32", np.full(shape, value, dtype=np.float32))


def spoil(tensors: dict[str, Tensor], name: str, value: float) -> None:
    """Put one bad number into a tensor."""
    data = np.array(tensors[name].data)
    data.flat[3] = value
    tensors[name] = Tensor("F32", data)


def chat(*messages: Any) -> dict[str, Any]:
    """Return a row of (role, content) pairs."""
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


TALK = chat(("user", "hello"), ("assistant", "hello world"))


# What takes more than one line to spoil.


def with_template(w: World, template: str | None) -> list[str]:
    model = w.model()
    (model / "chat_template.jinja").unlink(missing_ok=True)
    edit(model / "tokenizer_config.json", chat_template=template)
    return w.train(model=model, data=w.data(TALK))


def without_tokenizer(w: World) -> list[str]:
    model = w.model()
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (model / name).unlink(missing_ok=True)
    return w.train(model=model)


def with_file(w: World, name: str, content: bytes) -> list[str]:
    model = w.model()
    (model / name).write_bytes(content)
    return w.train(model=model)


def cut_short(w: World) -> list[str]:
    file = w.model() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return w.train(model=file.parent)


def huge_shape(w: World) -> list[str]:
    header = json.dumps({"model.norm.weight": {"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 8]}})
    return with_file(w, "model.safetensors", struct.pack("<Q", len(header)) + header.encode() + bytes(8))


def pickled_model(w: World) -> list[str]:
    model = w.model()
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    return w.train(model=model)


def with_index(w: World, weight_map: Any) -> list[str]:
    return with_file(w, "model.safetensors.index.json", json.dumps({"weight_map": weight_map}).encode())


def quantized(w: World, *, bits: int, group_size: int, drop: str = "", **entry: Any) -> list[str]:
    """Return the arguments that train on a folder with one layer stored in 4 bits, groups of 32, said to be others."""

    def pack(tensors: dict[str, Tensor]) -> None:
        rows, width = tensors[f"{PACKED}.weight"].shape
        tensors[f"{PACKED}.weight"] = Tensor("U32", np.zeros((rows, width // 8), dtype=np.uint32))
        tensors[f"{PACKED}.scales"] = tensors[f"{PACKED}.biases"] = filled(rows, width // 32, value=0.01)
        tensors.pop(f"{PACKED}.{drop}", None)

    model = w.weights(pack, quantization={"bits": bits, "group_size": group_size, **entry})
    return w.train(entry.pop("more", ""), model=model)


def full_on_quantized(w: World) -> list[str]:
    quantized(w, bits=4, group_size=32)
    return w.train("adapter: {type: none}\n", model=w.folder / "model")


def pickled_adapter(w: World) -> list[str]:
    adapter = w.peft()
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    return w.ask("--adapter", str(adapter))


def garbage_adapter(w: World) -> list[str]:
    adapter = w.peft()
    (adapter / "adapter_model.safetensors").write_bytes(os.urandom(200))
    return w.ask("--adapter", str(adapter))


def strange_adapter(w: World, **changes: Any) -> list[str]:
    return w.ask("--adapter", str(w.peft(**changes)))


def changed_adapter(w: World, change: Callable[[dict[str, Tensor]], Any], **changes: Any) -> list[str]:
    return w.ask("--adapter", str(w.adapter_tensors(change, **changes)))


def wider(tensors: dict[str, Tensor]) -> None:
    for name, tensor in list(tensors.items()):
        if name.endswith("lora_A.weight"):
            tensors[name] = filled(tensor.shape[0], tensor.shape[1] + 8)


def renamed(tensors: dict[str, Tensor]) -> None:
    for name in list(tensors):
        tensors[name.replace("layers.", "blocks.")] = tensors.pop(name)


def halved(tensors: dict[str, Tensor]) -> None:
    for name, tensor in list(tensors.items()):
        keep = tensor.data[:4] if "lora_A" in name else tensor.data[:, :4]
        tensors[name] = Tensor("F32", np.ascontiguousarray(keep))


def other_base(w: World) -> list[str]:
    return w.ask("--adapter", str(w.trained()), model=w.smaller)


def mlx_adapter_without_scale(w: World) -> list[str]:
    adapter = w.folder / "foreign"
    shutil.copytree(w.trained(), adapter)
    (adapter / "adapter_model.safetensors").unlink()
    edit(adapter / "adapter_config.json", lora_parameters={"rank": 8})
    return w.ask("--adapter", str(adapter))


def damaged_checkpoints(w: World, *, last_only: bool) -> list[str]:
    w.trained()
    folders = sorted((w.output / "checkpoints").iterdir())
    for folder in folders[-1:] if last_only else folders:
        (folder / "adapter.safetensors").write_bytes(b"nothing")
    shutil.rmtree(w.output / "adapter")
    return w.train("checkpoint: {every: 1}\n")


def climbing_checkpoint(w: World) -> list[str]:
    w.trained()
    last = sorted((w.output / "checkpoints").iterdir())[-1]
    (last / "manifest.json").write_text(json.dumps({"../../../etc/passwd": {"size": 1, "sha256": ""}}))
    shutil.rmtree(w.output / "adapter")
    return [*w.train("checkpoint: {every: 1}\n"), "--resume", str(last)]


def another_run(w: World) -> list[str]:
    w.trained()
    shutil.rmtree(w.output / "adapter")
    return w.train("checkpoint: {every: 1}\noptimizer: {lr: 0.5}\n")


def output_is_file(w: World, **keys: Any) -> list[str]:
    (w.folder / "taken").write_text("mine")
    return w.train(output=w.folder / "taken", **keys)


def output_is_mine(w: World) -> list[str]:
    (w.output / "model").mkdir(parents=True)
    (w.output / "model" / "precious").write_text("mine")
    return [*w.train(), "--resume", "never"]


def data_in_output(w: World) -> list[str]:
    w.output.mkdir()
    shutil.copy(w.data(*ROWS) / "train.jsonl", w.output / "metrics.jsonl")
    return w.train(data=f"{{path: {w.output / 'metrics.jsonl'}}}")


def output_below_file(w: World) -> list[str]:
    (w.folder / "taken").write_text("mine")
    return w.train(output=w.folder / "taken" / "run")


def no_bos(w: World) -> list[str]:
    edit(w.model() / "tokenizer.json", post_processor=None)
    return [*w.ask(model=w.folder / "model"), "--prompt", ""]


@dataclass(frozen=True)
class Case:
    """A mistake: how it is made, the exit code, and what the message must say (regular expressions)."""

    name: str
    make: Callable[[World], list[str]]
    code: int
    says: tuple[str, ...]
    quick: bool = True  # can be known without loading the model
    both: bool = False  # the answer comes from a backend, so each must give it
    started: bool = False  # training was under way: lines of its display stand before the error


def case(name: str, make: Callable[[World], list[str]], code: int, *says: str, **flags: bool) -> Case:
    return Case(name, make, code, says, **flags)


def section(text: str) -> Callable[[World], list[str]]:
    """Return a maker: the usual config with one section behind it, in line 6."""
    return lambda w: w.train(text + "\n")


def training(text: str) -> Callable[[World], list[str]]:
    """Return a maker: the usual config with another train section, in line 5."""
    return lambda w: w.train(train=text)


def content(text: str | bytes) -> Callable[[World], list[str]]:
    """Return a maker: a config file with these contents."""
    return lambda w: ["train", str(w.text(text))]


def lines(*rows: Any) -> Callable[[World], list[str]]:
    """Return a maker: train.jsonl with these lines."""
    return lambda w: w.rows(*rows)


def model(**changes: Any) -> Callable[[World], list[str]]:
    """Return a maker: config.json of the model with changed keys."""
    return lambda w: w.train(model=w.model(**changes))


def weights(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[World], list[str]]:
    """Return a maker: the model with changed tensors."""
    return lambda w: w.train(model=w.weights(change))


LOADED = {"quick": False, "both": True}
GOOD = ROWS[0]

CONFIG = [
    case("unknown key", section("optimizer: {learning_rat: 1}"), 2, r"config.yaml:6", "optimizer.learning_rat", "lr"),
    case("unknown section near a real one", section("optimiser: {lr: 1}"), 2, "config.yaml:6", 'mean "optimizer"'),
    case("lr is a word", section("optimizer: {lr: abc}"), 2, "config.yaml:6: optimizer.lr", "'abc'", "number"),
    case("lr is nan", section("optimizer: {lr: .nan}"), 2, "config.yaml:6: optimizer.lr", "nan", "expected"),
    case("lr is infinite", section("optimizer: {lr: .inf}"), 2, "config.yaml:6: optimizer.lr", "finite"),
    case("lr is negative", section("optimizer: {lr: -1}"), 2, "config.yaml:6: optimizer.lr", "above 0"),
    case("lr is true", section("optimizer: {lr: true}"), 2, "config.yaml:6: optimizer.lr, found true", "a number"),
    case("betas of switches", section("optimizer: {betas: [true, 0.9]}"), 2, "6: optimizer.betas.0, found true",
         "a number"),
    case("betas of one", section("optimizer: {betas: [0.9]}"), 2, "6: optimizer.betas is too short", "2 values"),
    case("lr is null", section("optimizer: {lr: null}"), 2, "config.yaml:6: optimizer.lr", "null", "number"),
    case("--set without a value", lambda w: [*w.train(), "--set", "optimizer.lr="], 2,
         "--set: optimizer.lr, found null"),
    case("betas of three", section("optimizer: {betas: [0.9, 0.9, 0.9]}"), 2, "config.yaml:6: optimizer.betas"),
    case("max_grad_norm 0", section("optimizer: {max_grad_norm: 0}"), 2, "config.yaml:6: optimizer.max_grad_norm"),
    case("optimizer misspelt", section("optimizer: {name: adamm}"), 2, "config.yaml:6: optimizer.name", "adamw"),
    case("schedule misspelt", section("schedule: {name: cosin}"), 2, "config.yaml:6: schedule.name", "cosine"),
    case("rank 0", section("adapter: {rank: 0}"), 2, "config.yaml:6: adapter.rank, found 0", "1 or more"),
    case("rank -1", section("adapter: {rank: -1}"), 2, "config.yaml:6: adapter.rank, found -1", "1 or more"),
    case("rank is a fraction", section("adapter: {rank: 8.5}"), 2, "config.yaml:6: adapter.rank", "a whole number"),
    case("dropout 1.5", section("adapter: {dropout: 1.5}"), 2, "config.yaml:6: adapter.dropout", "below 1"),
    case("targets empty", section("adapter: {targets: []}"), 2, "config.yaml:6: adapter.targets", "one entry at least"),
    case("batch 0", training("{batch_size: 0}"), 2, "config.yaml:5: train.batch_size, found 0", "1 or more"),
    case("batch -4", training("{batch_size: -4}"), 2, "config.yaml:5: train.batch_size, found -4", "1 or more"),
    case("batch is true", training("{batch_size: true}"), 2, "config.yaml:5", "batch_size, found true", "a whole"),
    case("updates 0", training("{updates: 0}"), 2, "config.yaml:5: train.updates, found 0", "1 or more"),
    case("updates -5", training("{updates: -5}"), 2, "config.yaml:5: train.updates, found -5", "1 or more"),
    case("updates is true", training("{updates: true}"), 2, "config.yaml:5", "updates, found true", "a whole number"),
    case("epochs and updates", training("{updates: 5, epochs: 1}"), 2, "config.yaml:5", "one of updates and epochs"),
    case("seed -1", training("{seed: -1}"), 2, "config.yaml:5: train.seed, found -1", "0 or more"),
    case("seed beyond 32 bits", training("{seed: 4294967296}"), 2, "config.yaml:5: train.seed", "below"),
    case("dtype misspelt", training("{dtype: bf16}"), 2, "config.yaml:5: train.dtype, found 'bf16'", "bfloat16"),
    case("micro_tokens 0", training("{micro_tokens: 0}"), 2, "train.micro_tokens, found 0", "'auto' or 1"),
    case("recompute is a word", training("{recompute: maybe}"), 2, "train.recompute, found 'maybe'",
         "'auto' or .*true or false"),
    case("max_length 0", lambda w: w.train(data="{path: data, max_length: 0}"), 2, "config.yaml:2: data.max_length"),
    case("max_length 1", lambda w: w.train(data="{path: data, max_length: 1}"), 2, "data.max_length, found 1", "2"),
    case("train_on misspelt", lambda w: w.train(data="{path: d, train_on: al}"), 2, "data.train_on", "'all'"),
    case("log.every 0", section("log: {every: 0}"), 2, "config.yaml:6: log.every, found 0", "1 or more"),
    case("log to nowhere", section("log: {to: [wandbb]}"), 2, "config.yaml:6: log.to", "jsonl"),
    case("checkpoint.keep 0", section("checkpoint: {keep: 0}"), 2, "config.yaml:6: checkpoint.keep", "1 or more"),
    case("backend misspelt", lambda w: w.train(backend="mlxx"), 2, "config.yaml:3: backend, found 'mlxx'", "'mlx'"),
    case("device misspelt", section("device: cuda"), 2, "config.yaml:6: device, found 'cuda'", "'gpu'"),
    case("quantization misspelt", section("quantization: affine-4bit-g46"), 2, "quantization",
         'mean "affine-4bit-g64"'),
    case("full fine-tuning of a base quantized at load",
         section("quantization: affine-4bit-g64\nadapter: {type: none}"), 2, "config.yaml", "adapter.type", "none"),
    case("a section is a number", section("adapter: 8"), 2, "config.yaml:6: adapter, found 8",
         "section with keys", "rank"),
    case("a key with a dash", training("{batch-size: 4}"), 2, 'config.yaml:5: unknown key "train.batch-size"',
         "batch_size"),
    case("a zero byte in a name", lambda w: w.train(output='"a\\0b"'), 2,
         "config.yaml:4: output", "zero bytes"),
    case("a name of 5,000 letters", lambda w: w.train(model="m" * 5000), 7, "File name too long", "path"),
    case("model is missing", content("data: {path: data}\n"), 2, 'config.yaml: key "model" is missing', "--set model"),
    case("data is missing", content("model: m\n"), 2, 'config.yaml: key "data" is missing'),
    case("model is a number", content("model: 7\ndata: {path: d}\n"), 2, "config.yaml:1: model, found 7", "a text"),
    case("a list at the top", content("- model\n- data\n"), 2, "config.yaml:1", "list", "key: value"),
    case("empty file", content(""), 2, 'config.yaml: key "model" is missing'),
    case("a number of 5,000 digits in YAML", content("model: " + "7" * 5000), 2, "config.yaml", "cannot be read"),
    case("a file that cannot be read", lambda w: ["train", "/proc/self/mem"], 2, "cannot read mem", "permissions"),
    case("broken YAML", content("model: m\ndata: {path: d\ntrain: 1\n"), 2, r"config.yaml:[23]", "expected"),
    case("a tab in YAML", content("model: m\ndata:\n\tpath: d\n"), 2, r"config.yaml:3", "tab|\\\\t"),
    case("a key twice", content("model: m\ndata: {path: d}\nmodel: n\n"), 2, 'config.yaml:3: key "model" stands twice'),
    case("an alias", content("a: &x [1]\nb: *x\n"), 2, r"config.yaml:1", "aliases"),
    case("an anchor that nothing uses", content("model: &x m\n"), 2, r"config.yaml:1", "anchors"),
    case("a python tag", content("model: !!python/object/apply:os.system ['true']\n"), 2, "config.yaml:1", "python"),
    case("a date as model", content("model: 2020-01-01\ndata: {path: d}\n"), 2, "config.yaml:1: model", "a text"),
    case("2 MB of YAML", content(b"# " + b"x" * 2_000_000), 2, "config.yaml is larger than 1000000 bytes"),
    case("a tag that its value does not fit", content("model: !!bool m\n"), 2, "config.yaml", "cannot be read"),
    case("a date by its tag only", content("model: !!timestamp m\n"), 2, "config.yaml", "cannot be read"),
    case("--set nested 1000 deep", lambda w: [*w.train(), "--set", "train.seed=" + "[" * 1000], 2, "--set train.seed",
         "nested deeper"),
    case("400,000 values in YAML", content("a: [" + "1," * 400_000 + "]"),
         2, "config.yaml:1", "more than 20000 values"),
    case("not UTF-8", content(b"model: caf\xe9\n"), 2, "config.yaml: not UTF-8 at byte 10", "UTF-8"),
    case("a NUL byte in YAML", content(b"model: m\x00\n"), 2, "config.yaml", "character|special"),
    case("nested 1000 deep", content("a: " + "[" * 1000), 2, "config.yaml", "nested deeper"),
    case("config file missing", lambda w: ["train", str(w.folder / "no.yaml")], 2, "no.yaml does not exist", "--model"),
    case("a model without an organisation", lambda w: w.train(model="gpt2"), 3, "no model folder at gpt2",
         "a hub id, which has the form org/name"),
    case("config is a folder", lambda w: ["train", str(w.folder)], 2, "is a folder", "YAML"),
    case("neither config nor model", lambda w: ["train"], 2, 'key "model" is missing', "model"),
    case("--set without =", lambda w: [*w.train(), "--set", "train.seed"], 2, '--set "train.seed"', "key=value"),
    case("--set of an unknown key", lambda w: [*w.train(), "--set", "train.sed=1"], 2, "train.sed", 'mean "seed"'),
    case("--set below a value", lambda w: [*w.train(), "--set", "train.seed.x=1"], 2, "train.seed.x", "is a value"),
    case("--set of a whole section", lambda w: [*w.train(), "--set", "train=5"], 2, "--set: train, found 5", "section"),
    case("--set of a wrong type", lambda w: [*w.train(), "--set", "train.seed=one"], 2,
         "--set: train.seed, found 'one'"),
    case("--backend misspelt", lambda w: [*w.train(), "--backend", "mlxx"], 2,
         "argument: backend, found 'mlxx'", "'mlx'"),
]  # fmt: skip

COMMANDS = [
    case("unknown command", lambda w: ["trian"], 2, "trian", 'mean .train', "--help"),
    case("unknown option", lambda w: [*w.train(), "--ouptut", "x"], 2, "--ouptut", "--output", "--help"),
    case("option without value", lambda w: [*w.train(), "--output"], 2, "--output", "argument", "--help"),
    case("two config files", lambda w: [*w.train(), "other.yaml"], 2, "other.yaml", "--help"),
    case("generate without prompt", lambda w: ["generate", "model"], 2, "--prompt", "--help"),
    case("--max-tokens 0", lambda w: w.ask("--max-tokens", "0"), 2, "--max-tokens", "1"),
    case("--max-tokens is a word", lambda w: w.ask("--max-tokens", "ten"), 2, "--max-tokens", "integer"),
    case("--temperature -1", lambda w: w.ask("--temperature", "-1"), 2, "--temperature", "0"),
    case("--temperature nan", lambda w: w.ask("--temperature", "nan"), 2, "--temperature", "0"),
    case("--temperature inf", lambda w: w.ask("--temperature", "inf"), 2, "--temperature is inf", "finite"),
    case("--dtype misspelt", lambda w: w.ask("--dtype", "float33"), 2, "--dtype", 'mean "float32"'),
    case("--split misspelt", lambda w: w.score("--split", "vaild"), 2, "--split", 'mean "valid"'),
    case("--train-on misspelt", lambda w: w.score("--train-on", "completions"), 2, "--train-on", 'mean "completion"'),
    case("generate: backend misspelt", lambda w: [*w.ask()[:-1], "torhc"], 2, "--backend", "torhc", 'mean "torch"'),
    case("generate: quantization misspelt", lambda w: w.ask("--quantization", "affine-4bit"), 2, "affine-4bit"),
    case("generate: no model", lambda w: w.ask(model=w.folder / "no"), 3, "no model folder at", "config.json"),
    case("generate: a file as model", lambda w: w.ask(model=w.config()), 3, "config.yaml", "folder"),
    case("generate: no adapter", lambda w: w.ask("--adapter", str(w.folder / "no")), 3, "no adapter folder at"),
    case("generate: a data folder as adapter", lambda w: w.ask("--adapter", str(w.data(GOOD))), 3, "adapter_config"),
    case("evaluate: no data", lambda w: w.score(data=w.folder / "no"), 2, "no data at", "train.jsonl"),
    case("evaluate: no such split", lambda w: w.score("--split", "test"), 2, "has no test.jsonl", "--split"),
    case("evaluate: a broken row", lambda w: w.score(data=w.data(GOOD, "{")), 2, "train.jsonl:2: not JSON"),
    case("evaluate: a CSV", lambda w: w.score(data=w.config()), 2, "config.yaml is no data file", "one of .jsonl"),
    case("parity: no config", lambda w: ["parity", str(w.folder / "no.yaml")], 2, "no.yaml does not exist"),
    case("parity: no model", lambda w: ["parity", str(w.config(model=w.folder / "no"))], 3, "no model folder at"),
    case("parity: --updates 0", lambda w: ["parity", str(w.config()), "--updates", "0"], 2, "--updates", "1"),
    case("offload without a second memory", training("{recompute: offload}"), 4, "train.recompute: offload", "CUDA",
         "recompute: true", both=True),
    case("a GPU where none is", section("device: gpu"), 4, "gpu", "device: auto", both=True),
    case("output is a file", output_is_file, 2, "output: .*taken is a file", "folder"),
    case("output is a file, and there is no data", lambda w: output_is_file(w, data=w.folder / "no"), 2,
         "output: .*taken is a file", "folder"),
    case("output below a file", output_below_file, 7, "output: cannot write in .*taken", "--output"),
    case("--resume of nothing", lambda w: [*w.train(), "--resume", str(w.folder / "no")], 3, "--resume: no folder at"),
    case("--resume of a folder without checkpoints",
         lambda w: [*w.train(), "--resume", str(w.data(GOOD))], 3, "--resume: no checkpoint in", "step-"),
    case("only damaged checkpoints", lambda w: damaged_checkpoints(w, last_only=False), 3, "no checkpoint in",
         "step-000002", "--resume never"),
    case("a checkpoint whose manifest climbs out", climbing_checkpoint, 3, "--resume: step-000002 is damaged", "auto"),
    case("output holds a model of yours", output_is_mine, 2, 'would replace "model"', "--output"),
    case("output is the data folder", lambda w: w.train(output=w.data(*ROWS)), 2, "data is the folder of data.path",
         "--output"),
    case("output is the model folder",
         lambda w: w.train(model=w.model(), output=w.folder / "model"), 2, "is the folder of model", "--output"),
    case("output holds the data where it writes", data_in_output, 2, "data.path .* lies in it", "--output"),
    case("a checkpoint of other settings", another_run, 3, "optimizer.lr: 0.0001 -> 0.5", "--resume never"),
]  # fmt: skip

DATA = [
    case("no data folder", lambda w: w.train(data=w.folder / "no"), 2, "no data at .*no", "train.jsonl"),
    case("a folder without train.jsonl", lambda w: w.train(data=w.data(GOOD, name="trian.jsonl")), 2,
         "has no train.jsonl", "trian.jsonl"),
    case("a CSV file", lambda w: w.train(data=w.data("a,b", name="rows.csv") / "rows.csv"), 2, "rows.csv", "a header"),
    case("no rows", lines(), 2, "train.jsonl has no rows", "JSON object per line"),
    case("only blank lines", lines("", "  ", ""), 2, "train.jsonl has no rows"),
    case("broken JSON in line 3", lines(GOOD, GOOD, '{"text": "abc'), 2, "train.jsonl:3: not JSON", "column", "abc"),
    case("a JSON array over lines", lines("[", '{"text": "a"}', "]"), 2, "train.jsonl:1", "one JSON object per line"),
    case("a line with a list", lines(GOOD, "[1, 2]"), 2, "train.jsonl:2: a list", "JSON object"),
    case("no known key", lines({"txet": "abc", "id": 1}), 2, "train.jsonl:1", 'keys are: "id", "txet"', 'mean "text"'),
    case("ShareGPT rows", lines({"conversations": []}), 2, "train.jsonl:1", "messages"),
    case("Alpaca rows", lines({"instruction": "a", "answer": "b"}), 2, "train.jsonl:1", "Alpaca", "prompt"),
    case("prompt without completion", lines(GOOD, {"prompt": "a"}), 2,
         'train.jsonl:2: "completion" is null or missing'),
    case("completion empty", lines({"prompt": "a", "completion": ""}), 2,
         'train.jsonl:1: "completion" is empty', "fix"),
    case("content null", lines(TALK, chat(("user", None), ("assistant", "b"))), 2, "train.jsonl:2: message 0", "null"),
    case("messages empty", lines({"messages": []}), 2, "train.jsonl:1", "messages", "empty"),
    case("messages are texts", lines({"messages": ["hello"]}), 2, "train.jsonl:1: message 0", "role"),
    case("messages without assistant", lines(chat(("user", "a"))), 2, "train.jsonl:1", "no assistant", "fix"),
    case("unknown role", lines(chat(("banana", "a"), ("assistant", "b"))), 2, "train.jsonl:1: message 0", "banana"),
    case("role near a real one", lines(chat(("asistant", "a"))), 2, "train.jsonl:1: message 0", 'mean "assistant"'),
    case("text is a number", lines({"text": 7}), 2, 'train.jsonl:1: "text" is a number', "text"),
    case("text empty", lines(GOOD, {"text": ""}), 2, 'train.jsonl:2: "text" is empty', "remove the row"),
    case("not UTF-8 in line 2", lines(GOOD, b'{"text": "caf\xe9"}'), 2, "train.jsonl:2: not UTF-8 at byte 13"),
    case("UTF-16", lambda w: w.rows(json.dumps(GOOD).encode("utf-16")), 2, "train.jsonl:1: not UTF-8", "UTF-8"),
    case("NUL bytes", lines(b"\x00" * 40), 2, "train.jsonl:1: not JSON", "JSON object"),
    case("half a surrogate pair", lines('{"text": "a\\ud800"}'), 2, "train.jsonl:1", "surrogate", "repair"),
    case("half a surrogate pair in a key", lines('{"\\ud800": "a"}'), 2, r"train.jsonl:1: unknown row.*\\ud800"),
    case("a key that would clear the screen", lines({"\x1b[2J": "a"}), 2, r'train.jsonl:1: .*keys are: "\\x1b\[2J"'),
    case("half a surrogate pair in tools", lines({**TALK, "tools": [{"x": "\ud800"}]}), 2, 'jsonl:1: "tools" has half'),
    case("JSON 10,000 deep", lines(b'{"text": ' + b"[" * 10_000 + b"]" * 10_000 + b"}"), 2, "train.jsonl:1",
         "deep|list"),
    case("a line of 50 MB", lines(GOOD, b'{"text": "' + b"x" * 50_000_000 + b'"}'), 2,
         "train.jsonl:2: a line of", "50"),
    case("a number of 5,000 digits", lines(b'{"text": ' + b"7" * 5000 + b"}"), 2, "train.jsonl:1: a number",
         "too long"),
    case("NaN in place of a row", lines("NaN"), 2, "train.jsonl:1: a number .NaN", "JSON object"),
    case("tools are text", lines({**TALK, "tools": "search"}), 2, "train.jsonl:1", "tools", "list"),
    case("prompt longer than max_length", lambda w: w.train(data=f"{{path: {w.data(*ROWS)}, max_length: 4}}"), 2,
         "train.jsonl:1: no supervised token within data.max_length 4", "raise data.max_length"),
    case("valid.jsonl broken", lambda w: [w.data(GOOD, "{", name="valid.jsonl"), w.train()][1], 2, "valid.jsonl:2"),
    case("valid.jsonl empty", lambda w: [w.data(name="valid.jsonl"), w.train()][1], 2, "valid.jsonl has no rows"),
    case("messages and no chat template", lambda w: with_template(w, None), 2, "train.jsonl:1",
         "no chat template", "fix"),
    case("a template that is not Jinja", lambda w: with_template(w, "{% for %}"), 2, "train.jsonl:1", "chat template"),
    case("a template that reaches for Python", lambda w: with_template(w, SSTI), 2, "train.jsonl:1", "chat template",
         "unsafe"),
    case("a template that never ends", lambda w: with_template(w, ENDLESS), 2, "train.jsonl:1", "longer than 1 s",
         quick=False),
    case("a template that writes a flood", lambda w: with_template(w, "{{ 'x' * 1000000000 }}"), 2, "chat template"),
    case("a template that doubles forever",
         lambda w: with_template(w, DOUBLING), 2, "train.jsonl:1", "chat template"),
    case("a template that says no", lambda w: with_template(w, "{{ raise_exception('no tools here') }}"), 2,
         "train.jsonl:1", "no tools here"),
]  # fmt: skip

MODELS = [
    case("no model folder", lambda w: w.train(model=w.folder / "no"), 3, "no model folder at .*no", "config.json"),
    case("an empty model folder", lambda w: w.train(model=w.folder), 3, "config.json is missing", "download"),
    case("config.json empty", lambda w: with_file(w, "config.json", b""), 3, "config.json cannot be read"),
    case("config.json is a list", lambda w: with_file(w, "config.json", b"[]"), 3, "config.json holds a list",
         "object"),
    case("config.json 10,000 deep", lambda w: with_file(w, "config.json", b"[" * 10_000), 3, "config.json"),
    case("no model_type", model(model_type=None), 3, "config.json: model_type is None", "llama"),
    case("model_type climbs out", model(model_type="../../evil"), 3, "model_type is '../../evil'", "llama"),
    case("model_type unknown", model(model_type="lama"), 3, 'architecture "lama"', 'mean "llama"', **LOADED),
    case("model_type is a package", model(model_type="os.path"), 3, "os.path", **LOADED),
    case("code in the folder", model(model_file="evil.py"), 4, "model_file", "never", "fix"),
    case("auto_map in the folder", model(auto_map={"AutoModel": "evil.Model"}), 4, "auto_map", "never"),
    case("no layers", model(num_hidden_layers=0), 3, "config.json: num_hidden_layers is 0", "1 to 10000"),
    case("ten million layers", model(num_hidden_layers=10**7), 3, "num_hidden_layers is 10000000", "1 to 10000"),
    case("more layers than weights", model(num_hidden_layers=5), 3, "num_hidden_layers 5", "2 layers"),
    case("hidden_size mismatch", model(hidden_size=96), 3, "tensor ", r"shape", "by config.json", **LOADED),
    case("hidden_size of text", model(hidden_size="big"), 3, "config.json: hidden_size is 'big'", "1 to"),
    case("hidden_size 0", model(hidden_size=0), 3, "config.json: hidden_size is 0", "1 to"),
    case("hidden_size of ten billion", model(hidden_size=10**10), 3, "hidden_size is 10000000000", "1 to"),
    case("no attention heads", model(num_attention_heads=0), 3, "config.json: num_attention_heads is 0", "1 to"),
    case("an epsilon of text", model(rms_norm_eps="tiny"), 3, "config.json: ", "does not describe a model", **LOADED),
    case("a vocabulary of -1", model(vocab_size=-1), 3, "config.json: vocab_size is -1", "1 to"),
    case("vocabulary smaller than the tokenizer's",
         lambda w: w.train(model=w.weights(lambda t: t.update({"model.embed_tokens.weight": filled(100, 64),
                                                               "lm_head.weight": filled(100, 64)}), vocab_size=100)),
         3, "tokenizer gives id", r"train.jsonl:\d", "the model has 100", "belong together"),
    case("tensor missing", weights(lambda t: t.pop("model.norm.weight")), 3, '"model.norm.weight" is missing',
         **LOADED),
    case("tensor too many", weights(lambda t: t.update(extra=filled(3))), 3, '"extra" has no place', **LOADED),
    case("NaN in a weight", weights(lambda t: spoil(t, "model.layers.1.mlp.up_proj.weight", np.nan)), 3,
         '"model.layers.1.mlp.up_proj.weight" holds NaN', **LOADED),
    case("infinity in a weight", weights(lambda t: spoil(t, "model.norm.weight", np.inf)), 3, '"model.norm.weight"',
         "infinity", **LOADED),
    case("weights cut short", cut_short, 3, "model.safetensors is damaged", "byte", "again"),
    case("weights are random bytes", lambda w: with_file(w, "model.safetensors", b"\xff" * 300), 3, "is damaged"),
    case("weights with an absurd shape", huge_shape, 3, "is damaged", '"model.norm.weight"'),
    case("weights as pickle", pickled_model, 3, "pickle", "pytorch_model.bin", "safetensors"),
    case("index climbs out", lambda w: with_index(w, {"a": "../secret.safetensors"}), 3, "index.json", "weight_map"),
    case("index is a list", lambda w: with_index(w, []), 3, "index.json", "weight_map"),
    case("shard missing", lambda w: with_index(w, {"a": "model-2.safetensors"}), 3, "model-2.safetensors is missing"),
    case("no tokenizer", without_tokenizer, 3, "no tokenizer.json", "fix"),
    case("tokenizer.json broken", lambda w: with_file(w, "tokenizer.json", b"{"), 3, "tokenizer", "cannot be loaded"),
    case("tokenizer.json of nonsense", lambda w: with_file(w, "tokenizer.json", b'{"model": 1}'), 3, "tokenizer"),
    case("quantized to 7 bits", lambda w: quantized(w, bits=7, group_size=32), 3, PACKED, "7 bits in groups of 32"),
    case("quantized in groups of 0", lambda w: quantized(w, bits=4, group_size=0), 3, PACKED, "groups of 0"),
    case("quantized otherwise than said", lambda w: quantized(w, bits=8, group_size=32), 3, PACKED, "8 bits",
         "shape|weight"),
    case("quantized, bits of text", lambda w: quantized(w, bits="four", group_size=32), 3,
         PACKED),  # type: ignore[arg-type]
    case("quantized without biases", lambda w: quantized(w, bits=4, group_size=32, drop="biases"), 3, PACKED, "biases"),
    case("quantized without scales", lambda w: quantized(w, bits=4, group_size=32, drop="scales"), 3, PACKED, **LOADED),
    case("quantized in another mode", lambda w: quantized(w, bits=4, group_size=32, mode="mxint8"), 4, "mxint8",
         "affine"),
    case("affine said to be mxfp4", lambda w: quantized(w, bits=4, group_size=32, mode="mxfp4"), 3, PACKED, "fix"),
    case("quantized by another library", model(quantization_config={"quant_method": "gptq", "bits": 4}), 4,
         "gptq", "fix"),
    case("bitsandbytes without a packed tensor",
         model(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}), 3, "bitsandbytes 4 bit",
         "no tensor is packed so", "fix"),
    case("quantization is a list", model(quantization=[4, 64]), 3, r"quantization is \[4, 64\]", "bits"),
    case("full fine-tuning of a quantized folder", full_on_quantized, 3, "is quantized", "adapter.type"),
    case("targets that match nothing", section("adapter: {targets: [q_prj]}"), 2, '"q_prj" matches no', "k_proj",
         'mean "q_proj"', **LOADED),
    case("more layers to adapt than there are", section("adapter: {layers: 99}"), 2, "last 99",
         "the model has 2", **LOADED),
    case("a layer out of range", section("adapter: {layers: [0, 7]}"), 2, "layer 7", "0 to 1", **LOADED),
    case("training diverges", lambda w: w.train("optimizer: {lr: 1e30}\nschedule: {name: constant, warmup: 0}\n",
                                                train="{batch_size: 2, updates: 8, dtype: float32}"),
         5, "diverged", r"lower optimizer.lr \(now 1e\+30\) and start anew", started=True, **LOADED),
    case("prompt empty, model without start token", no_bos, 2, "prompt is empty", quick=False),
]  # fmt: skip

ADAPTERS = [
    case("rank differs from its config", lambda w: changed_adapter(w, halved), 3, "rank 4", "rank 8"),
    case("shapes of another width", lambda w: changed_adapter(w, wider), 3, "lora_A", r"\(8, 136\)",
         r"\(8, 128\)", **LOADED),
    case("names of another model", lambda w: changed_adapter(w, renamed), 3, "does not fit", "14 of 14", **LOADED),
    case("a tensor missing", lambda w: changed_adapter(w, lambda t: t.pop(next(iter(t)))), 3, "lora_",
         "missing", **LOADED),
    case("NaN in the adapter", lambda w: changed_adapter(w, lambda t: spoil(t, next(iter(t)), np.nan)), 3,
         "NaN", **LOADED),
    case("no tensors at all", lambda w: changed_adapter(w, lambda t: t.clear()), 3, "no tensors"),
    case("a third matrix", lambda w: changed_adapter(w, lambda t: t.update(x=filled(2))), 4, '"x"', "lora_A"),
    case("a flat tensor", lambda w: changed_adapter(w, lambda t: t.update({next(iter(t)): filled(8)})), 3, "lora_",
         quick=False),
    case("trained on another base", other_base, 3, "another architecture: num_hidden_layers"),
    case("a pickle", pickled_adapter, 3, "pickle", "adapter_model.bin", "safe_serialization"),
    case("random bytes", garbage_adapter, 3, "adapter_model.safetensors is damaged", "again"),
    case("DoRA without magnitudes", lambda w: strange_adapter(w, use_dora=True), 3, "lora_magnitude_vector", "missing"),
    case("modules_to_save", lambda w: strange_adapter(w, modules_to_save=["lm_head"]), 3, "modules_to_save", "lm_head"),
    case("rank_pattern", lambda w: strange_adapter(w, rank_pattern={"q_proj": 4}), 3, "q_proj", "has rank 8", "rank 4"),
    case("another PEFT type", lambda w: strange_adapter(w, peft_type="IA3"), 4, "IA3", "LORA"),
    case("rank 0", lambda w: strange_adapter(w, r=0), 3, "adapter_config.json: r is 0", "from 1"),
    case("rank of text", lambda w: strange_adapter(w, r="eight"), 3, "adapter_config.json: r is 'eight'", "number"),
    case("alpha of NaN", lambda w: strange_adapter(w, lora_alpha=float("nan")), 3,
         "adapter_config.json: lora_alpha is nan", "finite"),
    case("PiSSA", lambda w: strange_adapter(w, init_lora_weights="pissa"), 4, "pissa", "changes the base", "convert"),
    case("mlx-lm's file without scale", mlx_adapter_without_scale, 3, "lora_parameters", "scale"),
]  # fmt: skip

CASES = {
    f"{group}: {found.name}": found
    for group, members in (
        ("config", CONFIG),
        ("command", COMMANDS),
        ("data", DATA),
        ("model", MODELS),
        ("adapter", ADAPTERS),
    )
    for found in members
}


@pytest.fixture(scope="module", autouse=True)
def loaded(tiny_model_folder, tmp_path_factory):
    """Load what takes seconds the first time, so that each case is timed by itself."""
    world = World(tmp_path_factory.mktemp("warm"), tiny_model_folder(), tiny_model_folder(layers=1), "torch")
    for world.backend in ("torch", "mlx"):
        assert run(world.train()) == 0


@pytest.fixture
def world(tmp_path, tiny_model_folder):
    return World(tmp_path, tiny_model_folder(), tiny_model_folder(layers=1), "torch")


def cpu_seconds() -> float:
    """Return the CPU time of this process and of those it has waited for, whatever else the machine does."""
    return sum(os.times()[:4])


def files_in(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def check_message(found: Case, code: int, error: str) -> None:
    """Check the contract of errors: code, form, place, remedy."""
    assert code == found.code, error
    assert "Traceback" not in error
    if found.started:
        error = error[error.index("error E") :]
    assert re.match(f"error E{found.code}[0-9][0-9]: ", error)
    assert error.count("\n") <= 3
    assert max(map(len, error.splitlines())) <= 600
    assert re.search(r"^(fix|expected): ", error, re.MULTILINE), error
    for part in found.says:
        assert re.search(part, error), f"{part!r} is not in: {error}"


EACH = [
    (name, backend) for name, found in CASES.items() for backend in (("torch", "mlx") if found.both else ("torch",))
]


@pytest.mark.parametrize(("name", "backend"), EACH, ids=[f"{name} [{backend}]" for name, backend in EACH])
def test_a_mistake_gets_a_short_answer_and_leaves_nothing(name, backend, world, capsys):
    found, world.backend = CASES[name], backend
    arguments = found.make(world)
    before, was_there = files_in(world.folder), world.output.exists()
    capsys.readouterr()
    began = cpu_seconds()
    code = run(arguments)
    took = cpu_seconds() - began
    out, error = capsys.readouterr()
    check_message(found, code, error)
    assert out == ""
    new = files_in(world.folder) - before
    assert found.started or (not new and world.output.exists() == was_there)
    assert not [file for file in new if "tmp" in file or "adapter" in file.split("/")[1]]
    assert not found.quick or took < SECONDS, f"took {took:.1f} s of CPU time"


SUBPROCESS = {
    "config: unknown key": True,
    "config: broken YAML": True,
    "command: unknown command": True,
    "command: unknown option": True,
    "data: broken JSON in line 3": True,
    "data: a line of 50 MB": True,
    "model: no model folder": True,
    "model: weights cut short": True,
    "adapter: a pickle": True,
    "model: targets that match nothing": False,  # loads the model, so frameworks are imported
}


@pytest.mark.parametrize("name", SUBPROCESS)
def test_the_real_command_says_the_same(name, world, capsys):
    found = CASES[name]
    arguments = found.make(world)
    before = files_in(world.folder)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    began = cpu_seconds()
    done = subprocess.run(
        [sys.executable, "-m", "mlxlora", *arguments],
        cwd=world.folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    took = cpu_seconds() - began
    check_message(found, done.returncode, done.stderr)
    assert done.stdout == ""
    assert not files_in(world.folder) - before
    assert not SUBPROCESS[name] or took < SECONDS, f"took {took:.1f} s of CPU time"


@pytest.mark.parametrize("name", ["config: unknown key", "data: text empty", "model: no model folder"])
def test_with_json_the_error_is_one_object_too(name, world, capsys):
    found = CASES[name]
    assert run([*found.make(world), "--json"]) == found.code
    out, error = capsys.readouterr()
    assert json.loads(out) == {
        "ok": False,
        "exit_code": found.code,
        "code": error[6:10],
        "error": error[12:].rstrip("\n"),
    }


def test_with_debug_the_traceback_comes_first(world, capsys):
    assert run([*CASES["model: no model folder"].make(world), "--debug"]) == 3
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert error.index("find_folder") < error.index("\nerror E300: no model folder")


def test_there_are_more_than_a_hundred_mistakes_each_named_once():
    groups = (CONFIG, COMMANDS, DATA, MODELS, ADAPTERS)
    assert len(CASES) == sum(map(len, groups)) > 100


# What looks like a mistake and is none.


def losses(world: World) -> list[float]:
    rows = [json.loads(line) for line in (world.output / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


MARK = "\ufeff".encode()
HARMLESS: dict[str, Callable[[World], list[str]]] = {
    "Windows line ends": lambda w: w.rows(*ROWS, end=b"\r\n"),
    "a byte order mark": lambda w: w.rows(MARK + json.dumps(ROWS[0]).encode(), *ROWS[1:]),
    "blank lines": lambda w: w.rows("", ROWS[0], "   ", *ROWS[1:], "", "\t"),
    "no newline at the end": lambda w: w.train(data=last_line_open(w)),
    "columns nobody asked for": lambda w: w.rows(*({**row, "id": 3, "note": None} for row in ROWS)),
    "lr in quotes": lambda w: w.train('optimizer: {lr: "1e-4"}\n'),
    "lr without a dot": lambda w: w.train("optimizer: {lr: 1e-4}\n"),
    "sections left empty": lambda w: w.train("optimizer:\nadapter: null\nschedule: {}\n"),
    "a config with a byte order mark": lambda w: ["train", str(w.text(MARK + w.config().read_bytes()))],
    "a config with Windows line ends": lambda w: [
        "train",
        str(w.text(w.config().read_bytes().replace(b"\n", b"\r\n"))),
    ],
    "a file in place of a folder": lambda w: w.train(data=w.data(*ROWS) / "train.jsonl"),
    "a validation file": lambda w: [w.data(*ROWS, name="valid.jsonl"), w.train()][1],
}


def last_line_open(w: World) -> Path:
    folder = w.data(*ROWS)
    file = folder / "train.jsonl"
    file.write_bytes(file.read_bytes().rstrip(b"\n"))
    return folder


@pytest.fixture(scope="module")
def plain_losses(tiny_model_folder, tmp_path_factory):
    """Return the losses of the same run without anything unusual."""
    world = World(tmp_path_factory.mktemp("plain"), tiny_model_folder(), tiny_model_folder(layers=1), "torch")
    assert run(world.train()) == 0
    return losses(world)


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_merely_unusual_trains_exactly_as_the_usual(name, world, plain_losses, capsys):
    assert run(HARMLESS[name](world)) == 0, capsys.readouterr().err
    assert losses(world) == plain_losses


OTHER: dict[str, tuple[Any, ...]] = {
    "rows of three kinds": (ROWS[0], {"text": "hello"}, TALK),
    "fewer rows than a batch": (ROWS[0],),
    "the same row many times": (ROWS[0],) * 6,
    "an empty prompt": ({"prompt": "", "completion": "hello"},),
    "special tokens in a text": ({"text": "a<|im_end|>b<|im_start|>"},),
    "a NUL in a text": ({"text": "a\x00b"},),
    "every plane of Unicode": ({"text": "é你🦊\u2028\u0085\U0010ffff"},),
    "a row much longer than max_length": ({"text": "hello " * 2000},),
}


@pytest.mark.parametrize("name", OTHER)
def test_unusual_rows_train(name, world, capsys):
    data = world.data(*OTHER[name])
    assert run(world.train(data=f"{{path: {data}, max_length: 64}}")) == 0, capsys.readouterr().err
    assert (world.output / "adapter" / "adapter_model.safetensors").is_file()
    assert all(np.isfinite(losses(world)))


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_and_says_so(world, capsys):
    arguments = damaged_checkpoints(world, last_only=True)
    capsys.readouterr()
    assert run(arguments) == 0
    error = capsys.readouterr().err
    assert "passed over: step-000002 is damaged" in error
    assert "going on after update 1" in error
    assert (world.output / "adapter" / "adapter_model.safetensors").is_file()


def test_a_folder_that_is_no_run_is_left_as_it_is(world, capsys):
    assert run(output_is_mine(world)) == 2
    assert (world.output / "model" / "precious").read_text() == "mine"
    assert [file.name for file in world.output.iterdir()] == ["model"]
