"""What configs of real families hold beyond the plain case: windows, rope kinds, biases, scaled embeddings."""

from __future__ import annotations

import json

import numpy as np
import pytest

import mlxlora
from shared.adapters.spec import resolve
from shared.config import AdapterConfig
from shared.convert.weights import write_plain
from shared.data.batch import make_batch
from shared.errors import CapabilityError, ModelError
from shared.experts import is_expert
from shared.families import PROVEN, UNIFORM, windows_of, with_old_keys
from shared.folder import open_folder
from shared.registry import BACKENDS
from shared.schemes import parse_scheme
from shared.strict import check_length
from shared.tensors import read_header, read_tensor, save_file
from shared.types import Sampling
from tests import tolerances
from tests.architectures import (
    ARCHITECTURES,
    EXPERTS,
    LLAMA3_ROPE,
    USUAL,
    Trial,
    alike,
    examine,
    load,
    mlx_lm_logits,
    rows,
    save,
    wanted_log_probs,
    written,
)

CASES = {
    "llama bias": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama head_dim": ("llama", {"head_dim": 32}),
    "llama llama3 rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama attention dropout": ("llama", {"attention_dropout": 0.5}),
    "qwen2 big rope base": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "mistral window": ("mistral", {"sliding_window": 40}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "gemma2": (
        "gemma2",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "final_logit_softcapping": 5.0, "sliding_window": 40},
    ),
    "granite": ("granite", {"logits_scaling": 4.0, "embedding_multiplier": 3.0}),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.title)
def test_the_table_of_architectures_says_what_is_found_by_trying(architecture):
    """To write it anew: python -m tests.architectures."""
    found = examine(architecture)
    assert "no" not in {verdict for cells in found.values() for verdict in cells.values()}  # without a reason
    assert found == written()[architecture.title]


def test_families_without_a_note_are_those_of_the_table():
    assert {architecture.family for architecture in ARCHITECTURES} == PROVEN


@pytest.mark.parametrize("backend", sorted(BACKENDS))
@pytest.mark.parametrize("case", CASES)
def test_log_probs_are_those_of_transformers(tmp_path, make_examples, backend, case):
    folder = save(tmp_path / "model", *CASES[case])
    examples = make_examples([30, 40, 17])
    found = load(backend, folder).log_probs(make_batch(examples, range(3)))
    np.testing.assert_allclose(found, wanted_log_probs(folder, examples), atol=2 * tolerances.LOGITS)


@pytest.mark.parametrize("backend", sorted(BACKENDS))
@pytest.mark.parametrize("case", ["mistral window", "gemma2"])
def test_rows_beyond_a_window_are_exact(tmp_path, make_examples, backend, case):
    folder = save(tmp_path / "model", *CASES[case])
    examples = make_examples([90, 300])  # MLX computes rows of more than 256 tokens by another function
    model = load(backend, folder)
    check_length(model.info, 300, what="train.jsonl:1")
    found = np.concatenate([model.log_probs(make_batch([example], [0])) for example in examples])
    np.testing.assert_allclose(found, wanted_log_probs(folder, examples), atol=2 * tolerances.LOGITS)


@pytest.mark.parametrize("case", ["mistral window", "gemma2"])
def test_tokens_generated_beyond_a_window_are_those_of_transformers(tmp_path, case):
    import torch
    from transformers import AutoModelForCausalLM

    folder, prompt = save(tmp_path / "model", *CASES[case]), list(range(3, 40))
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    wanted = plain.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None)
    sampling = Sampling(max_tokens=20, temperature=0.0, seed=0, stop_tokens=())
    for backend in sorted(BACKENDS):
        found = [token.token for token in load(backend, folder).generate([prompt], sampling)]
        assert found == wanted[0, len(prompt) :].tolist()


def test_rows_beyond_a_window_that_nobody_applies_are_refused_on_mlx(tmp_path):
    kinds = {"layer_types": ["sliding_attention", "sliding_attention"], "sliding_window": 40}
    config = json.loads((save(tmp_path / "model", "seed_oss", {"head_dim": 16}) / "config.json").read_text()) | kinds
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    model = load("mlx", tmp_path / "model")
    with pytest.raises(ModelError, match="sliding window of 40 tokens"):
        check_length(model.info, 90, what="train.jsonl:1")
    check_length(model.info, 40, what="train.jsonl:1")


