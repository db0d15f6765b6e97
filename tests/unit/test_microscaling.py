"""mxfp4, nvfp4 and mxfp8 are MLX's own, bit for bit."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlxlora.state import from_mlx, to_mlx
from shared.errors import ModelError
from shared.quant.microscaling import E2M1, MicroscalingQuantizer, decode_e4m3, encode_e2m1, encode_e4m3
from shared.tensors import from_float32, is_finite, to_float32
from shared.types import Packed, Scheme, Tensor

SCHEMES = [Scheme("mxfp4", 4, 32), Scheme("nvfp4", 4, 16), Scheme("mxfp8", 8, 32)]
DTYPES = ("F32", "F16", "BF16")
ALL = pytest.mark.parametrize(("scheme", "dtype"), [(scheme, dtype) for scheme in SCHEMES for dtype in DTYPES])


def weights(dtype):
    """Return (56, 256) values: ordinary rows, every magnitude that a float16 holds, ties, zeros, constants."""
    random = np.random.default_rng(0)
    rows = random.standard_normal((56, 256)).astype(np.float32) * 0.05
    rows[0] = 0
    rows[1], rows[2] = 0.37, -0.37
    rows[3, :128] = 0  # some groups zero
    rows[4] = -0.0
    rows[5, ::32] = 10  # one outlier per group
    rows[6:20] = np.round(rows[6:20] * 80) / np.float32(4)  # many ties
    for number in range(20, 56):
        rows[number] *= np.float32(2.0 ** (number - 38))
    return from_float32(rows, dtype)


def words(tensor):
    return tensor.data.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[tensor.data.dtype.itemsize])


def same_as_mlx(weight, scheme):
    ours = MicroscalingQuantizer(scheme).quantize(weight).arrays
    theirs = [from_mlx(array) for array in mx.quantize(to_mlx(weight), mode=scheme.name)]
    pairs = list(zip((ours["weight"], ours["scales"]), theirs, strict=True))
    return all(a.dtype == b.dtype and np.array_equal(a.data, b.data) for a, b in pairs)


@ALL
def test_codes_and_scales_are_those_of_mlx(scheme, dtype):
    assert same_as_mlx(weights(dtype), scheme)


@ALL
def test_scales_beside_a_power_of_two_are_those_of_mlx(scheme, dtype):
    """The largest magnitude of a group at 6 * 2^k and 448 * 2^k, and two steps of the dtype to either side."""
    kind = np.uint32 if dtype == "F32" else np.uint16
    tops = np.array([top * 2.0**k for top in (6, 448) for k in range(-14, 8)], dtype=np.float32)
    near = words(from_float32(tops, dtype)).astype(np.int64)[:, None] + np.arange(-2, 3)
    rows = np.zeros((near.size, 32), dtype=kind)
    rows[:, 3] = near.reshape(-1)
    weight = Tensor(dtype, {"F32": rows.view(np.float32), "F16": rows.view(np.float16), "BF16": rows}[dtype])
    assert is_finite(weight)
    assert same_as_mlx(weight, scheme)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_any_codes_and_scales_decode_as_in_mlx(scheme):
    random = np.random.default_rng(scheme.group_size)
    codes = random.integers(0, 2**32, (64, 256 * scheme.bits // 32), dtype=np.uint32)
    scales = np.arange(64 * 256 // scheme.group_size, dtype=np.uint32).astype(np.uint8).reshape(64, -1)
    arrays = {"weight": Tensor("U32", codes), "scales": Tensor("U8", scales)}
    ours = MicroscalingQuantizer(scheme).dequantize(Packed(scheme, arrays, (64, 256), "BF16"))
    theirs = from_mlx(mx.dequantize(*map(to_mlx, arrays.values()), mode=scheme.name))
    values, wanted = to_float32(ours), to_float32(theirs)
    assert ours.dtype == theirs.dtype == "BF16"
    assert np.array_equal(values, wanted, equal_nan=True)
    assert np.array_equal(np.signbit(values), np.signbit(wanted)) or np.isnan(values).any()


@pytest.mark.parametrize("scheme", SCHEMES[::2], ids=lambda scheme: scheme.name)
def test_quantizing_a_decoded_weight_again_gives_the_same_values(scheme):
    quantizer = MicroscalingQuantizer(scheme)
    once = quantizer.dequantize(quantizer.quantize(weights("BF16")))
    again = quantizer.dequantize(quantizer.quantize(once))
    assert np.array_equal(to_float32(once), to_float32(again))


@pytest.mark.parametrize(("scheme", "bound"), [(SCHEMES[0], 1 / 6), (SCHEMES[1], 0.2), (SCHEMES[2], 1 / 14)])
def test_no_value_moves_by_more_than_half_the_widest_gap(scheme, bound):
    """Gaps are 2 of 6 (32 of 448), on a scale that is up to two times too large; nvfp4's is rounded by 1/16."""
    values = to_float32(weights("F32"))[20:56]
    quantizer = MicroscalingQuantizer(scheme)
    found = to_float32(quantizer.dequantize(quantizer.quantize(from_float32(values, "F32"))))
    grouped = np.abs(values).reshape(36, -1, scheme.group_size).max(axis=-1)
    gap = np.abs(found - values).reshape(36, -1, scheme.group_size).max(axis=-1)
    used = (grouped > 2**-5) & (grouped < 2600)  # outside, nvfp4's scale itself is coarse or at its end
    assert (gap[used] <= grouped[used] * 2 * bound).all()


def test_e4m3_is_that_of_torch_for_every_byte_and_every_midpoint():
    every = np.arange(256, dtype=np.uint8)
    theirs = torch.from_numpy(every.copy()).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(decode_e4m3(every), theirs, equal_nan=True)
    table = decode_e4m3(every[:127])
    middles = (table[:-1] + table[1:]) / np.float32(2)
    values = np.concatenate([table, middles, np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.inf)])
    values = np.concatenate([values, -values]).astype(np.float32)
    wanted = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(encode_e4m3(values), wanted)


def test_e2m1_takes_the_nearest_code():
    values = np.linspace(-7, 7, 4001, dtype=np.float32)
    table = np.concatenate([E2M1, -E2M1])
    found = table[encode_e2m1(values)]
    assert np.array_equal(np.abs(found - values), np.abs(table - values[:, None]).min(axis=1))


def test_a_width_that_does_not_divide_into_groups_is_refused():
    quantizer = MicroscalingQuantizer(SCHEMES[0])
    assert not quantizer.fits((3, 48))
    assert MicroscalingQuantizer(SCHEMES[1]).fits((3, 48))
    with pytest.raises(ModelError, match="width 48 does not divide into groups of 32"):
        quantizer.quantize(Tensor("F32", np.zeros((3, 48), dtype=np.float32)))
