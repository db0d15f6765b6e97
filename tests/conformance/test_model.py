"""A model behind the line: canonical names, strict loading, log-probabilities, generation, dropout, decoding."""

from __future__ import annotations

import numpy as np
import pytest

from shared import seeds
from shared.data.batch import make_batch
from shared.errors import AdapterError
from shared.quant.affine import AffineQuantizer
from shared.tensors import from_float32, to_float32
from shared.types import Sampling, Scheme, Tensor
from tests import tolerances

SCHEMES = [Scheme("affine", bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]


def test_names_are_hugging_face_names_and_shapes_are_out_in(make_lab, tiny_model_folder):
    from safetensors import safe_open

    lab = make_lab()
    with safe_open(tiny_model_folder() / "model.safetensors", "np") as file:
        wanted = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert {name: tensor.shape for name, tensor in lab.model.tensors("base")} == wanted
    assert {f"{name}.weight": shape for name, shape in lab.model.info.linears.items()}.items() <= wanted.items()


def test_adapter_tensors_are_pefts_a_and_b(make_lab):
    lab = make_lab(rank=4, targets=["q_proj", "down_proj"])
    shapes = {name: tensor.shape for name, tensor in lab.model.tensors("adapter")}
    assert shapes["model.layers.0.self_attn.q_proj.lora_A"] == (4, 64)
    assert shapes["model.layers.1.mlp.down_proj.lora_A"] == (4, 128)
    assert shapes["model.layers.1.mlp.down_proj.lora_B"] == (64, 4)
    assert len(shapes) == 8


def test_adapter_loading_is_strict(make_lab):
    lab = make_lab()
    good = dict(lab.model.tensors("adapter"))
    name = next(iter(good))
    missing = {key: tensor for key, tensor in good.items() if key != name}
    extra = {**good, "model.layers.9.self_attn.q_proj.lora_A": good[name]}
    shape = {**good, name: Tensor("F32", np.zeros((3, 3), dtype=np.float32))}
    nan = {**good, name: Tensor("F32", np.full(good[name].shape, np.nan, dtype=np.float32))}
    for bad, word in ((missing, "lacks"), (extra, "no place"), (shape, "shape"), (nan, "NaN")):
        with pytest.raises(AdapterError, match=word):
            lab.model.load_tensors("adapter", bad)
    assert all(np.array_equal(tensor.data, good[key].data) for key, tensor in lab.model.tensors("adapter"))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize(("tied", "lengths"), [(True, [7, 23, 11]), (False, [7, 23, 11]), (False, [300, 23, 290])])
def test_log_probs_are_those_of_transformers(make_lab, tiny_model_folder, make_examples, family, tied, lengths):
    import torch
    from transformers import AutoModelForCausalLM

    folder = tiny_model_folder(family, tied=tied)
    examples = make_examples(lengths)
    lab = make_lab(folder, warm=False)
    found = lab.model.log_probs(make_batch(examples, range(3)))
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wanted = []
    for example in examples:
        with torch.no_grad():
            logp = plain(torch.from_numpy(example.tokens)[None].long()).logits[0].log_softmax(-1).numpy()
        at = np.flatnonzero(example.supervised)
        wanted.append(logp[at - 1, example.tokens[at]])
    np.testing.assert_allclose(found, np.concatenate(wanted), atol=tolerances.LOGITS)


def test_what_stands_in_the_padding_is_never_read(make_lab, make_examples):
    lab = make_lab()
    batch = make_batch(make_examples([6, 30]), range(2))
    before = lab.model.log_probs(batch)
    batch.tokens_BT[0, 6:] = 77
    assert np.array_equal(lab.model.log_probs(batch), before)


def test_greedy_generation_with_a_cache_equals_the_argmax_without(make_lab, make_examples):
    lab = make_lab()
    prompt = make_examples([9])[0].tokens.tolist()
    tokens = [t.token for t in lab.model.generate([prompt], Sampling(12, 0.0, 0, stop_tokens=()))]
    sequence = list(prompt)
    for token in tokens:
        scores = all_log_probs(lab, sequence)
        assert token == int(np.argmax(scores))
        sequence.append(token)


def all_log_probs(lab, sequence):
    """Return (V,) log-probabilities of what follows, each candidate scored as a target."""
    from shared.types import Batch

    vocabulary = lab.model.info.vocab_size
    T = len(sequence)
    batch = Batch(
        tokens_BT=np.array([sequence], dtype=np.int32),
        lengths_S=np.array([T], dtype=np.int32),
        starts_S=np.zeros(1, dtype=np.int32),
        slots_S=np.zeros(1, dtype=np.int32),
        positions_N=np.full(vocabulary, T - 1, dtype=np.int32),
        targets_N=np.arange(vocabulary, dtype=np.int32),
        weights_N=np.ones(vocabulary, dtype=np.float32),
    )
    return lab.model.log_probs(batch)


def test_end_token_stops_and_is_marked(make_lab, make_examples):
    lab = make_lab()
    prompt = make_examples([9])[0].tokens.tolist()
    free = [t.token for t in lab.model.generate([prompt], Sampling(6, 0.0, 0, stop_tokens=()))]
    found = list(lab.model.generate([prompt], Sampling(6, 0.0, 0, stop_tokens=(free[2],))))
    stop = free.index(free[2])
    assert [t.token for t in found] == free[: stop + 1]
    assert [t.stopped for t in found] == [False] * stop + [True]


def test_same_seed_same_sample(make_lab, make_examples):
    lab = make_lab()
    prompt = make_examples([9])[0].tokens.tolist()
    runs = [[t.token for t in lab.model.generate([prompt], Sampling(16, 1.0, seed, ()))] for seed in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_decoded_weights_are_those_of_the_codec_bit_for_bit(backend, scheme, dtype):
    rng = np.random.default_rng(scheme.bits * scheme.group_size)
    weight = from_float32(rng.standard_normal((48, 256)).astype(np.float32), dtype)
    quantizer = AffineQuantizer(scheme)
    packed = quantizer.quantize(weight)
    found, wanted = backend.decode(packed), quantizer.dequantize(packed)
    assert found.dtype == wanted.dtype == dtype
    assert np.array_equal(found.data.view(np.uint8), wanted.data.view(np.uint8))


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_dropout_masks_are_those_of_the_specification_bit_for_bit(backend, p):
    options = {
        "seed": 5,
        "step": 17,
        "name": "model.layers.3.mlp.up_proj",
        "slots": [0, 3, 15],
        "shape": (33, 96),
        "p": p,
    }
    found = backend.dropout_mask(**options)
    assert found.dtype == bool
    assert np.array_equal(found, seeds.dropout_mask(**options))
    assert abs(1 - found.mean() - p) < 0.02


def test_probe_says_what_runs_where(backend):
    found = backend.probe()
    assert found.available
    assert found.device in ("cpu", "gpu")
    assert found.reason
    assert {"float32", "bfloat16"} <= set(found.dtypes)
    assert "affine" in found.schemes
    assert "sft" in found.objectives
    assert found.versions


@pytest.mark.parametrize("scheme", [Scheme("affine", 4, 64), Scheme("affine", 8, 32)], ids=str)
def test_quantized_base_computes_with_the_decoded_weights(make_lab, make_examples, tiny_model_folder, tmp_path, scheme):
    """A folder whose linears hold the decoded values gives the same log-probabilities."""
    import shutil

    from shared.tensors import load_file, save_file

    source = tiny_model_folder()
    folder = shutil.copytree(source, tmp_path / "decoded")
    quantizer = AffineQuantizer(scheme)
    tensors = load_file(source / "model.safetensors")
    lab = make_lab(quantization=scheme, warm=False)
    for name in lab.model.info.quantized:
        tensors[f"{name}.weight"] = quantizer.dequantize(quantizer.quantize(tensors[f"{name}.weight"]))
    save_file(folder / "model.safetensors", tensors.items(), metadata={"format": "pt"})
    batch = make_batch(make_examples([13, 8]), range(2))
    plain = make_lab(folder, warm=False)
    np.testing.assert_allclose(lab.model.log_probs(batch), plain.model.log_probs(batch), atol=tolerances.LOGITS)
    assert to_float32(tensors["model.norm.weight"]).any()
