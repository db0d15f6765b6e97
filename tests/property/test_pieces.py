"""Properties of the small pieces, over whatever hypothesis thinks of."""

from __future__ import annotations

import numpy as np
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shared.config_file import merge, parse_override, parse_yaml
from shared.data.cut import cut
from shared.errors import ConfigError
from shared.quant.affine import pack, unpack
from shared.tensors import from_float32, to_float32
from shared.types import Tensor

FLOATS = hnp.arrays(
    np.float32, hnp.array_shapes(max_dims=3, max_side=8), elements=st.floats(width=32, allow_subnormal=True)
)
PLAIN = st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats(allow_nan=False) | st.text(max_size=20)
NESTED = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=4), max_leaves=8)


def outcome(function):
    """Return what a function returns, or the ConfigError it raises; any other error fails the test."""
    try:
        return function()
    except ConfigError as error:
        return error


@st.composite
def codes_and_bits(draw):
    """Draw codes (O, I) uint8 of some bits, I a multiple of 32."""
    bits = draw(st.sampled_from([2, 3, 4, 5, 6, 8]))
    shape = (draw(st.integers(1, 4)), 32 * draw(st.integers(1, 4)))
    return draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 2**bits - 1))), bits


@given(codes_and_bits())
def test_packing_loses_nothing_and_wastes_no_bit(drawn):
    codes, bits = drawn
    words = pack(codes, bits=bits)
    assert words.dtype == np.uint32
    assert words.shape == (codes.shape[0], codes.shape[1] * bits // 32)
    assert np.array_equal(unpack(words, bits=bits), codes)


@given(st.integers(1, 3), st.sampled_from([2, 3, 4, 5, 6, 8]), st.integers(0, 2**32 - 1))
def test_any_words_unpack_and_pack_again(rows, bits, seed):
    words = np.random.default_rng(seed).integers(0, 2**32, (rows, bits), dtype=np.uint32)
    assert np.array_equal(pack(unpack(words, bits=bits), bits=bits), words)


@given(FLOATS)
def test_bfloat16_is_rounded_as_torch_rounds_it(values):
    ours = from_float32(values, "BF16")
    theirs = torch.from_numpy(values.copy()).to(torch.bfloat16)
    assert ours.data.shape == values.shape
    assert np.array_equal(to_float32(ours), theirs.float().numpy(), equal_nan=True)
    words, finite = theirs.view(torch.int16).numpy().view(np.uint16), ~np.isnan(values)
    assert np.array_equal(ours.data[finite], words[finite])  # so that -0.0 is told from 0.0


@given(hnp.arrays(np.uint16, hnp.array_shapes(max_dims=2, max_side=16)))
def test_bfloat16_words_come_back_from_float32(words):
    floats = to_float32(Tensor("BF16", words))
    assert np.array_equal(
        floats, torch.from_numpy(words.view(np.int16)).view(torch.bfloat16).float().numpy(), equal_nan=True
    )
    finite = ~np.isnan(floats)
    assert np.array_equal(from_float32(floats, "BF16").data[finite], words[finite])


@given(FLOATS)
def test_float16_is_rounded_as_torch_rounds_it(values):
    theirs = torch.from_numpy(values.copy()).to(torch.float16).numpy()
    with np.errstate(over="ignore"):
        assert np.array_equal(from_float32(values, "F16").data, theirs, equal_nan=True)


@given(st.lists(st.integers(1, 500), min_size=1, max_size=60), st.integers(1, 2000))
def test_a_cut_takes_every_row_once_and_keeps_its_budget(lengths, micro_tokens):
    groups = cut(lengths, micro_tokens=micro_tokens)
    assert sorted(place for group in groups for place in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or max(lengths[place] for place in group) * len(group) <= micro_tokens
    longest = [max(lengths[place] for place in group) for group in groups]
    assert longest == sorted(longest, reverse=True)


@given(st.lists(st.integers(1, 500), min_size=1, max_size=60), st.integers(1, 2000))
def test_a_cut_never_pads_beyond_the_next_group(lengths, micro_tokens):
    """Rows are in order of length, so that no row is padded to more than its own group's longest."""
    groups = cut(lengths, micro_tokens=micro_tokens)
    flat = [lengths[place] for group in groups for place in group]
    assert flat == sorted(flat, reverse=True)


@given(st.sampled_from(["train.seed", "output", "data.path", "adapter.targets", "optimizer.lr"]), NESTED)
def test_an_override_carries_any_yaml_value(key, value):
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
    found = parse_override(f"{key}={text}")
    for part in key.split("."):
        found = found[part]
    assert found == value
    assert type(found) is type(value)


@given(st.text(max_size=60))
def test_no_text_makes_an_override_fail_otherwise_than_by_a_config_error(text):
    for override in (text, f"train.seed={text}"):
        found = outcome(lambda override=override: parse_override(override))
        assert isinstance(found, dict) or str(found).count("\n") <= 2


@given(st.text(alphabet="ab:-[]{}&*!|>?'\"#%@, \n\t01.~<=", max_size=40))
@settings(max_examples=300)
def test_no_text_makes_the_parser_fail_otherwise_than_by_a_config_error(text):
    found = outcome(lambda: parse_yaml(text, name="run.yaml")[0])
    assert isinstance(found, dict) or str(found).startswith("run.yaml")


SECTIONS = ("train", "adapter", "log")


@given(st.dictionaries(st.sampled_from(SECTIONS), st.dictionaries(st.sampled_from("xyz"), PLAIN)), st.data())
def test_merging_keeps_what_the_top_does_not_name(base, data):
    top = data.draw(st.dictionaries(st.sampled_from(SECTIONS), st.dictionaries(st.sampled_from("xyz"), PLAIN)))
    found = merge(base, top)
    for section in base.keys() | top.keys():
        assert found[section] == {**base.get(section, {}), **top.get(section, {})}
