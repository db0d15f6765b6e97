"""What is wrong with the values of a packed weight that a file brings: shapes are checked before, by its reader."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from shared.tensors import is_finite
from shared.types import Packed


def find_fault(packed: Packed) -> str | None:
    """Return what is wrong with a packed weight's arrays, None where every value decodes to a finite number."""
    if not all(is_finite(tensor) for tensor in packed.arrays.values()):
        return "holds scales that are NaN or infinity"
    check = CHECKS.get(packed.scheme.name)
    return check(packed) if check else None


def microscaling_fault(packed: Packed) -> str | None:
    """Return what is wrong with bytes that stand for no number: 255 as E8M0, 127 and 255 as E4M3."""
    scales, codes = packed.arrays["scales"].data, packed.arrays["weight"].data
    bad = scales == 255 if packed.scheme.group_size == 32 else is_nan(scales)
    if bad.any():
        return "holds scales that are NaN or infinity"
    if packed.scheme.bits == 8 and is_nan(np.ascontiguousarray(codes).view(np.uint8)).any():
        return "holds NaN"
    return None


def bitnet_fault(packed: Packed) -> str | None:
    """Return what is wrong with trits: two bits may hold 0, 1 and 2."""
    raw, scale = packed.arrays["weight"].data, packed.arrays["weight_scale"].data
    if (raw & (raw >> np.uint8(1)) & np.uint8(0b01010101)).any():
        return "holds codes other than 0, 1 and 2"
    if packed.scheme.name == "bitnet-inverse" and not scale.any():
        return "has a scale of 0, which divides"
    return None


def is_nan(raw: np.ndarray) -> np.ndarray:
    """Return where E4M3 bytes are NaN."""
    return (raw & np.uint8(0x7F)) == np.uint8(0x7F)


CHECKS: dict[str, Callable[[Packed], str | None]] = {
    **dict.fromkeys(("mxfp4", "nvfp4", "mxfp8"), microscaling_fault),
    **dict.fromkeys(("bitnet", "bitnet-inverse"), bitnet_fault),
}
