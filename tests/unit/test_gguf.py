"""GGUF files through the gguf library's own reader: every tensor, the metadata, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, quants

from shared.adapters.folder import read_adapter
from shared.convert.gguf_arch import rope_tensors
from shared.convert.gguf_blocks import encode_affine, exact_kind
from shared.convert.gguf_file import write_adapter, write_model
from shared.convert.gguf_tokenizer import NOT_COMPOSED, check_sentencepiece, merge_notes, piece_scores
from shared.data.tokenize import load_tokenizer
from shared.errors import AdapterError, CapabilityError, ModelError
from shared.folder import open_folder
from shared.quant.affine import AffineQuantizer
from shared.tensors import from_float32, load_file, save_file, to_float32
from shared.types import Scheme, Tensor
from tests.adapters import save_adapter
from tests.exports import save_family, save_gpt2_tokenizer


@pytest.fixture(scope="module")
def family_folder(tmp_path_factory):
    """Return a factory of tiny models of a family; each is written once and read only."""
    made: dict[str, Path] = {}

    def make(name: str, **options) -> Path:
        key = f"{name}{options}"
        if key not in made:
            made[key] = save_family(tmp_path_factory.mktemp(name) / "model", name, **options)
        return made[key]

    return make


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str], dict[str, object]]:
    """Return decoded tensors as float32, their types, and the metadata."""
    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    values = {
        tensor.name: quants.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        for tensor in reader.tensors
    }
    return values, {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}, fields


def interleaved(weight: np.ndarray, *, heads: int) -> np.ndarray:
    """Return rows with rotary pairs (i, i + d/2) side by side, head by head: the slow way."""
    result, d = np.empty_like(weight), len(weight) // heads
    for head in range(heads):
        for i in range(d // 2):
            result[head * d + 2 * i] = weight[head * d + i]
            result[head * d + 2 * i + 1] = weight[head * d + d // 2 + i]
    return result


NAMES = {
    "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "model.layers.": "blk.",
}  # fmt: skip


def expected(folder: Path, *, heads: tuple[int, int] | None = None) -> dict[str, np.ndarray]:
    """Return the tensors of a Llama-like folder under llama.cpp's names; heads of q and k for Llama's order."""
    found = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        value = to_float32(tensor)
        if heads and ("q_proj" in name or "k_proj" in name):
            value = interleaved(value, heads=heads["k_proj" in name])
        for theirs, own in NAMES.items():
            name = name.replace(theirs, own)
        found[name] = value
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_tensor_of_a_llama_is_there_in_its_own_dtype(family_folder, tmp_path, dtype):
    folder = family_folder("llama", dtype=dtype)
    assert write_model(open_folder(folder), tmp_path / "m.gguf", kind="auto") == ()
    values, types, fields = read(tmp_path / "m.gguf")
    wanted = expected(folder, heads=(4, 2))
    assert values.keys() == wanted.keys()
    for name, value in wanted.items():
        assert np.array_equal(values[name], value), name
        kind = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]
        assert types[name] == ("F32" if value.ndim == 1 else kind)
    assert fields["general.file_type"] == {"float32": 0, "float16": 1, "bfloat16": 32}[dtype]


def test_sizes_and_settings_are_those_of_the_config(family_folder, tmp_path):
    folder = family_folder("llama-linear")
    write_model(open_folder(folder), tmp_path / "m.gguf", kind="auto")
    fields = read(tmp_path / "m.gguf")[2]
    wanted = {
        "general.architecture": "llama", "general.type": "model", "llama.embedding_length": 64,
        "llama.block_count": 2, "llama.feed_forward_length": 128, "llama.context_length": 256,
        "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2, "llama.attention.key_length": 16,
        "llama.rope.dimension_count": 16, "llama.rope.freq_base": 10000.0, "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 2.0,
    }  # fmt: skip
    assert {key: fields.get(key) for key in wanted} == wanted
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert fields["llama.vocab_size"] == len(fields["tokenizer.ggml.tokens"])


@pytest.mark.parametrize(("family", "pre"), [("mistral", "gpt-2"), ("qwen2", "qwen2")])
def test_the_tokenizer_is_that_of_the_folder(family_folder, tmp_path, family, pre):
    folder = family_folder(family)
    write_model(open_folder(folder), tmp_path / "m.gguf", kind="auto")
    fields, inner = read(tmp_path / "m.gguf")[2], load_tokenizer(folder).inner
    key = "tokenizer.ggml."
    tokens, types = fields[f"{key}tokens"], fields[f"{key}token_type"]
    assert (fields[f"{key}model"], fields[f"{key}pre"]) == ("gpt2", pre)
    assert tokens[: len(inner)] == inner.convert_ids_to_tokens(range(len(inner)))
    assert tokens[len(inner) :] == [f"[PAD{n}]" for n in range(len(inner), len(tokens))]
    special = {*inner.all_special_ids, *inner.added_tokens_decoder}
    assert [n for n, kind in enumerate(types) if kind == 3] == sorted(special)
    assert [n for n, kind in enumerate(types) if kind == 5] == list(range(len(inner), len(tokens)))
    merges = json.loads(inner.backend_tokenizer.to_str())["model"]["merges"]
    assert fields[f"{key}merges"] == [" ".join(pair) for pair in merges]
    found = [fields[f"{key}{name}_token_id"] for name in ("bos", "eos", "padding")]
    assert found == [inner.bos_token_id, inner.eos_token_id, inner.pad_token_id]
    assert (fields[f"{key}add_bos_token"], fields[f"{key}add_eos_token"]) == (True, False)
    assert fields["tokenizer.chat_template"] == inner.chat_template


def test_a_sentencepiece_vocabulary_has_scores_in_the_order_of_its_merges(stored_model, tmp_path):
    folder = stored_model("stories260K")
    assert write_model(open_folder(folder), tmp_path / "m.gguf", kind="auto") == ()
    fields = read(tmp_path / "m.gguf")[2]
    key = "tokenizer.ggml."
    tokens, types, scores = (fields[key + name] for name in ("tokens", "token_type", "scores"))
    assert (fields[f"{key}model"], fields[f"{key}add_space_prefix"]) == ("llama", True)
    assert (types[0], types[1], types[3], types[300]) == (2, 3, 6, 1)
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    ranked = [scores[tokens.index("".join(pair))] for pair in merges]
    assert ranked == sorted(ranked, reverse=True)
    assert merge_notes({"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5}, [("a", "b"), ("b", "c"), ("ab", "c")])
    assert piece_scores(["a", "ab"], [("a", "b")]) == (-1.0, 0.0)


def test_gemma_norms_have_their_one_and_tied_heads_are_left_out(family_folder, tmp_path):
    folder = family_folder("gemma2")
    write_model(open_folder(folder), tmp_path / "m.gguf", kind="auto")
    values, _, fields = read(tmp_path / "m.gguf")
    stored = load_file(folder / "model.safetensors")
    assert "output.weight" not in values
    for theirs, own in (("post_feedforward_layernorm", "post_ffw_norm"), ("pre_feedforward_layernorm", "ffn_norm")):
        weight = to_float32(stored[f"model.layers.1.{theirs}.weight"])
        assert np.array_equal(values[f"blk.1.{own}.weight"], weight + np.float32(1))
    assert np.array_equal(values["blk.0.attn_q.weight"], stored["model.layers.0.self_attn.q_proj.weight"].data)
    assert fields["gemma2.attention.sliding_window"] == 8
    assert fields["gemma2.final_logit_softcapping"] == 5.0


def test_phi3_keeps_its_fused_matrices(family_folder, tmp_path):
    folder = family_folder("phi3")
    write_model(open_folder(folder), tmp_path / "m.gguf", kind="f16")
    values, types, _ = read(tmp_path / "m.gguf")
    stored = load_file(folder / "model.safetensors")
    for theirs, own in (("self_attn.qkv_proj", "attn_qkv"), ("mlp.gate_up_proj", "ffn_up")):
        weight = stored[f"model.layers.0.{theirs}.weight"].data
        assert np.array_equal(values[f"blk.0.{own}.weight"], weight.astype(np.float16).astype(np.float32))
        assert types[f"blk.0.{own}.weight"] == "F16"


def test_llama_3_frequencies_are_those_of_transformers(family_folder, tmp_path):
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from shared.convert.gguf_arch import read_facts

    folder = family_folder("llama-3")
    factors = rope_tensors(read_facts(open_folder(folder)))["rope_freqs.weight"]
    config = AutoConfig.from_pretrained(folder)
    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500.0 ** -(np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(plain / factors, wanted.numpy(), rtol=1e-6)
    assert len(set(factors.tolist())) > 2


def test_q8_0_is_within_half_a_step(family_folder, tmp_path):
    folder = family_folder("mistral")
    write_model(open_folder(folder), tmp_path / "m.gguf", kind="q8_0")
    values, types, fields = read(tmp_path / "m.gguf")
    for name, weight in expected(folder, heads=(4, 2)).items():
        if weight.ndim == 1:
            assert types[name] == "F32"
            continue
        assert types[name] == "Q8_0"
        step = np.abs(weight.reshape(-1, 32)).max(axis=1) / 127
        error = np.abs(values[name] - weight).reshape(-1, 32).max(axis=1)
        assert (error <= 0.51 * step + 1e-3 * np.abs(weight).max()).all()
    assert (fields["general.file_type"], fields["general.quantization_version"]) == (7, 2)


def affine(folder: Path, target: Path, *, group: int = 32, dtype: str = "float16") -> Path:
    import mlx_lm

    mlx_lm.convert(str(folder), mlx_path=str(target), quantize=True, q_bits=4, q_group_size=group, dtype=dtype)
    return target


def test_4_bit_groups_of_32_are_taken_over_exactly(family_folder, tmp_path):
    """mlx-lm's codes, scales and biases come out of gguf's own decoder, in float32."""
    folder = affine(family_folder("mistral"), tmp_path / "affine")
    assert write_model(open_folder(folder), tmp_path / "m.gguf", kind="auto") == ()
    values, types, fields = read(tmp_path / "m.gguf")
    opened = open_folder(folder)
    for theirs, own, heads in (("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2), ("v_proj", "attn_v", 0)):
        module = f"model.layers.1.self_attn.{theirs}"
        packed = opened.packed(module, shape=(64 if theirs == "q_proj" else 32, 64))
        exact = AffineQuantizer(packed.scheme).dequantize(widened(packed))
        weight = interleaved(exact.data, heads=heads) if heads else exact.data
        assert np.array_equal(values[f"blk.1.{own}.weight"], weight)
    assert {types[name] for name in values if values[name].ndim > 1} <= {"Q4_0", "Q4_1"}
    assert fields["general.file_type"] in (2, 3)


def widened(packed):
    """Return a packed weight with scales and biases in float32, so that decoding rounds nothing."""
    from dataclasses import replace

    wide = {key: Tensor("F32", to_float32(packed.arrays[key])) for key in ("scales", "biases")}
    return replace(packed, arrays={**packed.arrays, **wide}, dtype="F32")


def test_a_symmetric_grid_becomes_q4_0():
    scheme, random = Scheme("affine", 4, 32), np.random.default_rng(0)
    packed = AffineQuantizer(scheme).quantize(from_float32(random.standard_normal((4, 64)).astype(np.float32), "F16"))
    assert exact_kind(packed) == "q4_1"
    scales = np.float16(packed.arrays["scales"].data)
    from dataclasses import replace

    symmetric = replace(packed, arrays={**packed.arrays, "biases": Tensor("F16", scales * np.float16(-8))})
    assert exact_kind(symmetric) == "q4_0"
    wanted = AffineQuantizer(scheme).dequantize(widened(symmetric)).data
    from gguf import GGMLQuantizationType as Kind

    for kind, own in (("q4_0", Kind.Q4_0), ("q4_1", Kind.Q4_1)):
        assert np.array_equal(quants.dequantize(encode_affine(symmetric, kind), own), wanted)


def test_4_bits_that_do_not_fit_are_decoded_with_a_note_or_refused(family_folder, tmp_path):
    folder = affine(family_folder("mistral"), tmp_path / "affine", group=64)
    assert "written decoded" in write_model(open_folder(folder), tmp_path / "m.gguf", kind="auto")[0]
    with pytest.raises(CapabilityError, match="does not hold exactly"):
        write_model(open_folder(folder), tmp_path / "n.gguf", kind="q4_1")


def test_an_adapter_has_its_scale_in_alpha(family_folder, tmp_path):
    folder = family_folder("llama")
    adapter = save_adapter(tmp_path / "adapter", folder, use_rslora=True, rank=4, alpha=3)
    write_adapter(read_adapter(adapter), open_folder(folder), tmp_path / "a.gguf")
    values, types, fields = read(tmp_path / "a.gguf")
    assert (fields["general.type"], fields["adapter.type"], fields["general.architecture"]) == (
        "adapter", "lora", "llama",
    )  # fmt: skip
    assert fields["adapter.lora.alpha"] == 6.0  # llama.cpp: 6 / 4; rsLoRA: 3 / sqrt(4)
    assert set(types.values()) == {"F32"}
    stored = load_file(adapter / "adapter_model.safetensors")
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    assert np.array_equal(values["blk.0.attn_q.weight.lora_a"], stored[f"{module}.lora_A.weight"].data)
    wanted = interleaved(stored[f"{module}.lora_B.weight"].data, heads=4)
    assert np.array_equal(values["blk.0.attn_q.weight.lora_b"], wanted)
    assert len(values) == 2 * 14


def test_an_adapter_that_llama_cpp_cannot_hold_is_refused(family_folder, tmp_path):
    folder = family_folder("llama")
    dora = save_adapter(tmp_path / "dora", folder, use_dora=True)
    file = dora / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith("lora_B.weight")]:
        norm = Tensor("F32", np.ones(tensors[name].shape[0], np.float32))
        tensors[name.replace("lora_B.weight", "lora_magnitude_vector")] = norm
    file.unlink()
    save_file(file, tensors.items())
    with pytest.raises(CapabilityError, match="no DoRA"):
        write_adapter(read_adapter(dora), open_folder(folder), tmp_path / "a.gguf")
    other = save_adapter(tmp_path / "other", family_folder("phi3"))
    with pytest.raises(AdapterError, match="does not fit"):
        write_adapter(read_adapter(other), open_folder(folder), tmp_path / "b.gguf")


def copy(folder: Path, target: Path, **changes) -> Path:
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    config.update(changes)
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("llama", {"model_type": "starcoder2"}, '"starcoder2" cannot be exported'),
        ("llama", {"hidden_act": "relu"}, "another activation"),
        ("gemma2", {"query_pre_attn_scalar": 64}, "another query_pre_attn_scalar"),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, "another layer_types"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "another rope_type"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused_by_name(family_folder, tmp_path, family, changes, words):
    folder = copy(family_folder(family), tmp_path / "m", **changes)
    with pytest.raises(CapabilityError, match=words):
        write_model(open_folder(folder), tmp_path / "m.gguf", kind="auto")
    assert not (tmp_path / "m.gguf").exists()


def test_a_config_that_transformers_does_not_take_is_refused_on_one_line(family_folder, tmp_path):
    folder = copy(family_folder("llama"), tmp_path / "m", rms_norm_eps=None)
    with pytest.raises(ModelError, match="rms_norm_eps") as found:
        write_model(open_folder(folder), tmp_path / "m.gguf", kind="auto")
    assert "\n" not in found.value.what


def test_a_window_that_llama_cpp_does_not_apply_bounds_the_context(family_folder, tmp_path):
    folder = copy(family_folder("mistral"), tmp_path / "m", sliding_window=64)
    assert "cut to it: 64" in write_model(open_folder(folder), tmp_path / "m.gguf", kind="auto")[0]
    assert read(tmp_path / "m.gguf")[2]["llama.context_length"] == 64


def with_normalizer(folder: Path, normalizer: dict[str, object]) -> Path:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**tokenizer, "normalizer": normalizer}))
    return folder


def test_what_changes_a_text_before_it_is_cut_is_told_or_refused(family_folder, tmp_path):
    folder = with_normalizer(copy(family_folder("llama"), tmp_path / "m"), {"type": "NFC"})
    assert write_model(open_folder(folder), tmp_path / "m.gguf", kind="auto") == (NOT_COMPOSED,)
    lower = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}
    with pytest.raises(CapabilityError, match="Lowercase"):
        write_model(open_folder(with_normalizer(folder, lower)), tmp_path / "m.gguf", kind="auto")


def test_sentencepiece_with_other_replacements_is_refused():
    blanks = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    other = {"type": "Replace", "pattern": {"String": "a"}, "content": "b"}
    check_sentencepiece({"normalizer": blanks}, ())
    with pytest.raises(CapabilityError, match="Replace"):
        check_sentencepiece({"normalizer": {"type": "Sequence", "normalizers": [blanks, other]}}, ())


def test_tokenizers_that_llama_cpp_has_no_like_of_are_refused(family_folder, tmp_path):
    from tests.conftest import save_tokenizer

    folder = copy(family_folder("llama"), tmp_path / "m")
    save_tokenizer(folder)
    with pytest.raises(CapabilityError, match="does not cut text as this tokenizer does"):
        write_model(open_folder(folder), tmp_path / "m.gguf", kind="auto")
    larger = load_tokenizer(save_gpt2_tokenizer(folder)).inner
    larger.add_tokens([f"<extra {n}>" for n in range(20)])
    larger.save_pretrained(str(folder))
    with pytest.raises(CapabilityError, match="outside the model's vocabulary"):
        write_model(open_folder(folder), tmp_path / "m.gguf", kind="auto")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        write_model(open_folder(folder), tmp_path / "m.gguf", kind="auto")
