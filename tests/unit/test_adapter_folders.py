"""Adapter folders of others: what is read, what is refused by name, and how conversion leaves no half a folder."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mlxlora import convert, evaluate, fuse, generate, merge, train
from shared.adapters.folder import read_adapter
from shared.adapters.names import mlx_name, own_name, own_name_of_mlx
from shared.adapters.writing import Facts, folded, mlx_keys, peft_targets, unfolded
from shared.errors import AdapterError, CapabilityError, ConfigError, ModelError
from shared.tensors import from_float32, save_file
from shared.types import Tensor

Q, HEAD, EMBEDDING = "model.layers.0.self_attn.q_proj", "lm_head", "model.embed_tokens"
PEFT = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "use_rslora": False}
MLX = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": {"rank": 2, "scale": 2.0, "dropout": 0.0}}


def filled(*shape, dtype="F32"):
    return from_float32(np.random.default_rng(0).standard_normal(shape).astype(np.float32), dtype)


def peft_folder(folder, config=PEFT, **tensors):
    folder.mkdir(parents=True, exist_ok=True)
    tensors = tensors or {f"{Q}.lora_A.weight": filled(2, 8), f"{Q}.lora_B.weight": filled(8, 2)}
    named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_file(folder / "adapter_model.safetensors", named.items(), metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def mlx_folder(folder, config=MLX, **tensors):
    folder.mkdir(parents=True, exist_ok=True)
    tensors = tensors or {f"{Q}.lora_a": filled(8, 2), f"{Q}.lora_b": filled(2, 8)}
    save_file(folder / "adapters.safetensors", tensors.items(), metadata={"format": "mlx"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("setting", "word"),
    [
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["mlp.experts.bias"]}, "target_parameters"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"use_qalora": True}, "use_qalora"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"a_setting_of_next_year": {"x": 1}}, "a_setting_of_next_year"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_of_peft_that_change_the_numbers_are_refused_by_name(tmp_path, setting, word):
    folder = peft_folder(tmp_path / "a", {**PEFT, **setting})
    for use in (read_adapter, lambda source: convert(source, to="mlx", output=tmp_path / "b")):
        with pytest.raises(CapabilityError, match=word):
            use(folder)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"merge_weights": None, "enable_lora": None},  # PEFT 0.2
        {"auto_mapping": {"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True}, "revision": None},
        {"target_modules": r"(?:.*?(?:language|text).*?(?:q_proj))", "loftq_config": {}, "layers_pattern": None},
        {"peft_version": "0.21.2", "eva_config": None, "runtime_config": {"ephemeral_gpu_offload": False}},
        {"megatron_core": "megatron.core", "qalora_group_size": 16, "a_setting_of_next_year": None},
    ],
)
def test_settings_that_change_nothing_are_read(tmp_path, settings):
    assert read_adapter(peft_folder(tmp_path / "a", {**PEFT, **settings})).spec.modules == (Q,)


def test_the_least_config_and_old_names_are_read(tmp_path):
    tensors = {f"{Q}.lora_A.default.weight": filled(8, 8), f"{Q}.lora_B.default.weight": filled(8, 8)}
    spec = read_adapter(peft_folder(tmp_path / "a", {"r": 8}, **tensors)).spec
    assert (spec.kind, spec.rank, spec.alpha) == ("lora", 8, 8.0)
    for leaf in ("lora_magnitude_vector", "lora_magnitude_vector.weight"):
        tensors = {f"{Q}.lora_A.weight": filled(2, 8), f"{Q}.lora_B.weight": filled(8, 2), f"{Q}.{leaf}": filled(8)}
        found = read_adapter(peft_folder(tmp_path / leaf, {**PEFT, "use_dora": True}, **tensors))
        assert found.spec.kind == "dora"
        assert found.tensors[f"{Q}.lora_magnitude_vector"].shape == (8,)


@pytest.mark.parametrize(
    ("config", "error", "word"),
    [
        ({"fine_tune_type": "full"}, CapabilityError, "full"),
        ({"lora_parameters": {"rank": 2, "alpha": 4}}, CapabilityError, "alpha"),
        ({"lora_parameters": {"rank": 2, "alpha": 4, "scale": 2.0}}, CapabilityError, "alpha"),
        ({"lora_parameters": {"rank": 2, "scale": 2.0, "use_rslora": True}}, CapabilityError, "use_rslora"),
        ({"modules_to_save": ["lm_head"]}, CapabilityError, "modules_to_save"),
        ({"lora_parameters": {"rank": 2}}, AdapterError, "rank and scale"),
        ({"lora_parameters": {"rank": 3, "scale": 2.0}}, AdapterError, "has rank 2"),
    ],
)
def test_settings_of_mlx_lm_that_change_the_numbers_are_refused_by_name(tmp_path, config, error, word):
    folder = mlx_folder(tmp_path / "a", {**MLX, **config})
    with pytest.raises(error, match=word):
        convert(folder, to="peft", output=tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("tensors", "word"),
    [
        ({"model.layers.0.mlp.switch_glu.up_proj.lora_a": (4, 2, 8), "x.lora_b": (2, 8)}, "experts"),
        ({"model.layers.0.mlp.switch_mlp.up_proj.lora_a": (8, 8), "x.lora_b": (2, 8)}, "experts"),  # old, flat
        ({f"{Q}.weight": (8, 8)}, '"model.layers.0.self_attn.q_proj.weight"'),
        (
            {f"{EMBEDDING}.lora_a": (9, 2), f"{EMBEDDING}.lora_b": (2, 8), f"{EMBEDDING}.m": (9,)},
            "DoRA on an embedding",
        ),
    ],
)
def test_tensors_of_mlx_lm_with_no_place_are_refused_by_name(tmp_path, tensors, word):
    folder = mlx_folder(tmp_path / "a", **{name: filled(*shape) for name, shape in tensors.items()})
    with pytest.raises(CapabilityError, match=word):
        convert(folder, to="peft", output=tmp_path / "b")


def test_pickles_and_archives_are_refused_with_how_to_convert(tmp_path):
    for name, word in (("adapter_model.bin", "safe_serialization"), ("adapters.npz", "save_safetensors")):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_bytes(b"\x80\x04K\x01.")
        (folder / "adapter_config.json").write_text("{}")
        with pytest.raises(AdapterError, match=word):
            convert(folder, to="mlx", output=tmp_path / "b")


def test_a_missing_half_and_numbers_that_are_none_are_refused(tmp_path):
    half = peft_folder(tmp_path / "a", **{f"{Q}.lora_A.weight": filled(2, 8)})
    with pytest.raises(AdapterError, match=r"q_proj.lora_B\" is missing"):
        convert(half, to="mlx", output=tmp_path / "b")
    bad = Tensor("F32", np.full((8, 2), np.nan, dtype=np.float32))
    nan = peft_folder(tmp_path / "c", **{f"{Q}.lora_A.weight": filled(2, 8), f"{Q}.lora_B.weight": bad})
    with pytest.raises(AdapterError, match="NaN"):
        convert(nan, to="mlx", output=tmp_path / "b")
    for pattern in ({"(a+)+b": 3}, {"[": 3}, {"x" * 300: 3}, {"q_proj": "three"}):
        with pytest.raises(AdapterError, match=r"rank_pattern|finite number"):
            read_adapter(peft_folder(tmp_path / "d", {**PEFT, "rank_pattern": pattern}))
    for rank in (0, -1, 1.5):
        with pytest.raises(AdapterError, match="whole number from 1"):
            read_adapter(peft_folder(tmp_path / "f", {**PEFT, "use_dora": True, "rank_pattern": {"q_proj": rank}}))
    for key in ("r", "lora_alpha"):
        with pytest.raises(AdapterError, match=f"{key} is 1000"):
            read_adapter(peft_folder(tmp_path / "e", {**PEFT, key: 10**400}))
    assert not (tmp_path / "b").exists()


def test_ends_need_a_base_that_says_whether_they_are_tied(tmp_path, tiny_model_folder):
    tensors = {f"{HEAD}.lora_A.weight": filled(2, 64), f"{HEAD}.lora_B.weight": filled(269, 2)}
    folder = peft_folder(tmp_path / "a", **tensors)
    with pytest.raises(CapabilityError, match="--base"):
        convert(folder, to="mlx", output=tmp_path / "b")
    with pytest.raises(CapabilityError, match="mlx-lm adapts embedding and head"):
        convert(folder, to="mlx", output=tmp_path / "b", base=tiny_model_folder(tied=True))
    assert convert(folder, to="mlx", output=tmp_path / "b", base=tiny_model_folder(tied=False)).modules == 1


def test_an_embedding_that_leaves_its_head_is_fused_into_two_tensors(tmp_path, tiny_model_folder):
    """The fused model says what base and adapter say together, on both backends; only plain weights can be parted."""
    tensors = {f"{EMBEDDING}.lora_embedding_A": filled(2, 269), f"{EMBEDDING}.lora_embedding_B": filled(64, 2)}
    folder, base = peft_folder(tmp_path / "a", **tensors), tiny_model_folder(tied=True)
    with pytest.raises(CapabilityError, match="makes two of embedding and head"):
        fuse(base, adapter=folder, output=tmp_path / "b", scheme="same")
    assert not (tmp_path / "b").exists()
    fuse(base, adapter=folder, output=tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["tie_word_embeddings"] is False
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "hello world"}))
    beside = evaluate(str(base), adapter=str(folder), data=str(rows), backend="torch").loss
    for backend in ("torch", "mlx"):
        fused = evaluate(str(tmp_path / "b"), data=str(rows), backend=backend).loss
        assert fused == pytest.approx(beside, rel=1e-6)
    copy = {**tensors, f"{EMBEDDING}.base_layer.weight": filled(269, 64)}
    with pytest.raises(CapabilityError, match="brings its own"):
        fuse(tiny_model_folder(tied=False), adapter=peft_folder(tmp_path / "c", **copy), output=tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_a_base_without_the_modules_is_refused(tmp_path, tiny_model_folder):
    name = "model.layers.7.self_attn.q_proj"
    folder = peft_folder(
        tmp_path / "a", **{f"{name}.lora_A.weight": filled(2, 8), f"{name}.lora_B.weight": filled(8, 2)}
    )
    with pytest.raises(AdapterError, match="no module"):
        convert(folder, to="mlx", output=tmp_path / "b", base=tiny_model_folder())


def test_an_adapter_of_another_architecture_is_refused_where_it_fits_unless_the_user_insists(
    tmp_path, tiny_model_folder, write_jsonl, monkeypatch
):
    """Llama and Mistral of one size: every matrix fits, and nothing of what was learnt is true."""
    base, other, seeded = tiny_model_folder(), tiny_model_folder("mistral"), tiny_model_folder(seed=3)
    common = {
        "data": str(write_jsonl({"text": "hello"})), "backend": "torch",
        "train": {"updates": 1, "batch_size": 1, "dtype": "float32"},
    }  # fmt: skip
    one, two, three = (
        train(model=str(model), output=str(tmp_path / f"run{n}"), **common).adapter
        for n, model in enumerate((base, other, seeded))
    )
    again = {**common, "model": str(other), "output": str(tmp_path / "run9"), "adapter": {"start": str(one)}}
    uses = [
        lambda: generate(str(other), "hello", adapter=str(one), backend="torch", max_tokens=1),
        lambda: fuse(other, adapter=one, output=tmp_path / "fused"),
        lambda: convert(one, to="mlx", output=tmp_path / "mlx", base=other),
        lambda: merge([one, two], output=tmp_path / "both"),
        lambda: train(**again),
    ]
    for use in uses:
        with pytest.raises(AdapterError, match=r"architectures?: model_type (llama, here|llama and) mistral") as error:
            use()
        assert error.value.code == "E312"
    assert not {path.name for path in tmp_path.iterdir()} & {"fused", "mlx", "both", "run9"}
    assert merge([one, three], output=tmp_path / "both").notes == (
        "the adapters were trained on different bases: their files differ",
    )
    monkeypatch.setenv("MLXLORA_ANY_BASE", "1")
    for use in uses[:-2]:
        use()


def test_a_target_is_never_overwritten_unasked_and_the_source_never(tmp_path):
    folder = peft_folder(tmp_path / "a")
    convert(folder, to="mlx", output=tmp_path / "b")
    before = {file.name: file.read_bytes() for file in (tmp_path / "b").iterdir()}
    with pytest.raises(ConfigError, match="--force"):
        convert(folder, to="mlx", output=tmp_path / "b")
    with pytest.raises(ConfigError, match="never changed"):
        convert(folder, to="mlx", output=folder, force=True)
    with pytest.raises(ConfigError, match="mlx already"):
        convert(tmp_path / "b", to="mlx", output=tmp_path / "c")
    convert(folder, to="mlx", output=tmp_path / "b", force=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "b").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_force_never_puts_an_adapter_in_a_models_place(tmp_path):
    folder, model = peft_folder(tmp_path / "a"), tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no folder of one adapter"):
        convert(folder, to="mlx", output=model, force=True)
    with pytest.raises(ConfigError, match="no folder of one adapter"):
        merge([str(folder)], output=model, force=True)
    assert [file.name for file in model.iterdir()] == ["config.json"]


@pytest.mark.parametrize("change", [{"origin": 7}, {"origin": {"format": "peft"}}, {"origin": {"format": ["peft"]}}, 3])
def test_notes_that_somebody_changed_are_not_followed(tmp_path, change):
    convert(peft_folder(tmp_path / "a"), to="mlx", output=tmp_path / "b")
    config = json.loads((tmp_path / "b/adapter_config.json").read_text())
    (tmp_path / "b/adapter_config.json").write_text(json.dumps({**config, "mlxlora": change}))
    result = convert(tmp_path / "b", to="peft", output=tmp_path / "c")
    assert not result.restored
    assert read_adapter(tmp_path / "c").spec == read_adapter(tmp_path / "a").spec


def test_names_go_there_and_back():
    assert own_name_of_mlx(mlx_name("model.language_model.layers.1.mlp.up_proj.lora_A")) == (
        "model.language_model.layers.1.mlp.up_proj.lora_A"
    )
    assert mlx_name("model.language_model.layers.1.mlp.up_proj.lora_A").startswith("language_model.model.layers.1.")
    assert own_name("base_model.model.model.embed_tokens.lora_embedding_A") == "model.embed_tokens.lora_embedding_A"


def test_layers_are_said_as_each_library_says_them():
    def modules(*layers, parts=("self_attn.q_proj", "mlp.up_proj")):
        return [f"model.layers.{n}.{part}" for n in layers for part in parts]

    assert mlx_keys(modules(0, 1), Facts()) == (-1, ["mlp.up_proj", "self_attn.q_proj"])
    assert mlx_keys(modules(2, 3), Facts(num_layers=4)) == (2, ["mlp.up_proj", "self_attn.q_proj"])
    assert mlx_keys(modules(2), Facts(num_layers=4))[1] == modules(2, parts=("mlp.up_proj", "self_attn.q_proj"))
    assert mlx_keys(modules(2, 3), Facts())[0] == -1  # whole paths: nobody says how many layers there are
    assert peft_targets(modules(2, 3), Facts()) == (["q_proj", "up_proj"], [2, 3])
    assert peft_targets(modules(0, 1), Facts(num_layers=2)) == (["q_proj", "up_proj"], None)
    assert peft_targets([*modules(0), "lm_head"], Facts()) == ([*modules(0), "lm_head"], None)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("ratio", [0.5, 4.0, 1 / 3, 1.7, 0.0123])
def test_what_is_folded_comes_back_within_a_rounding(dtype, ratio):
    B = filled(50, 40, dtype=dtype)
    back = unfolded(folded(B, ratio), ratio, dtype=dtype)
    assert back.dtype == dtype
    off = back.data.view(f"<i{back.data.itemsize}").astype(int) - B.data.view(f"<i{back.data.itemsize}").astype(int)
    assert np.abs(off).max() <= (1 if dtype == "F32" and ratio not in (0.5, 4.0) else 0)


def test_a_damaged_base_that_an_adapter_names_is_an_error(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "llama"}')
    (base / "model.safetensors").write_bytes(b"nothing")
    source = peft_folder(tmp_path / "peft", {**PEFT, "base_model_name_or_path": str(base)})
    for to in ("mlx", "gguf"):
        with pytest.raises(
            ModelError, match=r"the base that the adapter names is damaged: .*model\.safetensors"
        ) as found:
            convert(source, to=to, output=tmp_path / to)
        assert found.value.exit_code == 3
        assert not (tmp_path / to).exists()
    (base / "config.json").unlink()  # nothing is there: some other machine's folder
    convert(source, to="mlx", output=tmp_path / "mlx")


def test_a_run_folder_or_an_adapter_in_a_models_place_is_told_with_the_right_one(tmp_path, tiny_model_folder):
    full, adapted = tmp_path / "full", tmp_path / "adapted"
    for folder in (full / "model", adapted):
        folder.mkdir(parents=True)
    (full / "model" / "config.json").write_text("{}")
    adapter = peft_folder(adapted / "adapter")
    for folder, words in ((full, f"use {full}/model"), (adapted, f"--adapter {adapter}"), (adapter, f"{adapter}; or")):
        with pytest.raises(ModelError, match="not a model") as error:
            generate(str(folder), "hello", backend="torch")
        assert words in (error.value.fix or "")
    with pytest.raises(AdapterError, match="run folder with a whole model"):
        generate(str(tiny_model_folder()), "hello", adapter=str(full), backend="torch")
