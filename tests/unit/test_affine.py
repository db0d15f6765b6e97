"""The affine codec is MLX's own, bit for bit."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxlora.state import from_mlx, to_mlx
from shared.errors import ModelError
from shared.quant.affine import AffineQuantizer, pack, unpack
from shared.tensors import from_float32, to_float32
from shared.types import Packed, Scheme, Tensor

BITS, GROUPS, DTYPES = (2, 3, 4, 5, 6, 8), (32, 64, 128), ("F32", "F16", "BF16")
ALL = [(bits, group, dtype) for bits in BITS for group in GROUPS for dtype in DTYPES]


def weights(dtype):
    """Return (16, 256) values: ordinary rows and every kind of row that has gone wrong somewhere."""
    random = np.random.default_rng(0)
    rows = random.standard_normal((16, 256)).astype(np.float32) * 0.05
    rows[0] = 0
    rows[1] = 0.37  # constant
    rows[2] = -0.37
    rows[3] = -np.abs(rows[3]) - 0.1  # negative only
    rows[4] = np.abs(rows[4]) + 0.1  # positive only
    rows[5, :128] = 0  # some groups zero
    rows[6] *= 1e4
    rows[7] *= 1e-4
    rows[8, 1::2] = -rows[8, ::2]  # both edges equally far
    rows[9] = -0.0
    rows[10, ::32] = 10  # one outlier per group
    rows[11] = np.round(rows[11] * 40) / 8  # many ties
    rows[12] *= 1e-7
    return from_float32(rows, dtype)


def words(tensor):
    return tensor.data.view({2: np.uint16, 4: np.uint32}[tensor.data.dtype.itemsize])


@pytest.mark.parametrize(("bits", "group", "dtype"), ALL)
def test_codes_scales_and_biases_are_those_of_mlx(bits, group, dtype):
    weight = weights(dtype)
    ours = AffineQuantizer(Scheme("affine", bits, group)).quantize(weight).arrays
    theirs = mx.quantize(to_mlx(weight), group_size=group, bits=bits)
    for key, array in zip(("weight", "scales", "biases"), theirs, strict=True):
        found = from_mlx(array)
        assert ours[key].dtype == found.dtype
        assert np.array_equal(words(ours[key]), words(found)), key


@pytest.mark.parametrize(("bits", "group", "dtype"), ALL)
def test_the_decoded_weight_is_that_of_mlx(bits, group, dtype):
    quantizer = AffineQuantizer(Scheme("affine", bits, group))
    packed = quantizer.quantize(weights(dtype))
    arrays = [to_mlx(packed.arrays[key]) for key in ("weight", "scales", "biases")]
    theirs, ours = from_mlx(mx.dequantize(*arrays, group_size=group, bits=bits)), quantizer.dequantize(packed)
    assert ours.dtype == dtype == theirs.dtype
    assert np.array_equal(words(ours), words(theirs))


@pytest.mark.parametrize("bits", BITS)
def test_any_codes_and_scales_decode_as_in_mlx(bits):
    """Not only those that quantize makes: folders come from other tools."""
    random = np.random.default_rng(bits)
    arrays = {
        "weight": Tensor("U32", random.integers(0, 2**32, (8, 256 * bits // 32), dtype=np.uint32)),
        "scales": from_float32(random.standard_normal((8, 4)), "BF16"),
        "biases": from_float32(random.standard_normal((8, 4)), "BF16"),
    }
    scheme = Scheme("affine", bits, 64)
    ours = AffineQuantizer(scheme).dequantize(Packed(scheme, arrays, (8, 256), "BF16"))
    theirs = mx.dequantize(*map(to_mlx, arrays.values()), group_size=64, bits=bits)
    assert np.array_equal(words(ours), words(from_mlx(theirs)))


@pytest.mark.parametrize(("bits", "group"), [(bits, group) for bits in BITS for group in GROUPS])
def test_no_value_moves_by_more_than_half_a_step(bits, group):
    """Half a step of the group's own scale; the far edge may be clipped by as much again."""
    weight = weights("F32")
    quantizer = AffineQuantizer(Scheme("affine", bits, group))
    packed = quantizer.quantize(weight)
    gap = np.abs(to_float32(quantizer.dequantize(packed)) - to_float32(weight)).reshape(16, -1, group).max(axis=-1)
    assert (gap <= np.abs(to_float32(packed.arrays["scales"])) * (1 + 1e-3) + 1e-7).all()


@pytest.mark.parametrize("bits", BITS)
def test_zero_moves_by_rounding_only(bits):
    """A code times a scale is the edge again, but for one float32 rounding."""
    quantizer = AffineQuantizer(Scheme("affine", bits, 64))
    values = to_float32(weights("F32"))[13:16].copy()
    values[:, ::5] = 0
    found = to_float32(quantizer.dequantize(quantizer.quantize(from_float32(values, "F32"))))
    assert np.abs(found[:, ::5]).max() <= 2**-23 * np.abs(values).max()


@pytest.mark.parametrize("bits", BITS)
def test_packing_is_one_little_endian_bit_stream(bits):
    codes = np.random.default_rng(0).integers(0, 2**bits, (3, 64), dtype=np.uint8)
    stream = sum(int(code) << (n * bits) for n, code in enumerate(codes[1]))
    expected = [(stream >> (32 * n)) & 0xFFFFFFFF for n in range(64 * bits // 32)]
    assert pack(codes, bits=bits)[1].tolist() == expected
    assert np.array_equal(unpack(pack(codes, bits=bits), bits=bits), codes)


def test_a_width_that_does_not_divide_into_groups_is_refused():
    quantizer = AffineQuantizer(Scheme("affine", 4, 64))
    assert quantizer.fits((3, 128))
    assert not quantizer.fits((3, 100))
    with pytest.raises(ModelError, match="width 100 does not divide into groups of 64"):
        quantizer.quantize(Tensor("F32", np.zeros((3, 100), dtype=np.float32)))
