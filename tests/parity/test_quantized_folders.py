"""Folders that `quantize` writes load in the library that owns the format, and here on both backends."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from shared.convert.quantize import quantize
from shared.data.batch import make_batch
from shared.folder import open_folder
from shared.jobs.parity import parity
from shared.registry import BACKENDS, find_backend, find_quantizer
from shared.tensors import to_float32
from tests import tolerances

Q = "model.layers.0.self_attn.q_proj"
EVERY = ["affine-4bit-g64", "mxfp4", "nvfp4", "mxfp8", "ternary-g64", "ternary-g64 in base 3",
         "nf4-dq", "int8", "bitnet", "quanto-qint2",
         "quanto-qint8", "quanto-qfloat8"]  # fmt: skip


@pytest.fixture
def make_folder(tiny_model_folder, tmp_path):
    """Return a writer of quantized folders: a one-layer model, its scheme and other options."""

    def make(scheme, *, tied=False, dtype="float32", **options):
        source = tiny_model_folder(layers=1, tied=tied, dtype=dtype)
        name = scheme.removesuffix(" in base 3")
        options |= {"base3": True} if name != scheme else {}
        quantize(str(source), scheme=name, output=tmp_path / scheme, **options)
        return tmp_path / scheme

    return make


def ours(folder, module):
    """Return what a folder's module decodes to by the NumPy codec, float32."""
    found = open_folder(folder)
    packed = found.packed(module, shape=found.places[module].stored.shape)
    return to_float32(find_quantizer(packed.scheme).dequantize(packed))


@pytest.mark.parametrize("scheme", EVERY)
def test_both_backends_read_what_is_written(make_folder, make_examples, scheme):
    folder = make_folder(scheme, tied=scheme == "mxfp8")
    batch, found = make_batch(make_examples([9, 14]), range(2)), {}
    for name in BACKENDS:
        model = find_backend(name).load_model(folder, dtype="float32", quantization=None, recompute=False, device="cpu")
        held = open_folder(folder)
        stored = {module: str(place.stored.scheme) for module, place in held.places.items()}
        assert stored.items() <= dict(model.info.quantized).items()  # torch names a tied head too
        tensors = dict(model.tensors("base"))
        packed = held.packed(Q, shape=held.places[Q].stored.shape)
        for key, tensor in packed.arrays.items():
            assert tensors[f"{Q}.{key}"].data.tobytes() == tensor.data.tobytes()
        found[name] = model.log_probs(batch)
    np.testing.assert_allclose(found["mlx"], found["torch"], atol=tolerances.LOGITS)


