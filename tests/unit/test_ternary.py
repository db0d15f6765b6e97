"""Ternary weights: every rule by its definition, exact affine codes in memory, base 3 on disk, and BitNet's packing."""

from __future__ import annotations

from itertools import product

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlxlora.state import from_mlx, to_mlx
from shared.errors import ModelError
from shared.quant import bitnet
from shared.quant.bitnet import BitnetQuantizer
from shared.quant.ternary import TernaryQuantizer, choose, pack_base3, unpack_base3
from shared.tensors import from_float32, to_float32
from shared.types import Scheme, Tensor

RULES = ("exact", "absmean", "twn", "quantile", "sparsity10", "sparsity50", "sparsity90", "stochastic")
DTYPES = ("F32", "F16", "BF16")


def scheme_of(rule, group=64):
    return Scheme("ternary", 2, group, solver=rule)


def weights(dtype):
    """Return (16, 256) values: ordinary rows, zeros, constants, and rows with ties."""
    rows = np.random.default_rng(0).standard_normal((16, 256)).astype(np.float32) * 0.05
    rows[0], rows[1], rows[2] = 0, 0.37, -0.37
    rows[3, :100] = 0
    rows[4] = np.round(rows[4] * 40) / 8
    rows[5] *= 1e3
    return from_float32(rows, dtype)


def ternary_weight(dtype):
    """Return (8, 256) values that are -a, 0 or a within each group of 32, of every density."""
    random = np.random.default_rng(1)
    trits = random.integers(-1, 2, (8, 8, 32))
    trits[0] = 0
    trits[1] = 1
    trits[2, :, 1:] = 0
    scale = np.abs(random.standard_normal((8, 8, 1))).astype(np.float32) + np.float32(0.01)
    return from_float32((trits * scale).astype(np.float32).reshape(8, 256), dtype)


