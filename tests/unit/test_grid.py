"""Writing a weight again on its own grid: nothing moves where nothing is wanted, and else the nearest code is taken."""

from __future__ import annotations

import numpy as np
import pytest

from shared.quant.grid import GRIDS, Grid, has_grid, requantize, with_codes
from shared.registry import find_quantizer
from shared.schemes import named_schemes
from shared.tensors import from_float32, to_float32
from shared.types import Packed

SCHEMES = {name: scheme for name, scheme in named_schemes().items() if "+" not in name or name.endswith("g64+hqq")}


def packed_weight(name: str, dtype: str, *, shape: tuple[int, int] = (8, 128)) -> Packed:
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return find_quantizer(SCHEMES[name]).quantize(from_float32(values, dtype))


def decode(packed: Packed) -> np.ndarray:
    return to_float32(find_quantizer(packed.scheme).dequantize(packed))


@pytest.mark.parametrize("name", SCHEMES)
def test_decoded_values_give_back_every_byte(name):
    for dtype in ("F32", "F16", "BF16"):
        packed = packed_weight(name, dtype)
        again = requantize(decode(packed), like=packed)
        for key, array in packed.arrays.items():
            assert again.arrays[key].dtype == array.dtype
            assert np.array_equal(again.arrays[key].data, array.data), (dtype, key)


def every_code(packed: Packed, grid: Grid) -> list[int]:
    """Return the codes that a format may use."""
    if packed.scheme.name.startswith(("bitnet", "ternary")):
        return [0, 1, 2]
    if grid.codes(packed).dtype == np.int8:
        return list(range(-127, 128))
    every = range(2**packed.scheme.bits)
    return [
        code for code in every if packed.scheme.bits != 8 or code not in (127, 255) or "affine" in str(packed.scheme)
    ]


@pytest.mark.parametrize("name", SCHEMES)
def test_the_nearest_code_is_taken(name):
    """Against every code of the format, decoded; in float32 to rounding of the formula that proposes them."""
    packed = packed_weight(name, "F32")
    grid = GRIDS[packed.scheme.name]
    wanted = decode(packed) + np.random.default_rng(1).standard_normal(packed.shape).astype(np.float32) * 0.3
    codes, best = grid.codes(packed), np.full(packed.shape, np.inf, dtype=np.float32)
    for code in every_code(packed, grid):
        tried = with_codes(grid, np.full_like(codes, code), packed)
        best = np.minimum(best, np.abs(decode(tried) - wanted))
    found = np.abs(decode(requantize(wanted, like=packed)) - wanted)
    assert (found <= best + 1e-5).all()


def test_ternary_values_stay_ternary():
    packed = packed_weight("ternary-g64", "F16")
    moved = requantize(decode(packed) + np.float32(3), like=packed)
    assert set(np.unique(GRIDS["ternary"].codes(moved))) <= {0, 1, 2}


def test_every_scheme_has_a_grid():
    assert all(has_grid(scheme.name) for scheme in named_schemes().values())
