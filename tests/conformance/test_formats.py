"""Every format's decoder on every backend is the NumPy codec, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from shared.errors import CapabilityError
from shared.registry import QUANTIZERS, find_quantizer
from shared.schemes import named_schemes
from shared.tensors import from_float32
from shared.types import Packed, Scheme

SCHEMES = [
    scheme
    for scheme in named_schemes().values()
    if scheme.codec in QUANTIZERS and scheme.name != "affine" and not scheme.solver
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_decoded_weights_are_those_of_the_codec_bit_for_bit(backend, scheme, dtype):
    rows = np.random.default_rng(0).standard_normal((48, 384)).astype(np.float32) * 0.1
    rows[0], rows[1, :200] = 0, 0
    rows[2] *= 1e-2
    quantizer = find_quantizer(scheme)
    packed = quantizer.quantize(from_float32(rows, dtype))
    found, wanted = backend.decode(packed), quantizer.dequantize(packed)
    assert found.dtype == wanted.dtype == packed.dtype
    assert np.array_equal(found.data.view(np.uint8), wanted.data.view(np.uint8))


def test_a_format_without_a_decoder_is_refused_by_its_name(backend):
    packed = Packed(Scheme("huffman", 4, 64), {}, (8, 64), "F32")
    with pytest.raises(CapabilityError, match=rf'"huffman-g64" does not run on the {backend.name} backend'):
        backend.decode(packed)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("scale_bytes", [2, 4])
def test_the_bytes_of_a_format_are_counted_before_it_is_made(scheme, scale_bytes):
    quantizer = find_quantizer(scheme)
    for shape in ((48, 384), (8, 128), (20, 1152)):
        packed = quantizer.quantize(from_float32(np.ones(shape), "F32" if scale_bytes == 4 else "BF16"))
        held = sum(tensor.data.nbytes for tensor in packed.arrays.values())
        assert quantizer.num_bytes(shape, scale_bytes=scale_bytes) == held
