"""The quanto codec is optimum-quanto's, bit for bit. Its C++ unpacking, built on first use, is left to a slow test."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from optimum.quanto import QLinear, qfloat8, qint2, qint4, qint8, quantize_weight
from optimum.quanto.tensor.qbits import QBitsDequantizer

from shared.errors import ModelError
from shared.quant.quanto import QuantoQuantizer, group_size, pack, unpack
from shared.tensors import from_float32, to_float32
from shared.types import Packed, Scheme, Tensor
from torch_backend.state import from_torch, to_torch

TYPES = {"quanto-qint2": qint2, "quanto-qint4": qint4, "quanto-qint8": qint8, "quanto-qfloat8": qfloat8}
SCHEMES = [
    Scheme("quanto-qint2", 2, 128), Scheme("quanto-qint4", 4, 128), Scheme("quanto-qint8", 8, 0),
    Scheme("quanto-qfloat8", 8, 0),
]  # fmt: skip
WIDTHS = (256, 192, 96, 130, 44)  # groups of 128, of 96, and a whole row three times
ALL = pytest.mark.parametrize(
    ("scheme", "dtype", "width"), [(s, d, w) for s in SCHEMES for d in ("F32", "F16", "BF16") for w in WIDTHS]
)


def weights(dtype, width):
    """Return (19, width) values: 19 rows fill no byte of four, and no row is zero."""
    rows = np.random.default_rng(width).standard_normal((19, width)).astype(np.float32) * 0.05
    rows[1] = 0.37
    rows[2] = np.round(rows[2] * 40) / 8  # many ties
    rows[2, 0] = 0.5
    rows[3], rows[4] = np.abs(rows[3]) + 0.1, -np.abs(rows[4]) - 0.1
    rows[5] *= 1e3
    rows[6] *= 1e-2
    return from_float32(rows, dtype)


def quantize(weight, scheme):
    """Return optimum-quanto's tensor as its QLinear makes it, before a device's kernels rearrange it."""
    layer = QLinear(*weight.shape[::-1], bias=False, dtype=to_torch(weight).dtype, weights=TYPES[scheme.name])
    values, kind, size = to_torch(weight), TYPES[scheme.name], layer.weight_group_size
    if scheme.bits == 8:
        return quantize_weight(values, kind, 0, layer.optimizer(values, kind, 0), optimized=False)
    scale, shift = layer.optimizer(values, kind, 0, size)
    return quantize_weight(values, kind, 0, scale, shift, size, optimized=False)


def words(tensor):
    return tensor.data.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[tensor.data.dtype.itemsize])


def stored(quantized, scheme):
    """Return what optimum-quanto stores, under our names."""
    state = {}
    quantized.save_to_state_dict(state, "", keep_vars=False)
    data = state["_data" if scheme.bits == 8 else "_data._data"]
    arrays = {
        "weight": Tensor({torch.int8: "I8", torch.uint8: "U8"}.get(data.dtype, "F8_E4M3"), data.view(torch.uint8)),
        "scales": from_torch(state["_scale"]),
    }
    return arrays if scheme.bits == 8 else {**arrays, "shifts": from_torch(state["_shift"])}


def dequantize(quantized, scheme):
    """Return its own dequantized weight, by the plain definition of its unpacking operation."""
    if scheme.bits == 8:
        return from_torch(quantized.dequantize())
    packed, plain = quantized._data, torch._C.DispatchKey.CompositeExplicitAutograd
    unpacked = torch.ops.quanto.unpack.default._op_dk(plain, packed._data, scheme.bits)
    quantized._data = unpacked[: packed.shape[0]]
    return from_torch(QBitsDequantizer.apply(quantized))


@ALL
def test_codes_scales_and_shifts_are_those_of_optimum_quanto(scheme, dtype, width):
    weight = weights(dtype, width)
    ours, theirs = QuantoQuantizer(scheme).quantize(weight).arrays, stored(quantize(weight, scheme), scheme)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype
        assert np.array_equal(words(ours[key]), np.asarray(tensor.data).view(words(ours[key]).dtype)), key


@ALL
def test_the_decoded_weight_is_that_of_optimum_quanto(scheme, dtype, width):
    weight, quantizer = weights(dtype, width), QuantoQuantizer(scheme)
    ours, theirs = quantizer.dequantize(quantizer.quantize(weight)), dequantize(quantize(weight, scheme), scheme)
    assert ours.dtype == theirs.dtype == dtype
    assert np.array_equal(to_float32(ours), to_float32(theirs))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES[:2], ids=lambda scheme: scheme.name)
def test_its_own_kernel_unpacks_the_same(scheme):
    weight, quantizer = weights("F32", 256), QuantoQuantizer(scheme)
    ours = quantizer.dequantize(quantizer.quantize(weight))
    theirs = from_torch(quantize(weight, scheme).dequantize())
    assert np.array_equal(words(ours), words(theirs))


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_no_value_moves_by_more_than_half_a_step_and_a_rounding(scheme):
    weight, quantizer = weights("F32", 256), QuantoQuantizer(scheme)
    packed = quantizer.quantize(weight)
    gap = np.abs(to_float32(quantizer.dequantize(packed)) - to_float32(weight))
    scales = to_float32(packed.arrays["scales"]).reshape(19, -1)
    step = np.repeat(scales, 256 // scales.shape[1], axis=1)
    widest = 32 if scheme.name == "quanto-qfloat8" else 1
    assert (gap <= step * widest * 0.5001 + 1e-7).all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_a_row_of_zeros_stays_zero(scheme):
    """optimum-quanto divides 0 by 0 there, and has NaN in qfloat8."""
    quantizer = QuantoQuantizer(scheme)
    packed = quantizer.quantize(Tensor("F32", np.zeros((4, 256), dtype=np.float32)))
    assert not to_float32(quantizer.dequantize(packed)).any()


def test_any_bytes_decode_as_in_optimum_quanto():
    random = np.random.default_rng(0)
    for scheme in SCHEMES[:2]:
        layer = quantize(weights("BF16", 256), scheme)
        raw = random.integers(0, 256, tuple(layer._data._data.shape), dtype=np.uint8)
        layer._data._data.copy_(torch.from_numpy(raw))
        packed = Packed(scheme, stored(layer, scheme), (19, 256), "BF16")
        packed.arrays["weight"] = Tensor("U8", raw)
        found = QuantoQuantizer(scheme).dequantize(packed)
        assert np.array_equal(to_float32(found), to_float32(dequantize(layer, scheme)))


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 6, 7, 8])
def test_packing_comes_back_and_is_that_of_optimum_quanto(bits, rows):
    from optimum.quanto.tensor.packed import pack_weights

    codes = np.random.default_rng(rows).integers(0, 2**bits, (rows, 32), dtype=np.uint8)
    raw = pack(codes, bits=bits)
    assert np.array_equal(raw, pack_weights(torch.from_numpy(codes), bits).numpy())
    assert np.array_equal(unpack(raw, bits=bits, rows=rows), codes)


@pytest.mark.parametrize("width", [32, 64, 96, 100, 128, 129, 160, 192, 224, 256, 320, 384, 500, 512, 576])
def test_groups_are_those_of_optimum_quanto(width):
    layer = QLinear(width, 2, bias=False, weights=qint4)
    assert group_size(width) == (layer.weight_group_size or width)


def test_a_single_row_is_refused():
    with pytest.raises(ModelError, match="stores a weight of shape"):
        QuantoQuantizer(SCHEMES[2]).quantize(Tensor("F32", np.ones((1, 64), dtype=np.float32)))
