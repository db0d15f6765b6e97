"""Training over a quantized base: every scheme that a backend decodes, at load and from a folder.

Each test trains on both backends and asks four things: the loss curves agree, the packed bytes are those of before, the
adapter comes back from a file bit for bit, and gives the same numbers there.
"""

from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import pytest

from shared.adapters.spec import initial_adapter, resolve
from shared.config import AdapterConfig
from shared.data.batch import micro_batches
from shared.data.layout import Layout
from shared.jobs.parity import parity
from shared.registry import BACKENDS, QUANTIZERS, find_backend
from shared.schemes import named_schemes
from shared.tensors import load_file, save_file
from shared.types import Method
from tests import tolerances

LENGTHS = [5, 19, 8, 31]
UPDATES = 5
# One per family in the default suite; the others are marked slow.
QUICK = {
    "bitnet",
    "nf4-dq",
    "fp4",
    "int8",
    "mxfp4",
    "ternary-g64",
    "quanto-qint4",
    "quanto-qfloat8",
    "affine-4bit-g64+hqq",
}
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
    before, trainer = digest(model), find_backend(name).trainer(model, objective="sft", optimizer=Method("adamw"))
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
    assert set(names.values()) == expected


@pytest.mark.parametrize("scheme", KNOWN)
def test_a_base_quantized_at_load_trains_alike_on_both_backends(
    tiny_model_folder, make_examples, make_update, tmp_path, scheme
):
    folder = tiny_model_folder()
    check(
        folder, scheme, make_examples=make_examples, make_update=make_update, tmp_path=tmp_path, expected={str(scheme)}
    )


FOLDERS = {
    "nf4-dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": "bfloat16"},
    "int8": {"load_in_8bit": True},
}


def save_packed(source, folder, kind):
    """Return a folder that transformers wrote with bitsandbytes' layers."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(**FOLDERS[kind])
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32
    )
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_of_bitsandbytes_trains_alike_on_both_backends(
    tiny_model_folder, make_examples, make_update, tmp_path, kind
):
    folder = save_packed(tiny_model_folder(), tmp_path / "packed", kind)
    check(folder, None, make_examples=make_examples, make_update=make_update, tmp_path=tmp_path, expected={kind})


def mixed(path, _module):
    """Return how mlx-lm shall quantize a module: a scheme of its own for each kind, one left to infer, one kept out."""
    schemes = {
        "q_proj": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
        "k_proj": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
        "v_proj": False,
        "lm_head": {"group_size": 64, "bits": 6},
    }
    return next((scheme for name, scheme in schemes.items() if path.endswith(name)), True)


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "mxfp8", "mixed"])
def test_a_folder_of_mlx_lm_trains_alike_on_both_backends(
    tiny_model_folder, make_examples, make_update, tmp_path, mode
):
    from mlx_lm import convert

    folder, options = tmp_path / "packed", {"q_mode": mode}
    if mode == "mixed":
        options = {"q_mode": "nvfp4", "quant_predicate": mixed}
    convert(str(tiny_model_folder()), str(folder), quantize=True, **options)
    expected = {mode} if mode != "mixed" else {"mxfp4", "mxfp8", "nvfp4", "affine-6bit-g64"}
    if mode == "mixed":  # as other writers do: mlx-lm then goes by the shapes
        config = json.loads((folder / "config.json").read_text())
        for key in ("quantization", "quantization_config"):
            config[key] = {name: entry for name, entry in config[key].items() if not name.endswith("q_proj")}
        (folder / "config.json").write_text(json.dumps(config))
    check(folder, None, make_examples=make_examples, make_update=make_update, tmp_path=tmp_path, expected=expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("name", ["TinyStories-656K", "stories260K"])
def test_a_real_model_packed_by_bitsandbytes_trains_alike(make_config, stored_model, tmp_path, name, kind):
    source = stored_model(name)
    folder = save_packed(source, tmp_path / "packed", kind)
    for file in source.glob("*token*"):
        shutil.copy(file, folder)
    result = parity(make_config(folder, "adapter.dropout=0.1"), updates=30)
    assert result.ok, [vars(gap) for gap in result.gaps if not gap.ok]
