"""Training over a quantized base: every scheme that a backend decodes, at load and from a folder.

Each test trains on both backends and asks four things: the loss curves agree, the packed bytes are those of before, the
adapter comes back from a file bit for bit, and gives the same numbers there.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from shared.adapters.spec import initial_adapter, resolve
from shared.config import AdapterConfig, named_schemes
from shared.data.batch import micro_batches
from shared.data.layout import Layout
from shared.registry import BACKENDS, QUANTIZERS, find_backend
from shared.tensors import load_file, save_file
from tests import tolerances

LENGTHS = [5, 19, 8, 31]
UPDATES = 5
# One per family in the default suite; the others are marked slow.
QUICK = {"nf4-dq", "fp4", "int8", "mxfp4", "ternary-g64", "quanto-qint4", "quanto-qfloat8", "affine-4bit-g64+hqq"}
KNOWN = [
    pytest.param(scheme, id=name, marks=[] if name in QUICK else [pytest.mark.slow])
    for name, scheme in named_schemes().items()
    if scheme.codec in QUANTIZERS
]


def load(name, folder, scheme):
    """Return a backend's model of a folder with an adapter of rank 4 on all linear layers, at its start."""
    model = find_backend(name).load_model(folder, dtype="float32", quantization=scheme, recompute=False, device="cpu")
    spec = resolve(AdapterConfig(rank=4), model.info)
    model.attach(spec)
    model.load_tensors("adapter", initial_adapter(spec, model.info.linears, seed=0))
    return model


def digest(model):
    words = b"".join(tensor.data.tobytes() for _, tensor in sorted(model.tensors("base"), key=lambda pair: pair[0]))
    return hashlib.sha256(words).hexdigest()


def train(name, folder, scheme, *, batches, update, file):
    """Return the loss of a few updates; checks bytes, saving and reloading on the way."""
    model = load(name, folder, scheme)
    before, trainer = digest(model), find_backend(name).trainer(model, objective="sft", state="float32")
    losses = [trainer.step(batches, update(step=step, lr=5e-3)).result().loss for step in range(1, UPDATES + 1)]
    assert digest(model) == before, "training changed packed bytes"
    save_file(file, model.tensors("adapter"))
    again = load(name, folder, scheme)
    again.load_tensors("adapter", load_file(file))
    for (one, left), (other, right) in zip(model.tensors("adapter"), again.tensors("adapter"), strict=True):
        assert one == other
        assert left.data.tobytes() == right.data.tobytes()
    assert np.array_equal(model.log_probs(batches[0]), again.log_probs(batches[0]))
    assert losses[-1] < losses[0]
    return losses, model.info.quantized


def check(folder, scheme, *, make_examples, make_update, tmp_path, expected):
    batches = micro_batches(make_examples(LENGTHS), Layout(64))
    runs = [
        train(name, folder, scheme, batches=batches, update=make_update, file=tmp_path / f"{name}.safetensors")
        for name in sorted(BACKENDS)
    ]
    (one, names), (other, _) = runs
    assert np.allclose(one, other, rtol=tolerances.CURVE, atol=0)
    assert runs[0][1] == runs[1][1]
    assert set(names.values()) == {str(expected)}


@pytest.mark.parametrize("scheme", KNOWN)
def test_a_base_quantized_at_load_trains_alike_on_both_backends(
    tiny_model_folder, make_examples, make_update, tmp_path, scheme
):
    folder = tiny_model_folder()
    check(folder, scheme, make_examples=make_examples, make_update=make_update, tmp_path=tmp_path, expected=scheme)


FOLDERS = {
    "nf4-dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": "bfloat16"},
    "int8": {"load_in_8bit": True},
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_of_bitsandbytes_trains_alike_on_both_backends(
    tiny_model_folder, make_examples, make_update, tmp_path, kind
):
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config, folder = BitsAndBytesConfig(**FOLDERS[kind]), tmp_path / "packed"
    model = AutoModelForCausalLM.from_pretrained(
        tiny_model_folder(), quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32
    )
    model.save_pretrained(folder)
    check(folder, None, make_examples=make_examples, make_update=make_update, tmp_path=tmp_path, expected=kind)
