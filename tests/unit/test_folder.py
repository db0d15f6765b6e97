"""A model folder is checked, whole and by name, before anything big is read."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from shared.errors import CapabilityError, ModelError
from shared.folder import check_tensors, end_tokens, find_folder, nearest_family, open_folder, sha256
from shared.quant.mlx_folder import quantization_of
from shared.tensors import NUMPY, save_file
from shared.types import Scheme, Tensor

CONFIG = {"model_type": "llama", "num_hidden_layers": 2, "vocab_size": 8}
NAMES = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight")


def floats(*shape):
    return Tensor("F32", np.zeros(shape, dtype=np.float32))


@pytest.fixture
def make(tmp_path):
    """Return a writer of model folders: config, files of tensors, index."""

    def write(config=None, files=None, *, index=None):
        (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config or CONFIG))
        if files is None:
            files = {"model.safetensors": {name: floats(4, 4) for name in NAMES}}
        for name, tensors in files.items():
            save_file(tmp_path / name, tensors.items())
        if index is not None:
            (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        return tmp_path

    return write


def shards(**changes):
    """Return a folder in two shards, and the index of both."""
    files = {
        "model-1.safetensors": {NAMES[0]: floats(4, 4), NAMES[1]: floats(4, 4)},
        "model-2.safetensors": {NAMES[2]: floats(4, 4)},
    }
    index = {"weight_map": {name: file for file, tensors in files.items() for name in tensors}}
    return {"files": files, "index": index, **changes}


def quantized(bits=4, group=32, *, width=64, weight=None, drop=(), **config):
    module = "model.layers.0.mlp.up_proj"
    arrays = {
        f"{module}.weight": weight or Tensor("U32", np.zeros((4, width * bits // 32), dtype=np.uint32)),
        f"{module}.scales": floats(4, width // group),
        f"{module}.biases": floats(4, width // group),
    }
    tensors = {name: tensor for name, tensor in arrays.items() if name.rpartition(".")[2] not in drop}
    entry = {"quantization": {"group_size": group, "bits": bits, **config}}
    return {**CONFIG, "num_hidden_layers": 1, **entry}, {"model.safetensors": tensors}


def test_a_plain_folder_opens(make):
    folder = open_folder(make())
    assert folder.family == "llama"
    assert set(folder.entries) == set(NAMES)
    assert not folder.schemes
    assert [file.name for file in folder.files] == ["model.safetensors"]


def test_a_folder_in_shards_opens(make):
    folder = open_folder(make(**shards()))
    assert set(folder.entries) == set(NAMES)
    assert len(folder.files) == 2


def test_folders_that_transformers_writes_open(tiny_model_folder):
    for family, tied in (("llama", False), ("qwen2", True)):
        folder = open_folder(tiny_model_folder(family, tied=tied, dtype="bfloat16"))
        assert folder.family == family
        assert ("lm_head.weight" in folder.entries) is not tied
        assert {entry.dtype for entry in folder.entries.values()} == {"BF16"}


def test_a_missing_shard_is_named(make):
    folder = make(**shards())
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(ModelError, match=r"(?s)model-2.safetensors is missing.*fix: download the shard again"):
        open_folder(folder)


@pytest.mark.parametrize(
    "name",
    [
        "../other.safetensors",
        "/etc/model.safetensors",
        "sub/model.safetensors",
        "..",
        "model-1.bin",
        "",
        3,
        None,
        ["a"],
    ],
)
def test_an_index_cannot_name_files_outside_of_its_folder(make, name):
    folder = make(**shards(index={"weight_map": {"a": name}}))
    save_file(folder.parent / "other.safetensors", [("a", floats(1))])
    with pytest.raises(ModelError, match=r"weight_map must name .safetensors files of this folder"):
        open_folder(folder)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": "model.safetensors"}])
def test_an_index_without_a_map_is_refused(make, index):
    with pytest.raises(ModelError, match=r"weight_map"):
        open_folder(make(**shards(index=index)))


def test_a_tensor_in_two_shards_is_refused(make):
    plan = shards()
    plan["files"]["model-2.safetensors"][NAMES[0]] = floats(4, 4)
    with pytest.raises(ModelError, match=r"stands in model-1.safetensors and in model-2.safetensors"):
        open_folder(make(**plan))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.ckpt", "weights.npz"])
def test_pickles_are_refused_by_name_and_never_opened(make, name, tmp_path):
    trap = tmp_path / "ran"
    folder = make(files={})
    (folder / name).write_bytes(pickle.dumps(Trap(str(trap))))
    with pytest.raises(ModelError, match=rf"as pickle \({name}\), which can run code"):
        open_folder(folder)
    assert not trap.exists()


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_an_empty_folder_and_an_absent_one_are_told_apart(make, tmp_path):
    with pytest.raises(ModelError, match=r"no model folder at"):
        open_folder(tmp_path / "absent")
    with pytest.raises(ModelError, match=r"config.json is missing"):
        open_folder(tmp_path)
    with pytest.raises(ModelError, match=r"has no model"):
        open_folder(make(files={}))


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "[" * 100_000, '"llama"', "\udcff"])
def test_a_damaged_config_is_refused(make, text, tmp_path):
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelError, match=r"config.json"):
        open_folder(tmp_path)


@pytest.mark.parametrize("family", [None, 3, "", "../llama", "a/b", "os;", "..", ["llama"]])
def test_a_model_type_is_a_name_and_no_path(make, family):
    with pytest.raises(ModelError, match=r"model_type is"):
        open_folder(make({**CONFIG, "model_type": family}))


@pytest.mark.parametrize("key", ["model_file", "auto_map"])
def test_a_model_that_brings_code_is_refused(make, key):
    with pytest.raises(CapabilityError, match=rf"{key} asks to run code from the folder"):
        open_folder(make({**CONFIG, key: {"AutoModel": "evil.py"}}))


@pytest.mark.parametrize("layers", [0, -1, 1.5, "2", True, 10**9])
def test_an_absurd_layer_count_is_refused(make, layers):
    with pytest.raises(ModelError, match=r"num_hidden_layers is"):
        open_folder(make({**CONFIG, "num_hidden_layers": layers}))


@pytest.mark.parametrize("layers", [1, 3])
def test_a_layer_count_that_is_not_that_of_the_weights_is_refused(make, layers):
    with pytest.raises(ModelError, match=rf"says num_hidden_layers {layers}, the weights hold 2 layers"):
        open_folder(make({**CONFIG, "num_hidden_layers": layers}))


# quantized folders


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64])
def test_an_affine_folder_tells_its_schemes(make, bits, group):
    assert open_folder(make(*quantized(bits, group))).schemes == {
        "model.layers.0.mlp.up_proj": Scheme("affine", bits, group)
    }


def test_a_module_may_have_a_scheme_of_its_own(make):
    config, files = quantized(8, 32)
    config["quantization"] = {"group_size": 64, "bits": 4, "model.layers.0.mlp.up_proj": {"group_size": 32, "bits": 8}}
    assert open_folder(make(config, files)).schemes["model.layers.0.mlp.up_proj"] == Scheme("affine", 8, 32)


@pytest.mark.parametrize("lie", [{"bits": 8}, {"bits": 7}, {"group_size": 64}, {"group_size": 16}, {"bits": "4"}])
def test_a_scheme_that_is_not_that_of_the_bytes_is_refused(make, lie):
    config, files = quantized(4, 32)
    config["quantization"].update(lie)
    with pytest.raises(ModelError, match=r"does not hold"):
        open_folder(make(config, files))


@pytest.mark.parametrize("drop", ["weight", "biases"])
def test_scales_without_weight_or_biases_are_refused(make, drop):
    with pytest.raises(ModelError, match=r"has no weight, biases or entry"):
        open_folder(make(*quantized(drop=(drop,))))


def test_scales_without_an_entry_in_the_config_are_refused(make):
    config, files = quantized()
    del config["quantization"]
    with pytest.raises(ModelError, match=r"has no weight, biases or entry"):
        open_folder(make(config, files))


def test_packed_codes_must_be_32_bit_words(make):
    with pytest.raises(ModelError, match=r"does not hold"):
        open_folder(make(*quantized(weight=floats(4, 8))))


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8"])
def test_a_foreign_quantization_is_refused_by_its_name(make, method):
    with pytest.raises(CapabilityError, match=rf"(?s)quantized with {method}.*fix: use the unquantized model"):
        open_folder(make({**CONFIG, "quantization_config": {"quant_method": method, "bits": 4}}))


def test_an_unknown_mode_is_refused_by_its_name(make):
    with pytest.raises(CapabilityError, match=r"mode mxfp3"):
        open_folder(make(*quantized(mode="mxfp3")))


def test_the_copy_of_the_entry_that_mlx_lm_writes_for_others_is_read():
    entry = {"group_size": 64, "bits": 4}
    assert quantization_of({"quantization": entry, "quantization_config": entry}) == entry
    assert quantization_of({"quantization_config": entry}) == entry
    assert quantization_of({}) is None


@pytest.mark.parametrize("entry", [[4, 64], "4bit", 4])
def test_a_quantization_entry_that_is_no_object_is_refused(make, entry):
    with pytest.raises(ModelError, match=r"quantization"):
        open_folder(make({**CONFIG, "quantization": entry}))


def test_scales_without_dimensions_are_refused(make):
    config, files = quantized()
    files["model.safetensors"]["model.layers.0.mlp.up_proj.scales"] = floats()
    with pytest.raises(ModelError):
        open_folder(make(config, files))


# shapes


def test_every_expected_tensor_is_there_with_its_shape_and_no_other(tmp_path):
    expected = {"a.weight": (2, 3), "b.weight": (4,)}
    check_tensors(tmp_path, expected=expected, found=expected)
    for found, message in (
        (
            {"a.weight": (3, 2), "b.weight": (4,)},
            r'(?s)"a.weight" has shape \(3, 2\).*expected: \(2, 3\) by config.json',
        ),
        ({"a.weight": (2, 3)}, '"b.weight" is missing'),
        ({}, r'"a.weight" is missing \(and 1 more\)'),
        ({**expected, "c.weight": (1,)}, '"c.weight" has no place'),
    ):
        with pytest.raises(ModelError, match=message):
            check_tensors(tmp_path, expected=expected, found=found)


def test_a_tied_head_may_be_there_or_not_and_computed_buffers_do_not_count(tmp_path):
    expected = {"a": (2,), "lm_head.weight": (3,)}
    check_tensors(tmp_path, expected=expected, found={"a": (2,)}, tied=["lm_head.weight"])
    check_tensors(tmp_path, expected={"a": (2,)}, found={"a": (2,), "lm_head.weight": (3,)}, tied=["lm_head.weight"])
    check_tensors(
        tmp_path, expected={"a": (2,)}, found={"a": (2,), "model.layers.0.self_attn.rotary_emb.inv_freq": (4,)}
    )


# names and small files


def test_a_local_path_is_taken_as_it_is(tmp_path):
    assert find_folder(str(tmp_path)) == tmp_path
    assert find_folder("./absent/folder").name == "folder"


def test_a_hub_id_that_cannot_be_reached_is_one_clear_error():
    with pytest.raises(ModelError, match=r"(?s)is not downloaded, and the run is offline.*fix: download it"):
        find_folder("no-such-org/no-such-model")


@pytest.mark.parametrize(
    ("generation", "config", "tokenizer", "ids"),
    [
        (None, 2, None, (2,)),
        ([3, 4], 2, 2, (2, 3, 4)),
        (None, None, 7, (7,)),
        (5, True, None, (5,)),
        (None, None, None, ()),
    ],
)
def test_end_tokens_come_from_all_three_places(tmp_path, generation, config, tokenizer, ids):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": config}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert end_tokens(tmp_path, tokenizer_eos=tokenizer) == ids


def test_an_unknown_family_gets_the_nearest_one():
    assert nearest_family("lama", ["llama", "gemma"]) == 'did you mean "llama"?'
    assert (
        nearest_family("zzzzzz", [f"family{n}" for n in range(300)])
        == "use a model of a family such as llama, mistral or qwen2"
    )


def test_sha256_is_the_standards(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("dtype", ["I32", "U8", "I8", "F8_E4M3", "BOOL"])
def test_a_weight_that_is_no_float_is_refused_by_name(make, dtype):
    codes = Tensor(dtype, np.ones((4, 4), dtype=NUMPY[dtype]))
    tensors = {name: floats(4, 4) for name in NAMES}
    with pytest.raises(ModelError, match=f'"{NAMES[1]}" is {dtype}, and config.json does not say'):
        open_folder(make(files={"model.safetensors": {**tensors, NAMES[1]: codes}}))
    mask = {"model.layers.0.attn.bias": codes, "model.position_ids": codes}  # buffers of old checkpoints
    open_folder(make(files={"model.safetensors": {**tensors, **mask}}))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a recipe.yaml", r"a recipe\.yaml is a config file, not a model\n.*\nfix: mlxlora train '.*a recipe\.yaml'"),
        ("model/model.safetensors", r"is a file\nexpected: a folder(.|\n)*fix: use .*model$"),
        ("notes.txt", r"notes\.txt is a file\nexpected: a folder with config\.json, or a hub id$"),
    ],
)
def test_a_file_as_the_model_is_told_what_it_is(tmp_path, name, words):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    (tmp_path / name).touch()
    with pytest.raises(ModelError, match=words):
        open_folder(tmp_path / name)
