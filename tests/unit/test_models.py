"""Whole models for other programs: loaded by them, the source untouched, Ollama's template put to the test."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

import mlxlora
from shared.convert.models import convert_model
from shared.convert.ollama import Turns, find_turns, go_template
from shared.data.tokenize import load_tokenizer
from shared.errors import CapabilityError, ConfigError, ModelError
from shared.folder import open_folder, sha256
from shared.tensors import Tensor, load_file, save_file
from tests import tolerances
from tests.adapters import save_adapter
from tests.architectures import load
from tests.conftest import save_tokenizer
from tests.exports import save_family, save_gpt2_tokenizer


@pytest.fixture(scope="module")
def affine_folder(tiny_model_folder, tmp_path_factory):
    import mlx_lm

    target = tmp_path_factory.mktemp("affine") / "model"
    mlx_lm.convert(
        str(tiny_model_folder("qwen2")), mlx_path=str(target), quantize=True, q_bits=4, q_group_size=32,
        dtype="float32",
    )  # fmt: skip
    return target


def test_a_quantized_mlx_folder_gives_transformers_the_logits_of_mlx_lm(affine_folder, tmp_path):
    import mlx.core as mx
    import mlx_lm
    import torch
    from transformers import AutoModelForCausalLM

    before = {file.name: sha256(file) for file in affine_folder.iterdir()}
    result = convert_model(str(affine_folder), to="hf", output=str(tmp_path / "hf"))
    assert "quantization" not in json.loads((result.output / "config.json").read_text())
    assert {name: sha256(affine_folder / name) for name in before} == before
    ids = [[5, 90, 17, 200, 33]]
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(result.output, dtype=torch.float32)
        theirs = model(torch.tensor(ids)).logits[0].numpy()
    model, _ = mlx_lm.load(str(result.output), model_config={"rope_theta": 10000.0})
    again = np.array(model(mx.array(ids)))[0]
    model, _ = mlx_lm.load(str(affine_folder), model_config={"rope_theta": 10000.0})
    packed = np.array(model(mx.array(ids)))[0]
    bound = tolerances.LOGITS * max(np.abs(theirs).max() / 10, 1)
    np.testing.assert_allclose(packed, theirs, atol=bound, rtol=0)
    np.testing.assert_allclose(again, theirs, atol=bound, rtol=0)


def test_a_mlx_folder_tells_mlx_lm_its_rope_base_and_keeps_packed_bytes(tiny_model_folder, affine_folder, tmp_path):
    import mlx.core as mx
    import mlx_lm
    import torch
    from transformers import AutoModelForCausalLM

    base = tiny_model_folder("qwen2")
    ids = [[5, 90, 17, 200, 33]]
    output = convert_model(str(base), to="mlx", output=str(tmp_path / "mlx")).output
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(torch.tensor(ids)).logits[0].numpy()
    model, _ = mlx_lm.load(str(output))
    bound = tolerances.LOGITS * max(np.abs(theirs).max() / 10, 1)
    np.testing.assert_allclose(np.array(model(mx.array(ids)))[0], theirs, atol=bound, rtol=0)
    packed = convert_model(str(affine_folder), to="mlx", output=str(tmp_path / "packed")).output
    assert sha256(packed / "model.safetensors") == sha256(affine_folder / "model.safetensors")


def test_floats_take_the_dtype_that_is_asked_for(tiny_model_folder, tmp_path):
    output = convert_model(str(tiny_model_folder()), to="hf", output=str(tmp_path / "hf"), dtype="bfloat16").output
    assert {tensor.dtype for tensor in load_file(output / "model.safetensors").values()} == {"BF16"}
    assert json.loads((output / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_adapter_and_a_model_go_their_own_ways(tmp_path):
    folder = save_family(tmp_path / "model", "mistral")
    adapter = save_adapter(tmp_path / "adapter", folder)
    assert mlxlora.convert(adapter, to="gguf", output=tmp_path / "a").files == ("adapter.gguf",)
    assert mlxlora.convert(folder, to="gguf", output=tmp_path / "m").files == ("model.gguf",)
    assert (mlxlora.convert(adapter, to="mlx", output=tmp_path / "l").output / "adapters.safetensors").is_file()
    for to in ("hf", "ollama"):
        with pytest.raises(ConfigError, match="is an adapter"):
            mlxlora.convert(adapter, to=to, output=tmp_path / "x")
    with pytest.raises(ConfigError, match="--weights f16 is for whole models"):
        mlxlora.convert(adapter, to="gguf", output=tmp_path / "x", weights="f16")
    with pytest.raises(ConfigError, match="is for adapters"):
        mlxlora.convert(folder, to="gguf", output=tmp_path / "x", base=folder)
    with pytest.raises(ConfigError, match='unknown value "guff"'):
        mlxlora.convert(folder, to="guff", output=tmp_path / "x")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "gone/away"}))
    with pytest.raises(ConfigError, match="names none that is here"):
        mlxlora.convert(adapter, to="gguf", output=tmp_path / "x")
    assert mlxlora.convert(adapter, to="gguf", output=tmp_path / "y", base=folder).files == ("adapter.gguf",)
    assert not (tmp_path / "x").exists()


def test_options_that_do_not_belong_together_are_refused(tiny_model_folder, tmp_path):
    base = str(tiny_model_folder())
    for options in (
        {"to": "hf", "weights": "f16"}, {"to": "gguf", "dtype": "float16"}, {"to": "gguf", "weights": "q5_k"},
        {"to": "hf", "dtype": "fp16"},
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            convert_model(base, output=str(tmp_path / "out"), **options)
    with pytest.raises(ConfigError, match="never changed"):
        convert_model(base, to="hf", output=f"{base}/out")
    with pytest.raises(ModelError, match="no model folder"):
        convert_model("nowhere", to="hf", output=str(tmp_path / "out"))


def test_quantized_weights_of_an_unknown_layout_are_refused(affine_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(affine_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    with pytest.raises(CapabilityError, match='"mamba" may be laid out'):
        convert_model(str(folder), to="hf", output=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}<start>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end>\n{% endfor %}{% if add_generation_prompt %}<start>model\n{% endif %}"
)
NUMBERED = "{% for m in messages %}{{ loop.index }}. {{ m['content'] }}\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "head", "system"),
    [
        (LLAMA3, "", True),
        (DEFAULT_SYSTEM, "<|im_start|>system\nBe kind.<|im_end|>\n", True),
        (GEMMA, "", False),
    ],
)
def test_a_chat_template_becomes_text_around_turns(tmp_path, template, head, system):
    turns = find_turns(load_tokenizer(save_tokenizer(tmp_path, template=template)))
    assert turns is not None
    assert (turns.head, turns.system is not None) == (head, system)


def test_a_template_that_does_more_is_left_to_ollama(tmp_path):
    assert find_turns(load_tokenizer(save_tokenizer(tmp_path, template=NUMBERED))) is None


def test_the_template_in_ollamas_language():
    turns = Turns("H{{", ("S", "s"), ("U", "u"), ("A", "a"), "A")
    assert go_template(turns) == (
        '{{ if not .System }}H{{ "{{" }}{{ end }}{{ range .Messages }}{{ if eq .Role "system" }}S{{ .Content }}s'
        '{{ else if eq .Role "user" }}U{{ .Content }}u{{ else if eq .Role "assistant" }}A{{ .Content }}a'
        "{{ end }}{{ end }}A"
    )


def test_an_ollama_folder_has_template_end_tokens_and_settings(tmp_path):
    folder = save_family(tmp_path / "model", "llama")
    save_gpt2_tokenizer(folder)
    settings = {"eos_token_id": open_folder(folder).config["eos_token_id"], "temperature": 0.7, "top_k": 20}
    (folder / "generation_config.json").write_text(json.dumps({**settings, "repetition_penalty": 1.1}))
    result = convert_model(str(folder), to="ollama", output=str(tmp_path / "out"), weights="q8_0")
    assert result.files == ("Modelfile", "model.gguf")
    lines = (result.output / "Modelfile").read_text().splitlines()
    assert lines[0] == "FROM ./model.gguf"
    assert lines[1].startswith('TEMPLATE """{{ range .Messages }}{{ if eq .Role "system" }}<|im_start|>system')
    assert lines[-4:] == [
        'PARAMETER stop "<|im_end|>"', "PARAMETER temperature 0.7", "PARAMETER top_k 20",
        "PARAMETER repeat_penalty 1.1",
    ]  # fmt: skip


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop(DOWN), f'"{DOWN}" is missing'),
        (lambda tensors: tensors.pop("model.norm.weight"), '"model.norm.weight" is missing'),
        (lambda tensors: tensors.update({DOWN: Tensor("F32", np.zeros((8, 4), np.float32))}), r"has shape \(8, 4\)"),
        (lambda tensors: tensors.update(extra=Tensor("F32", np.zeros(4, np.float32))), '"extra" has no place'),
    ],
)
def test_a_model_that_does_not_load_is_not_written_in_another_form(tiny_model_folder, tmp_path, change, words):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model_folder(layers=3), broken)
    tensors = dict(load_file(broken / "model.safetensors"))
    change(tensors)
    save_file(broken / "model.safetensors", tensors.items())
    for to in ("hf", "mlx", "gguf"):
        with pytest.raises(ModelError, match=words):
            convert_model(str(broken), to=to, output=str(tmp_path / "out"))
    with pytest.raises(ModelError, match=words):
        mlxlora.quantize(str(broken), scheme="affine-4bit-g32", output=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


@pytest.mark.parametrize("to", ["hf", "mlx"])
def test_weights_that_no_backend_would_load_are_not_copied(tiny_model_folder, affine_folder, tmp_path, to):
    for number, (source, name) in enumerate((
        (tiny_model_folder(), "model.norm.weight"), (affine_folder, "model.layers.0.mlp.up_proj.scales"),
    )):  # fmt: skip
        folder = tmp_path / f"{number}"
        shutil.copytree(source, folder)
        tensors = load_file(folder / "model.safetensors")
        tensors[name].data.reshape(-1)[0] = np.nan
        save_file(folder / "model.safetensors", tensors.items(), metadata={"format": "mlx"})
        with pytest.raises(ModelError, match="NaN or infinity"):
            convert_model(str(folder), to=to, output=str(tmp_path / "out"))
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("family", "keys"), [("gpt_neox", "rotary_emb_base, rotary_pct"), ("lfm2", "block_dim")])
def test_keys_that_mlx_lm_needs_and_a_config_lacks_are_named(tiny_model_folder, tmp_path, family, keys):
    folder = shutil.copytree(tiny_model_folder(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    usual = {
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": True,
    }
    config |= {"model_type": family, **usual}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"config\.json lacks .*, which mlx-lm") as caught:
        load("mlx", folder)
    assert caught.value.code == "E302"
    assert all(key in str(caught.value) for key in keys.split(", "))
