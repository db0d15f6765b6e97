"""Whatever stands in a file, a reader returns something sound or one of our errors; codecs keep their promises.

The same strategies run longer with `-m slow`.
"""

from __future__ import annotations

import copy
import json
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from shared.adapters.folder import read_as
from shared.adapters.names import MLX_LEAVES, mlx_name, peft_name, turned
from shared.adapters.schema import CONFIG_FILE, KNOWN, MLX_KNOWN
from shared.adapters.spec import leaves_of
from shared.convert.adapters import FILES, OTHER, convert_adapter
from shared.errors import MlxloraError
from shared.quant.folders import READERS, find_places
from shared.quant.quanto_folder import MAP
from shared.quant.sound import find_fault
from shared.registry import QUANTIZERS, find_quantizer
from shared.schemes import named_schemes
from shared.tensors import NUMPY, Entry, from_float32, is_finite, read_header, read_tensor, save_file, to_float32
from shared.types import Packed, Scheme, Tensor

SCHEMES = [scheme for scheme in named_schemes().values() if scheme.codec in QUANTIZERS]
DTYPES = st.sampled_from(["F32", "F16", "BF16"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
LONG = settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def headers(draw) -> bytes:
    """Draw the bytes of a file: a sound header with a few of its parts replaced, or with bytes changed."""
    entries, at = {}, 0
    for number in range(draw(st.integers(0, 3))):
        dtype = draw(st.sampled_from(sorted(NUMPY)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        size = int(np.prod(shape)) * np.dtype(NUMPY[dtype]).itemsize
        entries[f"t{number}"] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    for _ in range(draw(st.integers(0, 2))):
        target = entries
        if entries and draw(st.booleans()):
            target = entries[draw(st.sampled_from(sorted(entries)))]
        key = draw(st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "t0", "t9"]))
        if isinstance(target, dict):
            target[key] = draw(JSON)
    text = json.dumps(entries).encode()
    file = bytearray(struct.pack("<Q", len(text)) + text + b"\0" * at)
    for _ in range(draw(st.integers(0, 3))):
        file[draw(st.integers(0, len(file) - 1))] = draw(st.integers(0, 255))
    return bytes(file[: draw(st.integers(0, len(file)))] if draw(st.booleans()) else file)


def check_header(raw: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(raw)
        try:
            entries = read_header(path)
        except MlxloraError:
            return
        for entry in entries.values():
            assert read_tensor(entry).data.nbytes == entry.end - entry.start <= len(raw)
        with safe_open(path, "np") as file:  # what we take, the library takes
            assert set(file.keys()) == set(entries)


@QUICK
@given(headers())
def test_a_header_is_read_as_the_library_reads_it_or_refused(raw):
    check_header(raw)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@LONG
@given(headers())
def test_a_header_is_read_as_the_library_reads_it_or_refused_long(raw):
    check_header(raw)


@QUICK
@given(st.binary(max_size=200))
def test_any_bytes_are_a_file_or_refused(raw):
    check_header(raw)


Q, EMBEDDING = "model.layers.0.self_attn.q_proj", "model.embed_tokens"
MORE = (f"{Q}.lora_magnitude_vector", f"{EMBEDDING}.lora_embedding_A", f"{EMBEDDING}.lora_embedding_B", "", "lora_A")
SETTINGS = (*sorted(KNOWN | MLX_KNOWN), "use_dora", "bias", "lora_bias", "modules_to_save", "target_parameters")
PLAUSIBLE = JSON | st.sampled_from(
    [1, 2, 3, 16, 0.5, -1, "LORA", "lora", "dora", "none", "gaussian", "pissa", [], [0], {"q_proj": 2}, {"(a+)+$": 1},
     {"rank": 2, "scale": 2.0, "dropout": 0.0}, {"rank": 2, "scale": 1.5, "keys": ["q_proj"]}, 10**400]
)  # fmt: skip


@st.composite
def adapters(draw) -> tuple[str, dict, dict[str, Tensor]]:
    """Draw the form of an adapter, its config, and its tensors: those of a sound one, some replaced or gone."""
    form = draw(st.sampled_from(["peft", "mlx"]))
    config: dict = {"peft_type": "LORA", "r": 2, "lora_alpha": 3}
    if form == "mlx":
        config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": {"rank": 2, "scale": 2.0}}
    keys = st.sampled_from(SETTINGS) | st.text(max_size=6)
    config |= draw(st.just({}) | st.dictionaries(keys, PLAUSIBLE, max_size=2))
    shapes = {f"{Q}.lora_A": (2, 8), f"{Q}.lora_B": (6, 2)}
    for leaf in draw(st.just([]) | st.lists(st.sampled_from(MORE), max_size=2)):
        shapes[leaf] = tuple(draw(st.lists(st.integers(0, 8), max_size=3)))
    for name in draw(st.just([]) | st.lists(st.sampled_from(sorted(shapes)), max_size=1)):
        shapes[name] = tuple(draw(st.lists(st.integers(0, 8), max_size=3)))
    tensors = {}
    for name, shape in shapes.items():
        values = from_float32(
            np.random.default_rng(len(tensors)).standard_normal(shape).astype(np.float32), draw(DTYPES)
        )
        known = name.rpartition(".")[2] in MLX_LEAVES
        named = (peft_name(name) if form == "peft" else mlx_name(name)) if known else name or "x"
        tensors[named] = values if form == "peft" or len(shape) != 2 else turned(values)
    return form, config, tensors


def check_adapter(form, config, tensors) -> None:
    """What is read of one library's folder is written for the other, and read there as the same adapter."""
    with tempfile.TemporaryDirectory() as name:
        source, target = Path(name) / "source", Path(name) / "target"
        source.mkdir()
        (source / CONFIG_FILE).write_text(json.dumps(config))
        save_file(source / FILES[form], tensors.items())
        before = {file.name: file.read_bytes() for file in source.iterdir()}
        try:
            convert_adapter(source, target, to=OTHER[form])
            found, made = read_as(source, FILES[form]), read_as(target, FILES[OTHER[form]])
        except MlxloraError:
            return
        finally:
            assert {file.name: file.read_bytes() for file in source.iterdir()} == before
        assert made.spec.modules == found.spec.modules
        for module in found.spec.modules:
            (A, B), (C, D) = ([to_float32(one.tensors[f"{module}.{leaf}"]) for leaf in leaves_of(module)]
                              for one in (found, made))  # fmt: skip
            wanted = found.spec.scale_of(module) * (B @ A)
            np.testing.assert_allclose(made.spec.scale_of(module) * (D @ C), wanted, rtol=1e-2, atol=1e-30)


@QUICK
@given(adapters())
def test_an_adapter_is_the_same_in_the_other_library_or_refused(drawn):
    check_adapter(*drawn)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@LONG
@given(adapters())
def test_an_adapter_is_the_same_in_the_other_library_or_refused_long(drawn):
    check_adapter(*drawn)


MODULE = "model.layers.0.mlp.down_proj"
LEAVES = ("trits", "weight", "scales", "biases", "SCB", "weight_scale", "weight._data", "weight._data._data",
          "weight._scale", "weight._shift", "weight.absmax", "weight.quant_map",
          "weight.quant_state.bitsandbytes__nf4")  # fmt: skip
KEYS = ("group_size", "bits", "mode", "quant_method", "load_in_4bit", "load_in_8bit", "linear_class",
        "quantization_mode", "use_rms_norm", "llm_int8_skip_modules", MODULE)  # fmt: skip
VALUES = JSON | st.sampled_from(
    [2, 3, 4, 8, 16, 32, 64, True, False, "affine", "mxfp4", "nvfp4", "mxfp8", "autobitlinear", "bitlinear", "offline",
     *READERS, {"group_size": 32, "bits": 4}, {"weights": "qint4", "activations": "none"}, {"weights": "qint8"}]
)  # fmt: skip


@st.composite
def folders(draw) -> tuple[dict, dict, object]:
    """Draw a config's quantization entries, tensors of one module, and what quanto_qmap.json holds (None: absent)."""
    entry = draw(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=5) | JSON)
    key = draw(st.sampled_from(["quantization", "quantization_config"]))
    config = {"hidden_size": 64, "intermediate_size": draw(VALUES), "num_attention_heads": draw(VALUES), key: entry}
    if draw(st.booleans()):
        config["quantization_config"] = draw(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4))
    shapes = st.lists(st.sampled_from([0, 1, 2, 4, 8, 16, 32, 64, 128, 2**20]), max_size=3)
    tensors = {
        f"{MODULE}.{leaf}": (draw(st.sampled_from(sorted(NUMPY))), tuple(draw(shapes)))
        for leaf in draw(st.lists(st.sampled_from(LEAVES), unique=True, max_size=5))
    }
    stated = draw(st.none() | st.dictionaries(st.just(MODULE) | st.text(max_size=4), VALUES, max_size=2) | JSON)
    return config, tensors, stated


def check_folder(config, tensors, stated) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, entries, at = Path(name), {}, 0
        for key, (dtype, shape) in tensors.items():
            size = int(np.prod(shape)) * np.dtype(NUMPY[dtype]).itemsize
            entries[key] = Entry(dtype, shape, at, at + size, folder / "model.safetensors")
            at += size
        (folder / "model.safetensors").write_bytes(b"\1" * min(at, 4096))
        if stated is not None:
            (folder / MAP).write_text(json.dumps(stated))
        before = copy.deepcopy(config)
        try:
            places = find_places(folder, config, entries)
        except MlxloraError:
            return
        finally:
            assert repr(config) == repr(before)
        for place in places.values():
            held = sum(entries[key].end - entries[key].start for key in place.names.values())
            rows, width = place.stored.shape
            assert rows > 0
            assert width > 0
            assert rows * width * place.stored.scheme.bits <= 8 * held


@QUICK
@given(folders())
def test_a_quantized_folder_is_understood_or_refused(drawn):
    check_folder(*drawn)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@LONG
@given(folders())
def test_a_quantized_folder_is_understood_or_refused_long(drawn):
    check_folder(*drawn)


@st.composite
def weights(draw) -> Tensor:
    """Draw a weight of (8, 128): any finite values, many of them special."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = random.standard_normal((8, 128)).astype(np.float32) * np.float32(10.0 ** draw(st.integers(-6, 3)))
    for _ in range(draw(st.integers(0, 4))):
        row = draw(st.integers(0, 7))
        special = draw(st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-30, 3e4, -3e4, 2.0**-14, 0.1]))
        values[row, : draw(st.integers(1, 128))] = special
    return from_float32(values, draw(DTYPES))


def check_codec(scheme: Scheme, weight: Tensor) -> None:
    quantizer = find_quantizer(scheme)
    packed = quantizer.quantize(weight)
    assert find_fault(packed) is None
    decoded = quantizer.dequantize(packed)
    assert decoded.shape == weight.shape
    assert decoded.dtype == packed.dtype
    assert is_finite(decoded)
    values, found = to_float32(weight), to_float32(decoded)
    assert np.abs(found).max() <= np.abs(values).max() * 1.6 + 1e-6
    held = sum(tensor.data.nbytes for tensor in packed.arrays.values())
    assert quantizer.num_bytes((8, 128), scale_bytes=4 if weight.dtype == "F32" else 2) == held


@QUICK
@given(st.sampled_from(SCHEMES), weights())
def test_codecs_give_finite_values_of_no_greater_size(scheme, weight):
    check_codec(scheme, weight)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@LONG
@given(st.sampled_from(SCHEMES), weights())
def test_codecs_give_finite_values_of_no_greater_size_long(scheme, weight):
    check_codec(scheme, weight)


@QUICK
@given(st.sampled_from([scheme for scheme in SCHEMES if not scheme.solver]), weights(), st.integers(0, 2**32 - 1))
def test_any_packed_bytes_decode_to_the_right_shape_or_have_a_fault(scheme, weight, seed):
    quantizer, random = find_quantizer(scheme), np.random.default_rng(seed)
    packed = quantizer.quantize(weight)
    arrays = {
        key: tensor if tensor.data.dtype.kind == "f" or tensor.dtype == "BF16" else Tensor(
            tensor.dtype, random.integers(0, 256, tensor.data.nbytes, dtype=np.uint8).view(tensor.data.dtype)
            .reshape(tensor.shape)
        )
        for key, tensor in packed.arrays.items()
    }  # fmt: skip
    changed = Packed(packed.scheme, arrays, packed.shape, packed.dtype)
    if find_fault(changed) is None:
        assert quantizer.dequantize(changed).shape == weight.shape
