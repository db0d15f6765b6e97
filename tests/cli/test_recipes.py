"""Every recipe that comes with the package trains on both backends, and fits the machines that it names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlxlora import RECIPES
from mlxlora.cli.main import run
from shared.config_file import load_config
from shared.jobs.recipes import list_recipes

NAMES = ["chat", "classify", "cuda-server", "first-lora", "full-small", "long-context", "qlora-8b", "sql"]
# What config.json of the recipes' models says, and how many parameters their cards do.
QWEN2 = {
    "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
    "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
}  # fmt: skip
MODELS: dict[str, tuple[dict[str, Any], float]] = {
    "Qwen/Qwen2.5-1.5B-Instruct": (QWEN2, 1.54e9),
    "Qwen/Qwen2.5-Coder-1.5B-Instruct": (QWEN2, 1.54e9),
    "Qwen/Qwen3-8B": (
        {
            "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
            "tie_word_embeddings": False, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        },
        8.19e9,
    ),
    "HuggingFaceTB/SmolLM2-135M": (
        {
            "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
            "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 1e5,
        },
        1.345e8,
    ),
}  # fmt: skip


@pytest.fixture(scope="session")
def headers(tmp_path_factory) -> dict[str, Path]:
    """Return folders of the recipes' models with real headers and holes in place of weights."""
    return {name: write_headers(tmp_path_factory.mktemp("headers"), config) for name, (config, _) in MODELS.items()}


def write_headers(folder: Path, config: dict[str, Any]) -> Path:
    """Write a model folder as transformers names and shapes it, in bfloat16; its weights take no room on the disk."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    header, end = {}, 0
    for name, parameter in model.named_parameters():  # a tied head once
        begin, end = end, end + 2 * parameter.numel()
        header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
    return folder


def call(capsys: pytest.CaptureFixture[str], *arguments: Any, code: int = 0) -> dict[str, Any]:
    """Return the object that a command printed."""
    capsys.readouterr()
    assert run([*(str(argument) for argument in arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_recipes_are_listed_with_what_they_are_for(capsys):
    found = call(capsys, "recipes", "ls")["recipes"]
    assert [recipe["name"] for recipe in found] == NAMES
    assert all(recipe["title"] and recipe["fits"] for recipe in found)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_fits_the_machines_that_it_names(name, headers, capsys):
    """With rows as long as the recipe allows, each of the machines takes it as it stands."""
    file = RECIPES / f"{name}.yaml"
    config = load_config(file)
    options = ["--set", f"model={headers[config.model]}", "--set", "data.path=absent", "--set", "data.columns={}"]
    options += ["--set", "device=auto"]
    for machine in next(recipe.fits for recipe in list_recipes(RECIPES) if recipe.name == name):
        kind, size = machine.split(" ", 1)
        backend = {"Mac": "mlx", "GPU": "torch"}[kind]
        found = call(capsys, "estimate", file, *options, "--backend", backend, "--memory", size.replace(" ", ""))
        (line,) = found["backends"][0]["lines"]
        assert found["parameters"] == pytest.approx(MODELS[config.model][1], rel=0.01)
        assert line["machine"] == machine
        assert found["longest_row"] == config.data.max_length
        assert (line["fits"], line["changes"]) == (True, {}), line


def each_run() -> list[Any]:
    """Return every recipe on both backends; all but seven of them slow."""
    cheap = {(name, "torch") for name in NAMES} - {("long-context", "torch"), ("first-lora", "torch")}
    cheap.add(("first-lora", "mlx"))
    pairs = [(name, backend) for name in NAMES for backend in ("torch", "mlx")]
    return [pytest.param(*pair, marks=() if pair in cheap else pytest.mark.slow) for pair in pairs]


@pytest.mark.parametrize(("name", "backend"), each_run())
def test_a_recipe_runs_on_its_own_rows(name, backend, tmp_path, monkeypatch, capsys):
    """A few updates on the demo base, with nothing else changed but what the recipe's machine would need."""
    monkeypatch.chdir(tmp_path)
    call(capsys, "recipes", "cp", name, "here", "--demo")
    monkeypatch.chdir(tmp_path / "here")
    options = ["--set", "train.updates=4", "--set", "train.dtype=float32", "--set", "device=auto"]
    options += ["--set", "evaluation.every=2", "--set", "train.batch_size=4", "--set", "evaluation.batches=1"]
    found = call(capsys, "train", "recipe.yaml", "--model", "base", "--backend", backend, *options)
    assert found["updates"] == 4
    rows = [json.loads(line) for line in (Path(found["adapter"]).parent / "metrics.jsonl").read_text().splitlines()]
    losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert losses[-1] < losses[0]


def test_a_copy_is_the_recipe_and_never_writes_over_anything(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = call(capsys, "recipes", "cp", "sql")
    assert found["next"] == "cd sql && mlxlora train recipe.yaml"
    text = call(capsys, "recipes", "show", "sql")["yaml"]
    assert (tmp_path / "sql/recipe.yaml").read_text() == text
    assert yaml.safe_load(text)["model"] in MODELS
    assert not (tmp_path / "sql/base").exists()
    assert "sql exists" in call(capsys, "recipes", "cp", "sql", code=2)["error"]


def test_a_recipe_that_is_not_there_gets_the_nearest_name(capsys):
    assert 'did you mean "classify"' in call(capsys, "recipes", "show", "clasify", code=2)["error"]


@pytest.mark.parametrize("group", ["recipes", "runs"])
def test_a_group_alone_lists_its_commands(group, capsys):
    assert run([group]) == 0
    assert "  ls " in capsys.readouterr().out
