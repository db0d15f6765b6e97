"""`quantize` writes a new folder: what becomes of every module, what is refused, and nothing half-written."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

import mlxlora
from shared.convert.owners import find_owner
from shared.convert.quantize import pack_blocks, quantize
from shared.errors import ConfigError, ModelError
from shared.folder import open_folder
from shared.registry import find_quantizer
from shared.schemes import named_schemes
from shared.tensors import Tensor, from_float32, load_file, read_tensor, save_file
from shared.types import Scheme

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"

IN_BLOCKS = [scheme for scheme in named_schemes().values() if find_quantizer(scheme).by_rows]


def tree(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def schemes(folder):
    return {module: str(scheme) for module, scheme in open_folder(folder).schemes.items()}


def test_every_matrix_is_the_codecs_and_everything_else_is_copied(tiny_model_folder, tmp_path):
    source = tiny_model_folder()
    before = tree(source)
    result = quantize(str(source), scheme="affine-4bit-g32", output=tmp_path / "out")
    assert tree(source) == before
    plain, made = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    quantizer = find_quantizer(Scheme("affine", 4, 32))
    packed = {layer.module for layer in result.layers}
    assert {"lm_head", "model.embed_tokens", Q, DOWN} <= packed
    for name, tensor in plain.items():
        module = name.removesuffix(".weight")
        if module in packed:
            for key, wanted in quantizer.quantize(tensor).arrays.items():
                assert made[f"{module}.{key}"].data.tobytes() == wanted.data.tobytes()
        else:
            assert made[name].data.tobytes() == tensor.data.tobytes()
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert result.bits_per_weight == 4 + 2 * 32 / 32
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"] == {"group_size": 32, "bits": 4, "mode": "affine"} == config["quantization_config"]


@pytest.mark.parametrize("scheme", ["affine-3bit-g64+hqq", "mxfp4", "nvfp4", "mxfp8", "ternary-g64+twn"])
def test_a_folder_for_mlx_lm_reads_back_as_its_format(tiny_model_folder, tmp_path, scheme):
    quantize(str(tiny_model_folder(layers=1)), scheme=scheme, output=tmp_path / "out")
    stored = {"affine-3bit-g64+hqq": "affine-3bit-g64", "ternary-g64+twn": "affine-2bit-g64"}.get(scheme, scheme)
    assert set(schemes(tmp_path / "out").values()) == {stored}


@pytest.mark.parametrize("scheme", ["quanto-qint2", "quanto-qint8", "quanto-qfloat8", "bitnet", "int8", "nf4-dq"])
def test_other_owners_keep_embedding_and_head_as_floats(tiny_model_folder, tmp_path, scheme):
    result = quantize(str(tiny_model_folder(layers=1)), scheme=scheme, output=tmp_path / "out")
    found = schemes(tmp_path / "out")
    assert set(found.values()) == {scheme}
    assert {layer.module for layer in result.layers} - set(found) == {"lm_head", "model.embed_tokens"}
    assert all(layer.why for layer in result.layers if layer.scheme == "none")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ternary_weights_in_base_three_come_back_as_the_same_bytes(tiny_model_folder, tmp_path, dtype):
    source = str(tiny_model_folder(layers=1, dtype=dtype))
    quantize(source, scheme="ternary-g64", output=tmp_path / "affine")
    quantize(source, scheme="ternary-g64", output=tmp_path / "base3", base3=True)
    one, other = open_folder(tmp_path / "affine"), open_folder(tmp_path / "base3")
    assert set(schemes(tmp_path / "base3").values()) == {"ternary-g64"}
    for module, place in other.places.items():
        left, right = (found.packed(module, shape=place.stored.shape).arrays for found in (one, other))
        assert {key: tensor.data.tobytes() for key, tensor in left.items()} == {
            key: tensor.data.tobytes() for key, tensor in right.items()
        }
        trits = other.entries[f"{module}.trits"]
        assert 8 * (trits.end - trits.start) / np.prod(place.stored.shape) < 1.63


def test_a_base_three_folder_with_a_byte_of_no_trits_is_refused(tiny_model_folder, tmp_path):
    quantize(str(tiny_model_folder(layers=1)), scheme="ternary-g64", output=tmp_path / "out", base3=True)
    trits = open_folder(tmp_path / "out").entries[f"{Q}.trits"]
    with (tmp_path / "out" / "model.safetensors").open("r+b") as file:
        file.seek(trits.start)
        file.write(b"\xff")
    with pytest.raises(ModelError, match="base-3 digits"):
        open_folder(tmp_path / "out").packed(Q, shape=(64, 64))


def test_overrides_choose_by_pattern_and_the_last_one_counts(tiny_model_folder, tmp_path):
    quantize(
        str(tiny_model_folder()), scheme="affine-4bit-g64", output=tmp_path / "out", keep=["lm_head"],
        overrides=["*.mlp.*=mxfp8", "*.down_proj=affine-6bit-g32", "model.embed_tokens=none"],
    )  # fmt: skip
    found = schemes(tmp_path / "out")
    assert found[Q] == "affine-4bit-g64"
    assert found[DOWN] == "affine-6bit-g32"
    assert found["model.layers.0.mlp.up_proj"] == "mxfp8"
    assert not {"lm_head", "model.embed_tokens"} & set(found)
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert entry["lm_head"] is False
    assert entry[DOWN] == {"group_size": 32, "bits": 6, "mode": "affine"}


def test_a_plan_measures_every_layer_and_writes_nothing(tiny_model_folder, tmp_path):
    source = tiny_model_folder()
    errors = {}
    for scheme in ("affine-8bit-g32", "affine-4bit-g32", "ternary-g32"):
        result = quantize(str(source), scheme=scheme, output=None)
        assert result.output is None
        errors[scheme] = np.mean([layer.error for layer in result.layers])
    assert 0 < errors["affine-8bit-g32"] < 0.01 < errors["affine-4bit-g32"] < 0.2 < errors["ternary-g32"] < 0.7
    assert list(tmp_path.iterdir()) == []


def test_shards_stay_shards_and_say_where_each_tensor_is(tiny_model_folder, tmp_path):
    source = tmp_path / "sharded"
    shutil.copytree(tiny_model_folder(), source)
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file(source / file, ((name, Tensor(tensors[name].dtype, np.array(tensors[name].data))) for name in part))
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    quantize(str(source), scheme="affine-4bit-g64", output=tmp_path / "out")
    quantize(str(tiny_model_folder()), scheme="affine-4bit-g64", output=tmp_path / "whole")
    one, other = open_folder(tmp_path / "out"), open_folder(tmp_path / "whole")
    assert len(one.files) == 2
    assert one.entries.keys() == other.entries.keys()
    for name in one.entries:
        assert read_tensor(one.entries[name]).data.tobytes() == read_tensor(other.entries[name]).data.tobytes()
    stated = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert stated["weight_map"] == {name: entry.file.name for name, entry in sorted(one.entries.items())}
    assert stated["metadata"]["total_size"] == sum(entry.end - entry.start for entry in one.entries.values())


@pytest.mark.parametrize("scheme", IN_BLOCKS, ids=str)
def test_rows_packed_in_blocks_are_those_packed_at_once(scheme):
    weight = from_float32(np.random.default_rng(0).standard_normal((23, 256)) * 0.1, "BF16")
    quantizer = find_quantizer(scheme)
    one = pack_blocks(quantizer, weight, [slice(0, 9), slice(9, 18), slice(18, 23)])
    other = quantizer.quantize(weight)
    assert (one.shape, one.dtype) == (other.shape, other.dtype)
    assert {key: tensor.data.tobytes() for key, tensor in one.arrays.items()} == {
        key: tensor.data.tobytes() for key, tensor in other.arrays.items()
    }


def test_a_target_that_exists_is_refused_and_replaced_by_force_only(tiny_model_folder, tmp_path):
    source, out = str(tiny_model_folder(layers=1)), tmp_path / "out"
    quantize(source, scheme="affine-4bit-g64", output=out)
    before = tree(out)
    with pytest.raises(ConfigError, match="exists"):
        quantize(source, scheme="affine-8bit-g64", output=out)
    assert tree(out) == before
    quantize(source, scheme="affine-8bit-g64", output=out, force=True)
    assert set(schemes(out).values()) == {"affine-8bit-g64"}
    with pytest.raises(ConfigError, match="never changed"):
        quantize(source, scheme="affine-8bit-g64", output=tiny_model_folder(layers=1) / "inside")


def test_a_model_that_breaks_half_way_leaves_nothing(tiny_model_folder, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(tiny_model_folder(), source)
    tensors = dict(load_file(source / "model.safetensors"))
    broken = np.array(tensors[f"{DOWN}.weight"].data)
    broken[3, 3] = np.nan
    save_file(source / "model.safetensors", {**tensors, f"{DOWN}.weight": Tensor("F32", broken)}.items())
    with pytest.raises(ModelError, match="NaN or infinity"):
        quantize(str(source), scheme="affine-4bit-g64", output=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scheme": "none"}, "leaves the model as it is"),
        ({"scheme": "affine-4bit-g63"}, "did you mean"),
        ({"overrides": ["down_proj"]}, "PATTERN=SCHEME"),
        ({"overrides": ["*.nowhere=nvfp4"]}, 'no module is called "*.nowhere"'),
        ({"overrides": ["*.q_proj=nf4"]}, 'has no "nf4"'),
        ({"scheme": "nf4", "overrides": ["*.q_proj=fp4"]}, "one format per folder"),
        ({"scheme": "quanto-qint8", "overrides": ["model.embed_tokens=quanto-qint4"]}, "is an embedding"),
        ({"overrides": ["*.q_proj=affine-4bit-g128"]}, "does not divide into groups"),
        ({"base3": True}, "--base3 is for ternary weights"),
        ({"keep": ["*.nobody"]}, 'no module is called "*.nobody"'),
    ],
)
def test_wrong_usage_is_told_before_anything_is_written(tiny_model_folder, tmp_path, options, words):
    with pytest.raises(ConfigError) as error:
        quantize(str(tiny_model_folder()), **{"scheme": "affine-4bit-g64", "output": tmp_path / "out", **options})
    assert words in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_quantized_already_is_refused(tiny_model_folder, tmp_path):
    quantize(str(tiny_model_folder(layers=1)), scheme="mxfp4", output=tmp_path / "one")
    with pytest.raises(ModelError, match=r"quantized already \(mxfp4\)"):
        quantize(str(tmp_path / "one"), scheme="nf4", output=tmp_path / "two")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_scales_have_the_dtype_of_the_weights(tiny_model_folder, tmp_path, dtype):
    source = tiny_model_folder(layers=1, dtype=dtype)
    quantize(str(source), scheme="affine-4bit-g64", output=tmp_path / "out")
    quantize(str(source), scheme="quanto-qint4", output=tmp_path / "quanto")
    assert {entry.dtype for name, entry in open_folder(tmp_path / "out").entries.items() if "scales" in name} == {
        {"bfloat16": "BF16", "float16": "F16"}[dtype]
    }
    assert from_float32(np.ones(1), "F32").dtype == "F32"


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["affine-4bit-g64", "ternary-g64", "nf4", "mxfp4", "quanto-qint8"])
def test_memory_stays_below_a_shard_and_a_layer(tmp_path, scheme):
    """Four shards of 64 MB; the peak of NumPy's memory stays under 1.3 shards and a layer of 16 MB."""
    import tracemalloc

    source = tmp_path / "source"
    source.mkdir()
    shapes = {"self_attn.q_proj": (1024, 1024), "mlp.up_proj": (2048, 1024), "mlp.down_proj": (1024, 1024)}
    config = {"model_type": "llama", "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 16}
    (source / "config.json").write_text(json.dumps({**config, "num_attention_heads": 8, "vocab_size": 8}))
    random = np.random.default_rng(0)
    for shard in range(4):
        tensors = {
            f"model.layers.{4 * shard + n}.{name}.weight": Tensor("F32", random.standard_normal(shape, np.float32))
            for n in range(4)
            for name, shape in shapes.items()
        }
        if shard == 0:
            ends = {"model.embed_tokens.weight": (8, 1024), "model.norm.weight": (1024,), "lm_head.weight": (8, 1024)}
            tensors |= {name: Tensor("F32", np.ones(shape, np.float32)) for name, shape in ends.items()}
        save_file(source / f"model-{shard}.safetensors", tensors.items())
    size = max(file.stat().st_size for file in source.glob("*.safetensors"))
    tracemalloc.start()
    quantize(str(source), scheme=scheme, output=tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.3 * size + 16 * 2**20


def test_a_home_folder_is_one(tiny_model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    result = mlxlora.quantize(tiny_model_folder(layers=1), scheme="int8", output="~/out")
    assert result.output == tmp_path / "out"
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_format_that_no_tool_keeps_in_folders_is_refused():
    with pytest.raises(ConfigError, match="no tool loads folders of made-up"):
        find_owner(Scheme("made-up", 4, 64))
