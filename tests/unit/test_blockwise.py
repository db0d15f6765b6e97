"""The 8-bit codec is bitsandbytes' by its own definition, and both backends' kernels are the codec, bit for bit."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch
from bitsandbytes import functional

import mlxlora.blockwise
import torch_backend.blockwise
from shared.quant.blockwise import BLOCK, TINY, decode, encode, make_tables

SIGNED = [True, False]


def values(*, signed, size=100 * BLOCK):
    """Return float32 values of very mixed magnitude, with zeros, zero blocks, tiny blocks and every midpoint."""
    random = np.random.default_rng(0)
    flat = (random.standard_normal(size) * np.exp(4 * random.standard_normal(size))).astype(np.float32)
    flat[::7] = 0
    flat[:BLOCK] = 0
    flat[BLOCK : 2 * BLOCK] *= np.float32(1e-38) / np.abs(flat[BLOCK : 2 * BLOCK]).max()
    midpoints = make_tables(signed=signed).midpoints
    for block, toward in enumerate((-np.inf, None, np.inf), start=2):
        near = midpoints if toward is None else np.nextafter(midpoints, np.float32(toward))
        flat[block * BLOCK : (block + 1) * BLOCK] = [*near, 1]
    return flat if signed else np.abs(flat)


def ordinary(flat):
    """Return the values but for zero and tiny blocks, of which bitsandbytes makes infinity times zero."""
    rows = flat.reshape(-1, BLOCK)
    return rows[np.abs(rows).max(axis=1) >= TINY].reshape(-1)


@pytest.mark.parametrize("signed", SIGNED)
def test_the_map_is_that_of_bitsandbytes(signed):
    assert np.array_equal(make_tables(signed=signed).code, functional.create_dynamic_map(signed=signed).numpy())


@pytest.mark.parametrize("signed", SIGNED)
@pytest.mark.parametrize("cut", [0, 156])
def test_codes_are_those_of_bitsandbytes_definition(signed, cut):
    """Two of its own: nearest of all 256 distances (its CPU path for other dtypes), and search through midpoints."""
    flat = ordinary(values(signed=signed))
    flat, code = flat[: len(flat) - cut], functional.create_dynamic_map(signed=signed)
    found = encode(flat, signed=signed)
    wide = torch.from_numpy(flat).double()  # rounded to float32 again inside
    theirs, absmax = torch.ops.bitsandbytes.quantize_blockwise(wide, code, BLOCK)
    at_midpoint = np.isin(np.abs(flat), np.abs(make_tables(signed=signed).midpoints))
    assert np.array_equal(found.absmax, absmax.numpy())
    assert np.array_equal(found.codes[~at_midpoint], theirs.numpy()[~at_midpoint])
    assert np.abs(found.codes.astype(int) - theirs.numpy()).max() <= 1
    if not cut:  # it divides in a short block, where it multiplies in others
        plain = torch._C.DispatchKey.CompositeExplicitAutograd
        default = torch.ops.bitsandbytes.quantize_blockwise.default
        theirs, absmax = default._op_dk(plain, torch.from_numpy(flat), code, BLOCK)
        assert np.array_equal(found.codes, theirs.numpy())
        assert np.array_equal(found.absmax, absmax.numpy())


@pytest.mark.parametrize("signed", SIGNED)
@pytest.mark.parametrize("cut", [0, 156])
def test_decoded_values_are_those_of_bitsandbytes(signed, cut):
    flat = values(signed=signed)
    packed = encode(flat[: len(flat) - cut], signed=signed)
    table = make_tables(signed=signed).decoded
    state = functional.QuantState(
        torch.from_numpy(packed.absmax), code=torch.from_numpy(table.copy()), blocksize=BLOCK,
        dtype=torch.float32,
    )  # fmt: skip
    theirs = functional.dequantize_blockwise(torch.from_numpy(packed.codes), state)
    assert np.array_equal(decode(packed, signed=signed), theirs.numpy())
    other = np.flatnonzero(table != make_tables(signed=signed).code)
    assert other.tolist() == ([] if signed else [0])
    assert table[0] == table[int(not signed)]


@pytest.mark.parametrize("signed", SIGNED)
def test_the_cpu_kernel_of_bitsandbytes_is_the_coarser_one(signed):
    """Why it is not the oracle: a grid of 2/65535 moves codes near zero, and zero itself."""
    flat, code = ordinary(values(signed=signed)), functional.create_dynamic_map(signed=signed)
    theirs, _ = torch.ops.bitsandbytes.quantize_blockwise(torch.from_numpy(flat), code, BLOCK)
    ours = encode(flat, signed=signed)
    scaled = flat / np.repeat(ours.absmax, BLOCK)
    gap = np.abs(code.numpy()[theirs.numpy()] - scaled) - np.abs(code.numpy()[ours.codes] - scaled)
    assert (theirs.numpy() != ours.codes).mean() > 0.3
    assert -1e-7 <= gap.min() <= gap.max() <= 2 / 65535


@pytest.mark.parametrize("signed", SIGNED)
@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_kernels_of_both_backends_are_the_codec_bit_for_bit(signed, backend):
    flat = values(signed=signed)
    wanted = encode(flat, signed=signed)
    if backend == "mlx":
        pair = mlxlora.blockwise.encode(mx.array(flat), signed=signed)
        decoded = np.array(mlxlora.blockwise.decode(*pair, signed=signed))
        codes, absmax = map(np.array, pair)
    else:
        pair = torch_backend.blockwise.encode(torch.from_numpy(flat), signed=signed)
        decoded = torch_backend.blockwise.decode(*pair, signed=signed).numpy()
        codes, absmax = (tensor.numpy() for tensor in pair)
    assert np.array_equal(codes, wanted.codes)
    assert np.array_equal(absmax, wanted.absmax)
    assert np.array_equal(decoded, decode(wanted, signed=signed))


@pytest.mark.parametrize("signed", SIGNED)
def test_two_look_ups_find_what_a_search_finds_for_every_16_bits(signed):
    """All 65,536 upper halves of a float32, with the lowest, the highest and three other lower halves."""
    upper = np.arange(2**16, dtype=np.uint32) << np.uint32(16)
    tables = make_tables(signed=signed)
    for lower in (0, 1, 0x7FFF, 0x8000, 0xFFFF):
        scaled = (upper | np.uint32(lower)).view(np.float32)
        scaled = np.where(np.abs(scaled) <= 1.0000002, scaled, np.float32(0))
        starts = tables.starts[scaled.view(np.uint32) >> np.uint32(16)]
        found = starts + (scaled > tables.midpoints[starts])
        assert np.array_equal(found, np.searchsorted(tables.midpoints, scaled, side="left"))


@pytest.mark.parametrize("signed", SIGNED)
def test_no_value_moves_by_more_than_half_the_gap_between_codes(signed):
    flat = values(signed=signed)
    packed = encode(flat, signed=signed)
    scaled = np.divide(decode(packed, signed=signed) - flat, np.repeat(packed.absmax, BLOCK) + TINY)
    widest = np.diff(make_tables(signed=signed).code).max()
    assert np.abs(scaled[2 * BLOCK :]).max() <= widest / 2 + 1e-6 + (0.0071 if signed else 0)  # -1 is no code


@pytest.mark.cuda
@pytest.mark.parametrize("signed", SIGNED)
def test_cuda_kernels_differ_at_midpoints_only(signed):
    flat = ordinary(values(signed=signed))
    wanted = encode(flat, signed=signed)
    codes, absmax = torch_backend.blockwise.encode(torch.from_numpy(flat).cuda(), signed=signed)
    gap = np.abs(codes.cpu().numpy().astype(int) - wanted.codes)
    assert gap.max() <= 1
    assert (gap[3 * BLOCK :] > 0).mean() < 1e-3
    assert np.array_equal(absmax.cpu().numpy(), wanted.absmax)