@pytest.mark.parametrize(
    ("scheme", "options"),
    [("ternary-g64 in base 3", {}), ("quanto-qint8", {"overrides": ["lm_head=quanto-qint8"]})],
)
def test_a_packed_head_is_found_where_config_json_does_not_say_tied(make_folder, make_examples, scheme, options):
    folder, batch = make_folder(scheme, **options), make_batch(make_examples([9, 14]), range(2))
    config = json.loads((folder / "config.json").read_text())

    def log_probs(name):
        model = find_backend(name).load_model(folder, dtype="float32", quantization=None, recompute=False, device="cpu")
        return model.log_probs(batch)

    said = {name: log_probs(name) for name in BACKENDS}
    del config["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))
    for name in BACKENDS:
        np.testing.assert_array_equal(log_probs(name), said[name])


@pytest.mark.parametrize("scheme", ["affine-5bit-g32", "mxfp4", "nvfp4", "mxfp8", "ternary-g64", "affine-4bit-g64+hqq"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_mlx_lm_loads_its_folders(make_folder, scheme, tied):
    import mlx.core as mx
    from mlx_lm.utils import load_model

    folder = make_folder(scheme, tied=tied, overrides=["*.o_proj=affine-8bit-g32"], keep=["*.k_proj"])
    model, _ = load_model(folder, lazy=False)
    attention = model.model.layers[0].self_attn
    assert attention.o_proj.bits == 8
    assert not hasattr(attention.k_proj, "scales")
    for module, layer in ((Q, attention.q_proj), ("model.embed_tokens", model.model.embed_tokens)):
        decoded = mx.dequantize(
            layer.weight, layer.scales, layer.get("biases"), group_size=layer.group_size, bits=layer.bits,
            mode=layer.mode, dtype=mx.float32,
        )  # fmt: skip
        assert np.array_equal(np.array(decoded), ours(folder, module))
    assert mx.isfinite(model(mx.array([[1, 2, 3]]))).all().item()


@pytest.mark.parametrize("scheme", ["nf4-dq", "fp4", "int8"])
def test_transformers_loads_bitsandbytes_folders(make_folder, make_examples, scheme):
    from transformers import AutoModelForCausalLM

    folder = make_folder(scheme)
    theirs = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"}, dtype=torch.float32)
    layer = theirs.model.layers[0].self_attn.q_proj
    assert "Linear4bit" in type(layer).__name__ or "Linear8bitLt" in type(layer).__name__
    if scheme != "int8":
        from bitsandbytes.functional import dequantize_4bit

        decoded = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float().numpy()
        assert np.array_equal(decoded, ours(folder, Q))
    else:
        assert np.array_equal(
            layer.weight.data.numpy(), open_folder(folder).packed(Q, shape=(64, 64)).arrays["weight"].data
        )


@pytest.mark.parametrize("scheme", ["quanto-qint8", "quanto-qfloat8"])
def test_optimum_quanto_loads_its_folders(make_folder, scheme):
    from optimum.quanto import QuantizedModelForCausalLM

    folder = make_folder(scheme, tied=True, overrides=["*.o_proj=quanto-qint8"], keep=["*.k_proj"])
    theirs = QuantizedModelForCausalLM.from_pretrained(str(folder))
    attention = theirs.model.layers[0].self_attn
    assert np.array_equal(attention.q_proj.weight.dequantize().detach().numpy(), ours(folder, Q))
    assert type(attention.o_proj).__name__ == "QLinear"
    assert type(attention.k_proj) is torch.nn.Linear


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["quanto-qint2", "quanto-qint4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_optimum_quanto_loads_its_packed_folders(make_folder, scheme, dtype):
    """Its C++ unpacking is built on first use, about a minute."""
    from optimum.quanto import QuantizedModelForCausalLM

    folder = make_folder(scheme, dtype=dtype)
    attention = QuantizedModelForCausalLM.from_pretrained(str(folder)).model.layers[0].self_attn
    assert np.array_equal(attention.q_proj.weight.dequantize().detach().float().numpy(), ours(folder, Q))


def test_what_optimum_quanto_saves_is_read(tiny_model_folder, make_examples, tmp_path):
    """qint4 with groups, and qint8: saved by its own helper, decoded by ours to its own values."""
    from optimum.quanto import QuantizedModelForCausalLM, qint8
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tiny_model_folder(layers=1), dtype=torch.float32)
    theirs = QuantizedModelForCausalLM.quantize(plain, weights=qint8, exclude=["lm_head"])
    wanted = theirs.model.layers[0].mlp.down_proj.weight.dequantize().detach().numpy()
    theirs.save_pretrained(str(tmp_path / "saved"))
    found = ours(tmp_path / "saved", "model.layers.0.mlp.down_proj")
    assert np.array_equal(found, wanted)


def test_transformers_and_mlx_lm_load_bitnet_folders(make_folder):
    from mlx_lm.utils import load_model
    from transformers import AutoModelForCausalLM

    folder = make_folder("bitnet", keep=["*.k_proj"])
    with torch.compiler.set_stance("force_eager"):  # its unpacking is compiled, which takes a minute
        attention = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).model.layers[0].self_attn
    assert type(attention.q_proj).__name__ == "AutoBitLinear"
    decoded = attention.q_proj.weight.detach().float().numpy() * attention.q_proj.weight_scale.float().numpy()
    assert np.array_equal(decoded, ours(folder, Q))
    assert type(attention.k_proj) is torch.nn.Linear
    model, _ = load_model(folder, lazy=True)
    layer = model.model.layers[0].self_attn.q_proj
    assert not layer.invert_weight_scales
    assert np.array_equal(np.array(layer.weight), open_folder(folder).packed(Q, shape=(64, 64)).arrays["weight"].data)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["nvfp4", "quanto-qint4", "quanto-qfloat8", "bitnet", "nf4-dq"])
def test_a_written_folder_of_a_real_model_trains_alike_on_both_backends(make_config, stored_model, tmp_path, scheme):
    quantize(str(stored_model("TinyStories-656K")), scheme=scheme, output=tmp_path / "folder")
    before = {file.name: file.read_bytes() for file in (tmp_path / "folder").iterdir()}
    result = parity(make_config(tmp_path / "folder"), updates=10)
    assert result.ok, [vars(gap) for gap in result.gaps if not gap.ok]
    assert {file.name: file.read_bytes() for file in (tmp_path / "folder").iterdir()} == before
