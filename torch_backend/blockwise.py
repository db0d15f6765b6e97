"""Moments in 8 bits on the device: what shared/quant/blockwise.py specifies, for flat vectors of whole blocks."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import lru_cache

import torch

from shared.quant.blockwise import BLOCK, TINY, make_tables


@dataclass(frozen=True)
class Tables:
    """The tables of one map on one device."""

    code: torch.Tensor  # (256,) float32
    decoded: torch.Tensor  # (256,) float32
    midpoints: torch.Tensor  # (255,) float32
    starts: torch.Tensor  # (65536,) uint8, by a float32's upper 16 bits as a signed number, plus 32768


@lru_cache(maxsize=4)
def load_tables(*, signed: bool, device: torch.device) -> Tables:
    """Return the tables of the signed or the unsigned map, copied to a device once."""
    tables = make_tables(signed=signed)
    arrays = (tables.code, tables.decoded, tables.midpoints, tables.starts)
    code, decoded, midpoints, starts = (torch.tensor(array, device=device) for array in arrays)
    return Tables(code, decoded, midpoints, starts.roll(2**15))


def encode(values: torch.Tensor, *, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes (size,) uint8 and absmax (blocks,) float32 of a float32 vector of whole blocks."""
    tables = load_tables(signed=signed, device=values.device)
    if has_kernels(values.device):
        return torch.ops.bitsandbytes.quantize_blockwise(values, tables.code, BLOCK)
    rows = values.view(-1, BLOCK)
    absmax = rows.abs().amax(dim=1)
    used = absmax >= float(TINY)
    inverse = torch.where(used, absmax.reciprocal(), 0.0)
    scaled = (rows * inverse[:, None]).view(-1)
    upper = scaled.view(torch.int32).bitwise_right_shift(16).add_(2**15)
    codes = tables.starts.index_select(0, upper)
    codes += scaled > tables.midpoints.index_select(0, codes.int())
    return codes, torch.where(used, absmax, 0.0)


def decode(codes: torch.Tensor, absmax: torch.Tensor, *, signed: bool) -> torch.Tensor:
    """Return the float32 vector that codes and scales stand for."""
    tables = load_tables(signed=signed, device=codes.device)
    if has_kernels(codes.device):
        return torch.ops.bitsandbytes.dequantize_blockwise(codes, absmax, tables.decoded, BLOCK, torch.float32)
    values = tables.decoded.index_select(0, codes.int())
    values.view(-1, BLOCK).mul_(absmax[:, None])
    return values


@lru_cache(maxsize=4)
def has_kernels(device: torch.device) -> bool:
    """Return whether bitsandbytes is there with its CUDA kernels.

    Only its two codec kernels are used. Its fused 8-bit AdamW is another formula: the decay comes behind the step and
    shrinks it too, powers are approximate, and single non-finite elements are passed over where we skip the update.
    """
    if device.type != "cuda" or importlib.util.find_spec("bitsandbytes") is None:
        return False
    import bitsandbytes  # noqa: F401  registers torch.ops.bitsandbytes

    return True
