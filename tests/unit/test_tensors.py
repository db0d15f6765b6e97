"""safetensors files: ours and the library's are the same, and nothing malformed gets past the header."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from shared.errors import ModelError
from shared.tensors import (
    LIBRARY,
    NUMPY,
    from_float32,
    is_finite,
    load_file,
    read_header,
    read_tensor,
    save_file,
    to_float32,
)
from shared.types import Tensor

SOME = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
EIGHT = b"\0" * 8


def raw(header, data=EIGHT, *, length=None):
    """Return the bytes of a safetensors file around any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(**changes):
    return {"a": {**SOME, **changes}}


def two(first, second):
    return {"a": {**SOME, "data_offsets": first}, "b": {**SOME, "data_offsets": second}}


HOSTILE = {
    "empty file": b"",
    "shorter than its length word": b"\x01\0\0",
    "no header behind the length": struct.pack("<Q", 100),
    "a header longer than the file": raw(entry(), length=10_000),
    "a header of 2^63 bytes": raw(entry(), length=2**63),
    "a header of 2^64 - 1 bytes": raw(entry(), length=2**64 - 1),
    "a header of no bytes": raw(b"", length=0),
    "no JSON": raw(b"{not json"),
    "no UTF-8": raw(b'{"\xff": 1}'),
    "a list": raw([1, 2]),
    "a number": raw(b"42"),
    "JSON nested 100,000 deep": raw(b"[" * 100_000),
    "a number of 5,000 digits": raw(b'{"a": ' + b"9" * 5000 + b"}"),
    "a name that stands twice": raw(b'{"a": %b, "a": %b}' % ((json.dumps(SOME).encode(),) * 2)),
    "an entry that is no object": raw({"a": 3}),
    "an entry that is null": raw({"a": None}),
    "no dtype": raw({"a": {"shape": [2], "data_offsets": [0, 8]}}),
    "no shape": raw({"a": {"dtype": "F32", "data_offsets": [0, 8]}}),
    "no offsets": raw({"a": {"dtype": "F32", "shape": [2]}}),
    "an unknown dtype": raw(entry(dtype="F31")),
    "a dtype that is a number": raw(entry(dtype=4)),
    "a negative shape": raw(entry(shape=[-2])),
    "two negative dimensions": raw(entry(shape=[-1, -2])),
    "a shape with a fraction": raw(entry(shape=[2.0])),
    "a shape with true": raw(entry(shape=[True, 2])),
    "a shape that is a text": raw(entry(shape="2")),
    "a shape that is null": raw(entry(shape=None)),
    "a shape of 40 dimensions": raw(entry(shape=[1] * 39 + [2])),
    "a shape whose product overflows 64 bits": raw(entry(shape=[2**32, 2**32])),
    "a shape larger than its bytes": raw(entry(shape=[3])),
    "a shape smaller than its bytes": raw(entry(shape=[1])),
    "offsets backwards": raw(entry(data_offsets=[8, 0])),
    "offsets below zero": raw(entry(data_offsets=[-8, 0])),
    "offsets with fractions": raw(entry(data_offsets=[0.0, 8.0])),
    "three offsets": raw(entry(data_offsets=[0, 4, 8])),
    "offsets beyond the file": raw(entry(data_offsets=[2**60, 2**60 + 8])),
    "a tensor cut off": raw(entry(), b"\0" * 7),
    "bytes left over": raw(entry(), b"\0" * 9),
    "two tensors on the same bytes": raw(two([0, 8], [0, 8])),
    "two tensors that overlap": raw(two([0, 8], [4, 12]), b"\0" * 12),
    "a hole between tensors": raw(two([0, 8], [12, 20]), b"\0" * 20),
    "NaN in an entry": raw(entry(extra=float("nan"))),
    "a fourth key in an entry": raw(entry(extra=1)),
    "metadata with half a character": raw(b'{"__metadata__": {"a": "\\udc00"}, "a": %b}' % json.dumps(SOME).encode()),
    "a name that is half a character": raw(b'{"\\ud800": %b}' % json.dumps(SOME).encode()),
    "metadata that is a list": raw({"__metadata__": [], **entry()}),
    "metadata with a number": raw({"__metadata__": {"format": 1}, **entry()}),
    "a name with a zero byte": raw({"a\0b": SOME}),
    "a name with an escape": raw({"a\x1b[2J": SOME}),
    "a name of no letters": raw({"": SOME}),
    "100,001 tensors": raw(
        {f"t{n}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for n in range(100_001)}, b""
    ),
    "a hole before the first": raw(entry(data_offsets=[4, 12]), b"\0" * 12),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_header_is_refused_with_the_files_name(tmp_path, kind):
    file = tmp_path / "model.safetensors"
    file.write_bytes(HOSTILE[kind])
    with pytest.raises(ModelError, match=r"model.safetensors is damaged"):
        read_header(file)


@pytest.mark.parametrize("dtype", [["F32"], {"F32": 1}])
def test_a_dtype_that_is_a_list_or_an_object_is_refused(tmp_path, dtype):
    (tmp_path / "model.safetensors").write_bytes(raw(entry(dtype=dtype)))
    with pytest.raises(ModelError, match=r"is damaged"):
        read_header(tmp_path / "model.safetensors")


def test_a_shape_that_no_array_can_have_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(raw(entry(shape=[0, 2**62], data_offsets=[0, 0]), b""))
    with pytest.raises(ModelError, match=r"is damaged"):
        load_file(tmp_path / "model.safetensors")


def test_a_file_that_is_absent_or_a_folder_is_one_clear_error(tmp_path):
    for path in (tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(ModelError):
            read_header(path)


def test_the_order_of_names_and_of_bytes_may_differ(tmp_path):
    (tmp_path / "x").write_bytes(raw(two([8, 16], [0, 8]), np.arange(4, dtype="<f4").tobytes()))
    assert read_tensor(read_header(tmp_path / "x")["a"]).data.tolist() == [2.0, 3.0]


def test_metadata_is_passed_over(tmp_path):
    (tmp_path / "x").write_bytes(raw({"__metadata__": {"format": "pt"}, **entry()}))
    assert list(read_header(tmp_path / "x")) == ["a"]


@pytest.fixture
def tensors():
    random = np.random.default_rng(0)
    made = {}
    for name, kind in NUMPY.items():
        if name in LIBRARY:
            words = random.integers(0, 2, (3, 4)) if name == "BOOL" else random.integers(-5, 5, (3, 4))
            made[f"{name}.matrix"] = Tensor(name, words.astype(kind))
    made["scalar"] = Tensor("F32", np.float32(2.5).reshape(()))
    made["empty"] = Tensor("BF16", np.zeros((0, 7), dtype=np.uint16))
    made["turned"] = Tensor("F32", random.standard_normal((4, 3), dtype=np.float32).T)
    return made


def same(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and np.array_equal(one.data, other.data)


def test_every_dtype_shape_and_stride_comes_back_as_it_was(tmp_path, tensors):
    save_file(tmp_path / "x", tensors.items())
    found = load_file(tmp_path / "x")
    assert found.keys() == tensors.keys()
    assert all(same(found[name], tensors[name]) for name in tensors)


def test_a_mapped_tensor_is_the_one_that_is_loaded(tmp_path, tensors):
    save_file(tmp_path / "x", tensors.items())
    entries, loaded = read_header(tmp_path / "x"), load_file(tmp_path / "x")
    assert all(same(read_tensor(entries[name]), loaded[name]) for name in entries)


def test_what_we_write_the_library_reads(tmp_path, tensors):
    save_file(tmp_path / "x", tensors.items(), metadata={"format": "pt"})
    found = safetensors.torch.load_file(tmp_path / "x")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        words = {"BF16": torch.uint16, "F8_E4M3": torch.uint8}.get(tensor.dtype)
        words = found[name] if words is None else found[name].view(words)
        assert tuple(words.shape) == tensor.shape
        assert np.array_equal(words.numpy(), tensor.data)


def test_what_the_library_writes_we_read(tmp_path):
    values = {
        "a": torch.randn(5, 3, dtype=torch.bfloat16),
        "b": torch.arange(7),
        "c": torch.tensor(1.5, dtype=torch.float16),
    }
    safetensors.torch.save_file(values, tmp_path / "x")
    found = load_file(tmp_path / "x")
    assert {name: tensor.dtype for name, tensor in found.items()} == {"a": "BF16", "b": "I64", "c": "F16"}
    assert np.array_equal(found["a"].data, values["a"].view(torch.uint16).numpy())
    assert np.array_equal(to_float32(found["a"]), values["a"].float().numpy())
    assert found["b"].data.tolist() == list(range(7))
    assert found["c"].data == 1.5


def test_the_same_tensors_always_give_the_same_bytes(tmp_path, tensors):
    files = []
    for number, names in enumerate((list(tensors), list(reversed(tensors)))):
        save_file(tmp_path / str(number), ((name, tensors[name]) for name in names), metadata={"format": "pt"})
        files.append((tmp_path / str(number)).read_bytes())
    assert files[0] == files[1]


def test_writing_replaces_a_file_whole(tmp_path):
    for value in (1.0, 2.0):
        save_file(tmp_path / "x", [("a", Tensor("F32", np.full(1000, value, dtype=np.float32)))])
    assert load_file(tmp_path / "x")["a"].data.tolist() == [2.0] * 1000
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


def test_bfloat16_is_exact_upwards_and_rounds_to_even_downwards():
    words = np.arange(2**16, dtype=np.uint16)
    floats = to_float32(Tensor("BF16", words))
    assert np.array_equal(floats, torch.from_numpy(words.copy()).view(torch.bfloat16).float().numpy(), equal_nan=True)
    finite = ~np.isnan(floats)
    assert np.array_equal(from_float32(floats, "BF16").data[finite], words[finite])
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8], dtype=np.float32)  # halfway between two neighbours
    assert to_float32(from_float32(ties, "BF16")).tolist() == [1.0, 1.015625]


def test_overflow_becomes_infinity_and_nan_stays_nan():
    found = to_float32(from_float32(np.array([3.4e38, -3.4e38, np.nan], dtype=np.float32), "BF16"))
    assert found[0] == np.inf
    assert found[1] == -np.inf
    assert np.isnan(found[2])


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_is_found(dtype, value):
    values = np.ones((50, 3), dtype=np.float32)
    assert is_finite(from_float32(values, dtype))
    values[31, 2] = value
    assert not is_finite(from_float32(values, dtype))


def test_integers_always_are_finite():
    assert is_finite(Tensor("U16", np.array([0x7F80], dtype=np.uint16)))


def test_files_that_mlx_writes_without_metadata_are_read(tmp_path):
    import mlx.core as mx

    file = tmp_path / "model.safetensors"
    mx.save_safetensors(str(file), {"a": mx.ones((2,))})  # its header says "__metadata__": null
    assert read_header(file)["a"].shape == (2,)
