"""nf4, fp4 and int8 against bitsandbytes, which owns the formats."""

from __future__ import annotations

import bitsandbytes
import numpy as np
import pytest
import torch
from bitsandbytes import functional

from shared.errors import ModelError
from shared.quant.four_bit import CHUNK, CODES, FourBitQuantizer, compress, encode, expand, search_table
from shared.quant.row_int8 import RowInt8Quantizer
from shared.registry import find_quantizer
from shared.schemes import parse_scheme
from shared.tensors import from_float32, to_float32
from shared.types import Scheme, Tensor
from torch_backend.state import to_torch

DTYPES = ["F32", "BF16", "F16"]
# Rows of whole blocks, rows that share blocks, a short last block, an odd number of values.
SHAPES = [(48, 256), (32, 50), (3, 50), (5, 7)]


def values(shape, dtype, *, seed=0):
    """Return a weight over many binades with zeros, whole blocks of zeros and exact extremes in it."""
    random = np.random.default_rng(seed)
    weight = random.standard_normal(shape) * np.exp2(random.integers(-12, 4, (shape[0], 1)))
    weight[0, ::3] = 0
    weight[1] = 0
    weight[2, :2] = [-2.0, 2.0]
    return from_float32(weight.astype(np.float32), dtype)


def theirs(weight, name, *, double):
    """Return bytes and state of a weight as bitsandbytes quantizes it."""
    return functional.quantize_4bit(to_torch(weight), quant_type=name, compress_statistics=double)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_codes_and_midpoints_are_those_of_bitsandbytes(name):
    from bitsandbytes.backends.default.ops import _get_4bit_quantize_bounds

    assert CODES[name].tobytes() == functional.get_4bit_type(name, device="cpu").numpy().tobytes()
    bounds, order = _get_4bit_quantize_bounds(name, torch.device("cpu"))
    table = search_table(name)
    assert np.array_equal(table.midpoints[:-1], bounds.numpy())
    assert np.array_equal(table.order, order.numpy())
    around = np.concatenate([np.nextafter(table.midpoints[:-1], np.float32(edge)) for edge in (-2, 2)])
    random = np.random.default_rng(0).uniform(-1, 1, 10_000).astype(np.float32)
    asked = np.concatenate([table.midpoints[:-1], around, CODES[name], random, np.float32([0.0, -0.0, 1e-40, -1e-40])])
    searched = table.order[np.searchsorted(table.midpoints[:-1], asked, side="left")]
    assert np.array_equal(encode(asked, name), searched)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block", [64, 128])
def test_bytes_and_absmax_are_those_of_bitsandbytes(name, dtype, shape, block):
    weight = values(shape, dtype)
    packed = FourBitQuantizer(Scheme(name, 4, block)).quantize(weight)
    raw, state = functional.quantize_4bit(to_torch(weight), quant_type=name, blocksize=block)
    assert np.array_equal(packed.arrays["weight"].data, raw.numpy())
    assert np.array_equal(packed.arrays["absmax"].data, state.absmax.numpy())


def test_a_weight_of_several_chunks_is_that_of_bitsandbytes():
    shape = (521, 511)
    assert shape[0] * shape[1] > CHUNK
    quantizer, weight = FourBitQuantizer(Scheme("nf4", 4, 64)), values(shape, "BF16")
    packed, (raw, state) = quantizer.quantize(weight), theirs(weight, "nf4", double=False)
    assert np.array_equal(packed.arrays["weight"].data, raw.numpy())
    assert np.array_equal(packed.arrays["absmax"].data, state.absmax.numpy())
    decoded = functional.dequantize_4bit(raw, state)
    assert np.array_equal(to_float32(quantizer.dequantize(packed)), decoded.float().numpy())


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("double", [False, True])
def test_what_bitsandbytes_packed_decodes_to_its_values(name, dtype, shape, double):
    weight = values(shape, dtype)
    raw, state = theirs(weight, name, double=double)
    arrays = {"weight": Tensor("U8", raw.numpy()), "absmax": Tensor("U8" if double else "F32", state.absmax.numpy())}
    if double:
        arrays["nested_absmax"] = Tensor("F32", state.state2.absmax.numpy())
        arrays["nested_quant_map"] = Tensor("F32", state.state2.code.numpy())
        arrays["nested_offset"] = Tensor("F32", np.array(state.offset.item(), dtype=np.float32))
    quantizer = FourBitQuantizer(Scheme(name, 4, 64, double=double))
    packed = quantizer.quantize(weight)
    found = to_float32(quantizer.dequantize(type(packed)(packed.scheme, arrays, packed.shape, packed.dtype)))
    assert np.array_equal(found, functional.dequantize_4bit(raw, state).float().numpy())


