"""bitsandbytes folders: read as transformers wrote them, written so that transformers reads them."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from shared.errors import CapabilityError, ModelError
from shared.folder import open_folder
from shared.quant.bnb_folder import quantization_config, to_tensors
from shared.registry import find_backend, find_quantizer
from shared.tensors import load_file, save_file
from shared.types import Scheme, Tensor
from tests import tolerances
from torch_backend.state import from_torch

MODULE = "model.layers.0.self_attn.q_proj"
STATE = f"{MODULE}.weight.quant_state.bitsandbytes__nf4"
KINDS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": torch.bfloat16},
    "fp4-dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def written(tiny_model_folder, tmp_path_factory):
    """Return a factory of folders, one per kind, written by transformers and bitsandbytes; and of their models."""
    made = {}

    def make(kind):
        if kind not in made:
            config, folder = BitsAndBytesConfig(**KINDS[kind]), tmp_path_factory.mktemp(kind)
            model = AutoModelForCausalLM.from_pretrained(
                tiny_model_folder(), quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32
            )
            model.save_pretrained(folder)
            made[kind] = folder, model
        return made[kind]

    return make


def their_weight(module):
    """Return what bitsandbytes takes a layer's weight for."""
    from bitsandbytes import functional

    weight = module.weight
    if weight.dtype == torch.int8:
        return functional.int8_vectorwise_dequant(
            weight.data, weight.SCB if weight.SCB is not None else module.state.SCB
        )
    return functional.dequantize_4bit(weight.data, weight.quant_state)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_transformers_is_read_and_written_back_byte_for_byte(written, kind):
    folder, model = written(kind)
    found = open_folder(folder)
    tensors = load_file(folder / "model.safetensors")
    assert len(found.places) == 14
    for module, scheme in found.schemes.items():
        assert str(scheme) == kind
        packed = found.packed(module, shape=found.places[module].stored.shape)
        for backend in ("mlx", "torch"):
            decoded = find_backend(backend).decode(packed)
            assert np.array_equal(decoded.data, from_torch(their_weight(model.get_submodule(module))).data)
        again = to_tensors(module, packed)
        assert set(again) == {name for name in tensors if name.startswith(f"{module}.")}
        for name, tensor in again.items():
            assert tensor.data.tobytes() == tensors[name].data.tobytes(), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_ours_loads_in_transformers(tiny_model_folder, tmp_path, kind):
    source, folder = tiny_model_folder(), tmp_path / kind
    shutil.copytree(source, folder)
    name, _, double = kind.partition("-")
    scheme = Scheme(name, *((8, 0) if name == "int8" else (4, 64)), double=bool(double))
    quantizer, tensors, kept = find_quantizer(scheme), load_file(source / "model.safetensors"), {}
    for key in list(tensors):
        if key.endswith("_proj.weight"):
            kept[key.removesuffix(".weight")] = packed = quantizer.quantize(tensors.pop(key))
            tensors |= to_tensors(key.removesuffix(".weight"), packed)
    save_file(folder / "model.safetensors", tensors.items(), metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization_config(scheme, kept=["lm_head"], dtype="float32")
    (folder / "config.json").write_text(json.dumps(config))
    theirs = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"}, dtype=torch.float32)
    for module, packed in kept.items():
        assert np.array_equal(their_weight(theirs.get_submodule(module)).numpy(), quantizer.dequantize(packed).data), (
            module
        )
    if kind != "int8":  # whose layers round the activations to 8 bits too
        ours = find_backend("torch").load_model(
            folder, dtype="float32", quantization=None, recompute=False, device="cpu"
        )
        theirs.train()  # in eval mode its CPU kernel computes in bfloat16
        tokens = torch.arange(24)[None] * 7 % 200
        with torch.no_grad():
            gap = (ours.zoo(tokens).logits - theirs(tokens).logits).abs().max() / theirs(tokens).logits.abs().max()
        assert gap * 10 <= tolerances.LOGITS


# hostile and damaged folders


def change(folder, target, *, tensors=None, config=None):
    """Return a copy of a folder with tensors replaced (None: taken away) and keys of quantization_config set."""
    shutil.copytree(folder, target)
    if config:
        whole = json.loads((target / "config.json").read_text())
        whole["quantization_config"].update(config)
        (target / "config.json").write_text(json.dumps(whole))
    if tensors:
        held = load_file(target / "model.safetensors") | tensors
        kept = {name: tensor for name, tensor in held.items() if tensor is not None}
        save_file(target / "model.safetensors", kept.items(), metadata={"format": "pt"})
    return target


def state_of(**changes):
    """Return quant_state bytes of the module with some entries changed."""
    state = {
        "quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [64, 64], "nested_blocksize": 256,
        "nested_dtype": "float32", "nested_offset": 0.25,
    } | changes  # fmt: skip
    return {STATE: raw(json.dumps(state).encode())}


def raw(words):
    return Tensor("U8", np.frombuffer(words, dtype=np.uint8))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (state_of(shape=[64, 65]), r"q_proj.weight\" is U8"),
        (state_of(shape=[64]), "shape"),
        (state_of(shape=[64, -64]), "shape"),
        (state_of(shape=[2**40, 64]), "shape"),
        (state_of(shape="64x64"), "shape"),
        (state_of(blocksize=0), "blocksize 0"),
        (state_of(blocksize=128), "absmax"),
        (state_of(blocksize=True), "blocksize True"),
        (state_of(blocksize=64.0), "blocksize 64.0"),
        (state_of(dtype="float8"), "dtype 'float8'"),
        (state_of(quant_type="fp4"), "quant_type 'fp4'"),
        (state_of(nested_offset="x"), "nested_offset 'x'"),
        (state_of(nested_offset=float("nan")), "nested_offset nan"),
        (state_of(nested_blocksize=64), "nested_blocksize 64"),
        (state_of(nested_dtype="float16"), "nested_dtype 'float16'"),
        ({STATE: raw(b"{}")}, "quant_type None"),
        ({STATE: raw(b"[1, 2]")}, "does not hold a JSON object"),
        ({STATE: raw(b'{"shape": [64,')}, "does not hold a JSON object"),
        ({STATE: raw(b"\xff\xfe\x00\x01")}, "does not hold a JSON object"),
        ({STATE: raw(b"[" * 3000)}, "does not hold a JSON object"),
        ({STATE: raw(b" " * 5000)}, "at most"),
        ({STATE: Tensor("F32", np.zeros(4, np.float32))}, "F32"),
        ({f"{MODULE}.weight.absmax": None}, "absmax\" is missing"),
        ({f"{MODULE}.weight": None}, "weight\" is missing"),
        ({f"{MODULE}.weight": raw(b"\0" * 2047)}, "expected: 2048 bytes"),
        ({f"{MODULE}.weight.nested_absmax": Tensor("F32", np.zeros(2, np.float32))}, "nested_absmax"),
        ({f"{MODULE}.weight.quant_map": Tensor("F32", np.zeros(16, np.float32))}, "quant_map\" is a map"),
        ({f"{MODULE}.weight.nested_quant_map": None}, "nested_quant_map\" is missing"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_damaged_quant_state_gets_one_clear_sentence(written, tmp_path, tensors, message):
    with pytest.raises(ModelError, match=message) as caught:
        open_folder(change(written("nf4-dq")[0], tmp_path / "damaged", tensors=tensors))
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("nf4-dq", {"load_in_8bit": True}, "neither or both"),
        ("nf4-dq", {"load_in_4bit": False}, "neither or both"),
        ("nf4-dq", {"load_in_4bit": False, "load_in_8bit": True}, "no tensor is packed so"),
        ("int8", {"load_in_4bit": True, "load_in_8bit": False}, "no tensor is packed so"),
        ("nf4-dq", {"llm_int8_skip_modules": "lm_head"}, "llm_int8_skip_modules"),
        ("nf4-dq", {"llm_int8_skip_modules": [3]}, "llm_int8_skip_modules"),
    ],
)
def test_a_config_that_is_not_that_of_the_tensors_is_refused(written, tmp_path, kind, config, message):
    with pytest.raises(ModelError, match=message):
        open_folder(change(written(kind)[0], tmp_path / "damaged", config=config))


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ({f"{MODULE}.weight": None}, ModelError, "its weight is gone"),
        ({f"{MODULE}.weight": raw(b"\0" * 64)}, ModelError, "its weight is U8"),
        ({f"{MODULE}.SCB": Tensor("F32", np.zeros(63, np.float32))}, ModelError, "SCB"),
        ({f"{MODULE}.SCB": Tensor("F16", np.zeros(64, np.float16))}, ModelError, "SCB is F16"),
        ({f"{MODULE}.weight_format": Tensor("U8", np.array(2, np.uint8))}, CapabilityError, "weight_format"),
    ],
)
def test_damaged_int8_weights_get_one_clear_sentence(written, tmp_path, tensors, error, message):
    with pytest.raises(error, match=message):
        open_folder(change(written("int8")[0], tmp_path / "damaged", tensors=tensors))


def test_scales_that_are_not_finite_are_refused(written, tmp_path):
    scales = Tensor("F32", np.full(64, np.inf, np.float32))
    folder = open_folder(change(written("int8")[0], tmp_path / "damaged", tensors={f"{MODULE}.SCB": scales}))
    with pytest.raises(ModelError, match="NaN or infinity"):
        folder.packed(MODULE, shape=(64, 64))
