"""Whatever stands in a quant_state, the reader takes it or refuses it in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.errors import ModelError
from shared.quant.bnb_folder import STATE, find_four_bit, to_tensors
from shared.quant.four_bit import FourBitQuantizer
from shared.tensors import read_header, save_file
from shared.types import Scheme, Tensor

KEYS = (
    "quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset"
)  # fmt: skip
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["nf4", "fp4", "float32", "bfloat16", 64, 128, 256, [8, 64], [64, 8], [1, 512]])
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def packed():
    return FourBitQuantizer(Scheme("nf4", 4, 64, double=True)).quantize(
        Tensor("F32", np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32))
    )


def outcome(folder: Path, packed, words: bytes):
    tensors = to_tensors("layer", packed) | {f"layer{STATE}nf4": Tensor("U8", np.frombuffer(words, np.uint8))}
    save_file(folder / "model.safetensors", tensors.items())
    try:
        return find_four_bit(folder, "layer", "nf4", read_header(folder / "model.safetensors"))
    except ModelError as error:
        return error


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3))
def test_any_entries(tmp_path, packed, changes):
    state = json.loads(bytes(to_tensors("layer", packed)[f"layer{STATE}nf4"].data))
    place = outcome(tmp_path, packed, json.dumps(state | changes).encode())
    if isinstance(place, ModelError):
        assert len(str(place).splitlines()) <= 3
    else:
        assert (place.stored.scheme.group_size, np.prod(place.stored.shape)) == (64, 512)
        assert all(type(n) is int for n in (*place.stored.shape, place.stored.scheme.group_size))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_any_bytes(tmp_path, packed, words):
    found = outcome(tmp_path, packed, words)
    assert isinstance(found, ModelError)
    assert len(str(found).splitlines()) <= 3