def test_double_quantization_is_that_of_bitsandbytes_definition():
    """Against its default kernel: the mean to a rounding, and bit for bit from one mean on."""
    absmax = np.random.default_rng(3).gamma(2.0, 0.02, 1000).astype(np.float32)
    arrays = compress(absmax)
    offset = torch.from_numpy(absmax).mean()
    assert abs(float(arrays["nested_offset"].data) / offset.item() - 1) < 1e-6
    centred = torch.from_numpy(absmax - arrays["nested_offset"].data)
    code = functional.create_dynamic_map()
    plain = torch._C.DispatchKey.CompositeExplicitAutograd
    whole = torch.nn.functional.pad(centred, (0, -len(centred) % 256))  # it divides in a short block
    codes, nested = torch.ops.bitsandbytes.quantize_blockwise.default._op_dk(plain, whole, code, 256)
    assert np.array_equal(arrays["absmax"].data, codes.numpy()[: len(absmax)])
    assert np.array_equal(arrays["nested_absmax"].data, nested.numpy())
    assert np.abs(expand(arrays) - absmax).max() < 0.01 * absmax.max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_is_that_of_bitsandbytes(dtype, shape):
    weight = values(shape, dtype)
    quantizer = RowInt8Quantizer(Scheme("int8", 8, 0))
    packed = quantizer.quantize(weight)
    layer = bitsandbytes.nn.Int8Params(to_torch(weight), requires_grad=False, has_fp16_weights=False).to("cpu")
    used = np.arange(shape[0]) != 1  # a row of zeros: 0 * inf there, 0 here
    assert np.array_equal(packed.arrays["weight"].data[used], layer.CB.numpy()[used])
    assert not packed.arrays["weight"].data[1].any()
    assert np.array_equal(packed.arrays["SCB"].data, layer.SCB.numpy())
    decoded = functional.int8_vectorwise_dequant(torch.from_numpy(packed.arrays["weight"].data), layer.SCB)
    assert np.array_equal(quantizer.dequantize(packed).data, decoded.numpy())


@pytest.mark.parametrize("name", ["nf4", "nf4-dq", "fp4", "fp4-dq", "int8"])
def test_zero_stays_zero_and_sizes_are_as_told(name):
    scheme = parse_scheme(name)
    assert scheme is not None
    quantizer = find_quantizer(scheme)
    for shape in SHAPES:
        packed = quantizer.quantize(values(shape, "F32"))
        assert quantizer.fits(shape)
        assert quantizer.num_bytes(shape, scale_bytes=4) == sum(array.data.nbytes for array in packed.arrays.values())
        decoded = quantizer.dequantize(packed)
        assert (decoded.dtype, decoded.shape) == (packed.dtype, shape)
        if not scheme.double:  # there a block of zeros has the absmax that its code stands for
            assert not decoded.data[1].any()
        assert not decoded.data[0, ::3].any()


def test_int8_refuses_what_float16_cannot_hold():
    with pytest.raises(ModelError, match="too large for int8"):
        RowInt8Quantizer(Scheme("int8", 8, 0)).quantize(Tensor("F32", np.float32([[1e5, 1.0]])))
