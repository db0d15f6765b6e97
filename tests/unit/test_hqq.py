"""HQQ writes affine codes. Golden figures are hqq 0.2.8's own; the library itself is asked where it is installed."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from shared.quant.affine import AffineQuantizer, unpack
from shared.quant.hqq import HQQuantizer
from shared.tensors import from_float32, to_float32
from shared.types import Scheme

BITS = (2, 3, 4, 5, 6, 8)
# sha256 of hqq's codes for `weights()`, row-major uint8, and the mean error of its dequantized weight, groups of 64.
GOLDEN = {
    2: ("34119c64f04cbf0d", 9.021077305e-03),
    3: ("1017367a6bc38a4d", 4.212930333e-03),
    4: ("94896314ee08276d", 1.965573989e-03),
    5: ("5373ed297a0d9ccb", 9.610246052e-04),
    6: ("acb38a0712170d03", 4.723669845e-04),
    8: ("b36f706c18cf2c55", 1.161662149e-04),
}


def weights():
    """Return (64, 256) values with groups that are constant, zero, tiny and all of one sign."""
    rows = (np.random.default_rng(7).integers(-4000, 4001, (64, 256)) / 65536).astype(np.float32)
    rows[0] = 0
    rows[1] = 0.375
    rows[2] /= 4096
    rows[3] = np.abs(rows[3]) + np.float32(0.125)
    rows[4, ::64] = 1
    return rows


def codes_of(packed, bits):
    return unpack(packed.arrays["weight"].data, bits=bits)


@pytest.mark.parametrize("bits", BITS)
def test_codes_and_error_are_those_of_hqq(bits):
    quantizer = HQQuantizer(Scheme("affine", bits, 64))
    packed = quantizer.quantize(from_float32(weights(), "F32"))
    digest, error = GOLDEN[bits]
    found = np.abs(to_float32(quantizer.dequantize(packed)) - weights()).mean()
    assert abs(found - error) < 1e-5 * error
    assert hashlib.sha256(codes_of(packed, bits).tobytes()).hexdigest().startswith(digest)


@pytest.mark.slow
@pytest.mark.parametrize("bits", BITS)
def test_the_library_dequantizes_to_the_same_weight(bits):
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("hqq.core.quantize", reason="hqq is not installed (pip install hqq)")
    values = np.random.default_rng(bits).standard_normal((256, 512)).astype(np.float32) * np.float32(0.05)
    codes, meta = library.Quantizer.quantize(
        torch.from_numpy(values), nbits=bits, group_size=64, axis=1, bitpack=False, device="cpu"
    )
    meta["compute_dtype"] = torch.float32
    theirs = library.Quantizer.dequantize(codes, meta).numpy()
    quantizer = HQQuantizer(Scheme("affine", bits, 64))
    packed = quantizer.quantize(from_float32(values, "F32"))
    ours, moved = to_float32(quantizer.dequantize(packed)), codes_of(packed, bits) != codes.numpy().reshape(256, 512)
    assert moved.mean() < 5e-4
    assert np.abs(ours - theirs)[~moved].max() < (1e-6 if bits < 6 else 1e-3)
    assert abs(np.abs(ours - values).mean() / np.abs(theirs - values).mean() - 1) < 1e-3


@pytest.mark.parametrize("bits", BITS[1:4])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_from_three_bits_on_its_error_is_below_that_of_min_max(bits, dtype):
    weight = from_float32(np.random.default_rng(0).standard_normal((64, 512)) * 0.05, dtype)
    scheme, values = Scheme("affine", bits, 64), to_float32(weight)
    errors = []
    for kind in (HQQuantizer, AffineQuantizer):
        quantizer = kind(scheme)
        errors.append(np.abs(to_float32(quantizer.dequantize(quantizer.quantize(weight))) - values).mean())
    assert errors[0] < errors[1]


def test_the_affine_decoder_reads_what_it_writes():
    scheme = Scheme("affine", 4, 64)
    packed = HQQuantizer(scheme).quantize(from_float32(weights(), "F32"))
    one, other = HQQuantizer(scheme).dequantize(packed), AffineQuantizer(scheme).dequantize(packed)
    assert np.array_equal(one.data, other.data)
    assert np.abs(to_float32(one)[1] - np.float32(0.375)).max() < 1e-6
