"""Triton kernels against the NumPy codec and against torch's own operations, bit for bit: run with -m cuda."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shared.quant.affine import AffineQuantizer
from shared.registry import find_quantizer
from shared.schemes import named_schemes
from shared.tensors import from_float32
from shared.types import Scheme
from torch_backend.decoders import decode_affine
from torch_backend.quantized import QuantizedEmbedding, QuantizedLinear, decode_packed
from torch_backend.state import from_torch, to_torch

SCHEMES = [Scheme("affine", bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]
pytestmark = pytest.mark.cuda


def packed(scheme, dtype, *, rows=33, width=640):
    """Return a weight whose size is no multiple of a kernel's tile, with values over many binades."""
    random = np.random.default_rng(scheme.bits * scheme.group_size)
    values = random.standard_normal((rows, width)) * np.exp2(random.integers(-12, 4, (rows, 1)))
    return AffineQuantizer(scheme).quantize(from_float32(values.astype(np.float32), dtype))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_decoded_on_cuda_equals_the_codec_and_the_plain_path(scheme, dtype):
    one = packed(scheme, dtype)
    wanted = AffineQuantizer(scheme).dequantize(one)
    arrays = {key: to_torch(tensor) for key, tensor in one.arrays.items()}
    plain = decode_affine(arrays, one.stored)
    found = decode_affine({key: value.cuda() for key, value in arrays.items()}, one.stored)
    for value in (plain, found):
        assert np.array_equal(from_torch(value).data.view(np.uint8), wanted.data.view(np.uint8))


@pytest.mark.parametrize("scheme", [s for s in named_schemes().values() if not s.solver], ids=str)
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_every_format_decodes_on_cuda_as_its_codec_does(scheme, dtype):
    values = np.random.default_rng(0).standard_normal((48, 384)).astype(np.float32)
    quantizer = find_quantizer(scheme)
    one = quantizer.quantize(from_float32(values, dtype))
    found = decode_packed(one, device="cuda")
    assert found.data.tobytes() == quantizer.dequantize(one).data.tobytes()


def test_layers_on_cuda_use_the_same_values():
    one = packed(Scheme("affine", 4, 64), "BF16", rows=96)
    wanted = to_torch(AffineQuantizer(one.scheme).dequantize(one)).cuda()
    tokens = torch.tensor([[3, 95, 0]]).cuda()
    table = QuantizedEmbedding(one, torch.bfloat16, scale=1.0).cuda()
    assert torch.equal(table(tokens), wanted[tokens])
    layer = QuantizedLinear(one, None).cuda()
    assert torch.equal(layer.decoded(torch.bfloat16), wanted)