def same(one, other):
    return all(
        one.arrays[key].dtype == other.arrays[key].dtype
        and one.arrays[key].data.tobytes() == other.arrays[key].data.tobytes()
        for key in one.arrays.keys() | other.arrays.keys()
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_encoding_a_decoded_weight_changes_no_byte(rule, dtype):
    quantizer = TernaryQuantizer(scheme_of(rule))
    once = quantizer.quantize(weights(dtype))
    assert same(once, quantizer.quantize(quantizer.dequantize(once)))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_that_is_ternary_comes_back_exactly(rule, dtype):
    quantizer, weight = TernaryQuantizer(scheme_of(rule, 32)), ternary_weight(dtype)
    found = quantizer.dequantize(quantizer.quantize(weight))
    assert found.dtype == dtype
    assert np.array_equal(to_float32(found), to_float32(weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_mlx_decodes_its_affine_codes_to_three_exact_values(dtype):
    quantizer = TernaryQuantizer(scheme_of("exact"))
    packed = quantizer.quantize(weights(dtype))
    arrays = [to_mlx(packed.arrays[key]) for key in ("weight", "scales", "biases")]
    theirs = to_float32(from_mlx(mx.dequantize(*arrays, group_size=64, bits=2)))
    assert np.array_equal(theirs, to_float32(quantizer.dequantize(packed)))
    scale = np.repeat(to_float32(packed.arrays["scales"]), 64, axis=1)
    assert ((theirs == 0) | (np.abs(theirs) == scale)).all()


def test_the_exact_rule_finds_the_best_of_all_ternary_weights():
    group = np.random.default_rng(3).standard_normal((20, 1, 7)).astype(np.float32)
    found = choose(group, "exact")
    error = ((found.trits * found.scale[..., None] - group) ** 2).sum(axis=-1)[:, 0]
    every = np.array(list(product((-1, 0, 1), repeat=7)), dtype=np.float64)
    for number, values in enumerate(group[:, 0].astype(np.float64)):
        used = np.maximum((every**2).sum(axis=1), 1)
        scale = np.maximum(every @ values / used, 0)
        best = ((scale[:, None] * every - values) ** 2).sum(axis=1).min()
        assert error[number] <= best * (1 + 1e-5)


def test_absmean_is_that_of_bitnet():
    group = np.random.default_rng(0).standard_normal((1, 1, 512)).astype(np.float32)
    found = choose(group, "absmean")
    weight = torch.from_numpy(group.reshape(-1))
    scale = 1.0 / weight.abs().mean().clamp_(min=1e-5)
    assert np.array_equal(found.trits.reshape(-1), (weight * scale).round().clamp(-1, 1).numpy())
    assert found.scale.item() == pytest.approx(1 / scale.item(), rel=1e-6)


def test_twn_keeps_what_is_above_seven_tenths_of_the_mean():
    group = np.random.default_rng(0).standard_normal((4, 2, 64)).astype(np.float32)
    found = choose(group, "twn")
    magnitude = np.abs(group)
    kept = magnitude > 0.7 * magnitude.mean(axis=-1, keepdims=True)
    assert np.array_equal(found.trits != 0, kept)
    assert np.array_equal(found.trits[kept], np.sign(group)[kept])
    wanted = (magnitude * kept).sum(axis=-1) / kept.sum(axis=-1)
    np.testing.assert_allclose(found.scale, wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("rule", "zeros"), [("sparsity10", 6), ("sparsity50", 32), ("sparsity90", 58), ("quantile", 21)]
)
def test_the_chosen_share_of_a_group_becomes_zero(rule, zeros):
    group = np.random.default_rng(0).standard_normal((4, 2, 64)).astype(np.float32)
    found = choose(group, rule)
    assert ((found.trits == 0).sum(axis=-1) == zeros).all()
    largest_zero = np.where(found.trits == 0, np.abs(group), 0).max(axis=-1)
    assert (np.where(found.trits != 0, np.abs(group), np.inf).min(axis=-1) >= largest_zero).all()


def test_stochastic_rounding_is_unbiased_and_a_function_of_the_weight():
    row = np.random.default_rng(0).uniform(-1, 1, 64).astype(np.float32)
    row[0] = 1
    many = choose(np.tile(row, (1, 4000, 1)), "stochastic")
    mean = (many.trits * many.scale[..., None]).mean(axis=(0, 1))
    assert np.abs(mean - row).max() < 5 * 0.5 / np.sqrt(4000)
    quantizer = TernaryQuantizer(scheme_of("stochastic"))
    assert same(quantizer.quantize(weights("F32")), quantizer.quantize(weights("F32")))
    moved = to_float32(weights("F32")).copy()
    moved[8, 8] += 1
    other = quantizer.quantize(from_float32(moved, "F32")).arrays["weight"].data
    assert (other[9:] != quantizer.quantize(weights("F32")).arrays["weight"].data[9:]).any()


@pytest.mark.parametrize("width", [1, 4, 5, 6, 64, 128])
def test_base_three_packing_is_five_trits_a_byte_and_comes_back(width):
    codes = np.random.default_rng(width).integers(0, 3, (7, width), dtype=np.uint8)
    raw = pack_base3(codes)
    assert raw.shape == (7, -(-width // 5))
    number = sum(int(code) * 3**place for place, code in enumerate(codes[2, :5]))
    assert raw[2, 0] == number
    assert np.array_equal(unpack_base3(raw, width=width), codes)


@pytest.mark.parametrize(("raw", "width"), [([[243]], 5), ([[0, 0]], 5), ([[255]], 1)])
def test_bytes_that_are_no_base_three_are_refused(raw, width):
    with pytest.raises(ModelError, match="base-3 digits"):
        unpack_base3(np.uint8(raw), width=width)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bitnet_packing_is_that_of_transformers(inverse, dtype):
    from transformers.integrations.bitnet import pack_weights, unpack_weights

    weight = weights(dtype)
    packed = BitnetQuantizer(Scheme("bitnet-inverse" if inverse else "bitnet", 2, 0)).quantize(weight)
    raw = packed.arrays["weight"].data
    trits = bitnet.unpack(raw).astype(np.int8) - 1
    assert np.array_equal(pack_weights(torch.from_numpy(trits.copy())).numpy(), raw)
    with torch.compiler.set_stance("force_eager"):
        assert np.array_equal(unpack_weights(torch.from_numpy(raw.copy()), torch.float32).numpy(), trits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bitnet_keeps_a_matrix_that_is_ternary(dtype):
    quantizer = BitnetQuantizer(Scheme("bitnet", 2, 0))
    once = quantizer.quantize(weights(dtype))
    assert same(once, quantizer.quantize(quantizer.dequantize(once)))
    values = to_float32(quantizer.dequantize(once))
    assert len(np.unique(np.abs(values))) == 2


def test_bitnet_scales_are_the_mean_magnitude():
    weight = weights("F32")
    mean = np.abs(weight.data).mean()
    for name, wanted in (("bitnet", mean), ("bitnet-inverse", 1 / mean)):
        quantizer = BitnetQuantizer(Scheme(name, 2, 0))
        packed = quantizer.quantize(weight)
        assert packed.arrays["weight_scale"].data[0] == pytest.approx(wanted, rel=1e-6)
        assert np.abs(quantizer.dequantize(packed).data).max() == pytest.approx(mean, rel=1e-6)


def test_shapes_that_do_not_divide_are_refused():
    with pytest.raises(ModelError, match="width 100 does not divide"):
        TernaryQuantizer(scheme_of("exact")).quantize(Tensor("F32", np.zeros((4, 100), dtype=np.float32)))
    with pytest.raises(ModelError, match="6 rows does not divide into fours"):
        BitnetQuantizer(Scheme("bitnet", 2, 0)).quantize(Tensor("F32", np.zeros((6, 8), dtype=np.float32)))