@pytest.mark.parametrize("name", ["mistral", "gemma2", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "phi3"])
@pytest.mark.parametrize("listed", [True, False], ids=["layer_types", "older config"])
def test_windows_of_every_layer_are_those_of_transformers(name, listed):
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {
        **USUAL,
        "num_hidden_layers": 4,
        "sliding_window": 7,
        "use_sliding_window": True,
        "max_window_layers": 3,
    }
    config = AutoConfig.for_model(name, **settings, **(EXPERTS if "moe" in name else {"head_dim": 16}))
    layers = AutoModelForCausalLM.from_config(config).get_decoder().layers
    own = None if name in UNIFORM else lambda layer: getattr(layer.self_attn, "sliding_window", None)
    wanted = [config.sliding_window if own is None else own(layer) or None for layer in layers]
    written = config.to_dict() | ({} if listed else {"layer_types": None})
    assert windows_of(written | {"use_sliding_window": getattr(config, "use_sliding_window", True)}) == wanted


@pytest.mark.parametrize("case", ["gemma2", "llama bias", "qwen3"])
def test_mlx_lm_folders_of_other_families_compute_alike(tmp_path, make_examples, case):
    from mlx_lm import convert

    folder = save(tmp_path / "model", *CASES[case])
    convert(str(folder), str(tmp_path / "quantized"), quantize=True, q_bits=4, q_group_size=32)
    batch = make_batch(make_examples([20, 33]), range(2))
    one, two = (load(backend, tmp_path / "quantized").log_probs(batch) for backend in sorted(BACKENDS))
    np.testing.assert_allclose(one, two, atol=2 * tolerances.LOGITS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantized_base_does_not_depend_on_what_the_run_computes_in(tmp_path, tiny_model_folder, dtype):
    scheme = parse_scheme("affine-4bit-g64")
    models = [load(backend, tiny_model_folder(), dtype=dtype, quantization=scheme) for backend in sorted(BACKENDS)]
    reference = dict(load("torch", tiny_model_folder(), quantization=scheme).tensors("base"))
    for model in models:
        for name, tensor in model.tensors("base"):
            if name.endswith((".scales", ".biases")) or reference[name].dtype == "U32":
                assert np.array_equal(tensor.data, reference[name].data), name


@pytest.mark.parametrize("case", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_written_experts_are_those_of_mlx_lm_on_both_backends(tmp_path, make_examples, case):
    import mlx.core as mx
    from mlx_lm.utils import load_model

    more = {"num_local_experts": 4, "num_experts_per_tok": 2} if case == "mixtral" else EXPERTS
    folder = save(tmp_path / "model", case, more)
    mlxlora.quantize(folder, scheme="affine-4bit-g32", output=tmp_path / "packed")
    examples = make_examples([20])
    one, two = (load(backend, tmp_path / "packed").log_probs(make_batch(examples, [0])) for backend in sorted(BACKENDS))
    np.testing.assert_allclose(one, two, atol=2 * tolerances.LOGITS)
    model, _ = load_model(tmp_path / "packed", lazy=False)
    tokens, at = examples[0].tokens, np.flatnonzero(examples[0].supervised)
    logits = np.array(model(mx.array([tokens.tolist()])).astype(mx.float32))[0, at - 1]
    theirs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    np.testing.assert_allclose(one, theirs[np.arange(len(at)), tokens[at]], atol=2 * tolerances.LOGITS)
    assert not [name for name in dict(read_header(tmp_path / "packed/model.safetensors")) if ".experts." in name]


def test_experts_that_cannot_all_be_quantized_are_refused_by_name(tmp_path):
    folder = save(tmp_path / "model", "qwen2_moe", EXPERTS)
    with pytest.raises(CapabilityError, match=r"switch_mlp.down_proj.*does not divide"):
        mlxlora.quantize(folder, scheme="affine-4bit-g64", output=tmp_path / "packed")
    with pytest.raises(CapabilityError, match="bitsandbytes knows linear layers only"):
        mlxlora.quantize(folder, scheme="nf4", output=tmp_path / "packed")
    with pytest.raises(ModelError, match="no matrix would be quantized to affine-4bit-g64"):
        mlxlora.quantize(folder, scheme="affine-4bit-g64", keep=["*"], output=tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
    mlxlora.quantize(folder, scheme="affine-4bit-g64", keep=["*.switch_mlp.*"], output=tmp_path / "packed")
    assert [load(backend, tmp_path / "packed").info.family for backend in sorted(BACKENDS)] == ["qwen2_moe"] * 2


def mixture(folder, **changes):
    """Write a small Mixtral, then change its config."""
    save(folder, "mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2})
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


def test_mixtures_of_a_family_without_a_known_layout_are_refused_by_name(tmp_path):
    with pytest.raises(CapabilityError, match=r'"olmoe" is a Mixture-of-Experts model \(4 experts\)'):
        open_folder(mixture(tmp_path / "model", model_type="olmoe"))


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_a_missing_expert_is_named(tmp_path, backend):
    file = mixture(tmp_path / "model") / "model.safetensors"
    tensors = {name: read_tensor(entry) for name, entry in read_header(file).items() if "experts.2.w3" not in name}
    save_file(file, tensors.items(), metadata={"format": "pt"})
    with pytest.raises(ModelError, match="is missing") as caught:
        load(backend, file.parent)
    assert "experts" in str(caught.value)


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_router_of_a_mixture_stays_as_it_is(tmp_path, backend):
    """With it experts whose widths do not divide into groups."""
    folder = mixture(tmp_path / "model")
    model = load(backend, folder, quantization=parse_scheme("affine-4bit-g64"))
    assert {name.rpartition(".")[2] for name in model.info.linears} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert {name for name in model.info.quantized if not is_expert(name)} == set(model.info.linears)
    assert sum(map(is_expert, model.info.quantized)) == 3 * model.info.num_layers
    wide = load(backend, folder, quantization=parse_scheme("affine-4bit-g128"))
    assert not any(map(is_expert, wide.info.quantized))
    assert any("not quantized: the experts" in note for note in wide.info.notes)
    with pytest.raises(CapabilityError, match="keep its 4 experts as different tensors"):
        resolve(AdapterConfig(type="none"), model.info)


@pytest.mark.parametrize(
    ("family", "settings", "what"),
    [
        ("qwen2_moe", {**EXPERTS, "norm_topk_prob": True}, "norm_topk_prob"),
        ("qwen3_moe", {**EXPERTS, "rope_parameters": LLAMA3_ROPE}, "rope scaling of type llama3"),
        ("glm", {"head_dim": 16}, "partial_rotary_factor 0.5"),
        ("phi3", {"sliding_window": None, "partial_rotary_factor": 0.5}, None),
        ("olmo2", {"rope_parameters": LLAMA3_ROPE}, None),
    ],
)
def test_settings_that_mlx_lm_leaves_out_are_refused_on_mlx(tmp_path, family, settings, what):
    folder = save(tmp_path / "model", family, settings)
    if what is None:
        load("mlx", folder)
        return
    with pytest.raises(CapabilityError, match=what):
        load("mlx", folder)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("stated", [True, None])
def test_a_tied_folder_that_stores_its_head_alone_computes_as_the_original(tmp_path, make_examples, family, stated):
    import mlx_lm

    folder, examples = (
        save(tmp_path / "model", family, {"tie_word_embeddings": True, "head_dim": 16}),
        make_examples([30]),
    )
    wanted = wanted_log_probs(folder, examples)
    file = folder / "model.safetensors"
    stored = {name: read_tensor(entry) for name, entry in read_header(file).items()}
    stored["lm_head.weight"] = stored.pop("model.embed_tokens.weight")
    save_file(file, stored.items(), metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": stated}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    for backend in sorted(BACKENDS):
        model = load(backend, folder)
        assert model.info.is_tied
        np.testing.assert_allclose(model.log_probs(make_batch(examples, [0])), wanted, atol=2 * tolerances.LOGITS)
    mlxlora.convert(folder, to="hf", output=tmp_path / "named")
    mlx_lm.load(str(tmp_path / "named"))  # it cannot read the folder itself
    config["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config))
    for backend in sorted(BACKENDS):
        with pytest.raises(ModelError, match=r"embed_tokens.weight\" is missing"):
            load(backend, folder)


def test_a_family_whose_module_ends_the_program_is_refused_on_mlx(tmp_path):
    with pytest.raises(ModelError, match='"olmo" needs a package that is not installed'):
        load("mlx", save(tmp_path / "model", "olmo", {}))


def test_experts_in_half_precision_are_refused_by_mlx_on_a_cpu(tmp_path):
    folder = mixture(tmp_path / "model")
    with pytest.raises(CapabilityError, match="in float32 only, not in bfloat16"):
        load("mlx", folder, dtype="bfloat16")
    load("torch", folder, dtype="bfloat16")


MIXED = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**EXPERTS, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64},
    "qwen3_moe": {**EXPERTS, "moe_intermediate_size": 64, "norm_topk_prob": True},  # its routers take 8 bits
}


@pytest.mark.parametrize("family", sorted(MIXED))
def test_mixtures_that_mlx_lm_quantized_load_and_train_alike(tmp_path, family):
    folder = quantized_mixture(tmp_path, family)
    trials = {backend: Trial(folder, backend, rows()) for backend in sorted(BACKENDS)}
    gradients = {}
    for backend, trial in trials.items():
        trial.model = load(backend, folder)
        assert alike(trial.logits(trial.ids), mlx_lm_logits(folder, None, trial.ids))
        gradients[backend] = trial.gradient([make_batch(trial.examples, range(len(trial.examples)))])[1]
        assert trial.trains()
    np.testing.assert_allclose(trials["mlx"].losses, trials["torch"].losses, rtol=tolerances.CURVE)
    largest = max(np.abs(array).max() for array in gradients["mlx"].values())
    for name, array in gradients["mlx"].items():
        np.testing.assert_allclose(gradients["torch"][name], array, atol=tolerances.GRADIENTS * largest, err_msg=name)


def test_packed_experts_are_the_folders_bytes_on_both_backends(tmp_path):
    import mlx.core as mx

    folder = quantized_mixture(tmp_path, "mixtral")
    name = "model.layers.1.block_sparse_moe.switch_mlp.down_proj"
    stored = {key: read_tensor(open_folder(folder).entries[f"{name}.{key}"]) for key in ("weight", "scales", "biases")}
    stack = load("torch", folder).zoo.model.layers[1].mlp.experts.down_proj
    ours = load("mlx", folder).zoo.model.layers[1].block_sparse_moe.switch_mlp.down_proj
    for key, tensor in stored.items():
        assert getattr(stack, key).numpy().tobytes() == np.array(ours[key]).tobytes() == tensor.data.tobytes()
    wanted = np.array(mx.dequantize(*(mx.array(tensor.data) for tensor in stored.values()), group_size=32, bits=4))
    assert np.array_equal(ours.stack(mx.float32), wanted)
    assert np.array_equal([stack.expert(number, stack.scales.dtype).numpy() for number in range(4)], wanted)


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_a_missing_stack_of_experts_is_named(tmp_path, backend):
    folder = quantized_mixture(tmp_path, "mixtral")
    file = folder / "model.safetensors"
    gone = "0.block_sparse_moe.switch_mlp.up"
    tensors = {name: read_tensor(entry) for name, entry in read_header(file).items() if gone not in name}
    save_file(file, tensors.items())
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelError, match=r"switch_mlp\.up_proj\.weight.* is missing"):
        load(backend, folder)


@pytest.mark.parametrize("family", sorted(MIXED))
def test_experts_quantized_at_load_are_the_same_codes_on_both_backends(tmp_path, family):
    import mlx.core as mx

    folder, scheme = save(tmp_path / "model", family, MIXED[family]), parse_scheme("affine-4bit-g32")
    mlx, torch = (load(backend, folder, quantization=scheme) for backend in ("mlx", "torch"))
    assert not any("experts" in note for note in (*mlx.info.notes, *torch.info.notes))
    block = mlx.zoo.model.layers[1]
    stacks = (block.block_sparse_moe if family == "mixtral" else block.mlp).switch_mlp
    for leaf in ("gate_proj", "up_proj", "down_proj"):
        other = getattr(torch.zoo.model.layers[1].mlp.experts, leaf)
        for key in ("weight", "scales", "biases"):
            assert np.array(stacks[leaf][key]).tobytes() == getattr(other, key).numpy().tobytes()
        assert mx.array_equal(
            stacks[leaf].stack(mx.float32).reshape(-1), other.decoded(other.scales.dtype).flatten().numpy()
        )
    examples = rows()
    batch = make_batch(examples, range(len(examples)))
    np.testing.assert_allclose(mlx.log_probs(batch), torch.log_probs(batch), atol=2 * tolerances.LOGITS)


def test_stacks_of_experts_are_written_only_as_they_are_and_not_read_in_float(tmp_path):
    from mlx_lm import convert

    folder = quantized_mixture(tmp_path, "mixtral")
    with pytest.raises(CapabilityError, match="quantized stacks") as caught:
        write_plain(open_folder(folder), {}, tmp_path, dtype=None)
    assert caught.value.code == "E405"
    convert(str(tmp_path / "float"), mlx_path=str(tmp_path / "stacked"))
    with pytest.raises(CapabilityError, match="stacked in float"):
        open_folder(tmp_path / "stacked")


def quantized_mixture(path, family):
    """Return a small mixture as `mlx_lm convert -q` writes it."""
    from mlx_lm import convert

    folder = save(path / "float", family, MIXED[family])
    file = folder / "config.json"
    file.write_text(json.dumps(with_old_keys(json.loads(file.read_text()))))
    convert(str(folder), mlx_path=str(path / "packed"), quantize=True, q_bits=4, q_group_size=32)
    return path / "packed"
