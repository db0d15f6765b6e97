"""How this backend decodes each storage format: one function per format, into a transient, the NumPy codec bit for bit.

Legend: O output width, I input width, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec

import torch

from shared.errors import CapabilityError
from shared.quant.microscaling import e2m1_table, e4m3_table, scale_table
from shared.types import Scheme, Stored
from torch_backend.state import TO_TORCH

Arrays = Mapping[str, torch.Tensor]  # under the names that the codec gives them
Decoder = Callable[[Arrays, Stored], torch.Tensor]
PLAIN_DECODE = "triton is not installed: quantized weights are decoded by many small kernels (pip install triton)"


@cache
def has_triton() -> bool:
    """Return whether triton is installed: torch brings it on Linux, not everywhere else."""
    return find_spec("triton") is not None


def unpack(raw: torch.Tensor, bits: int) -> torch.Tensor:
    """Return codes (O, I) of a row's bytes (O, I*bits/8) uint8; the codes are one little-endian bit stream."""
    if bits == 8:
        return raw
    rows = raw.shape[0]
    if bits in (2, 4):
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=raw.device)
        return ((raw[..., None] >> shifts) & (2**bits - 1)).reshape(rows, -1)
    num_bytes, num_codes = {3: (3, 8), 5: (5, 8), 6: (3, 4)}[bits]
    wide = torch.int64 if bits == 5 else torch.int32
    groups = raw.reshape(rows, -1, num_bytes).to(wide)
    word = groups[..., 0]
    for n in range(1, num_bytes):
        word = word | (groups[..., n] << (8 * n))
    shifts = torch.arange(num_codes, dtype=wide, device=raw.device) * bits
    return ((word[..., None] >> shifts) & (2**bits - 1)).reshape(rows, -1)


def decode_affine(arrays: Arrays, stored: Stored) -> torch.Tensor:
    """Return the weight (O, I) of words (O, I*bits/32), scales and biases (O, G); product and sum are each rounded."""
    scheme, scales, biases = stored.scheme, arrays["scales"], arrays["biases"]
    raw = arrays["weight"].view(torch.uint8)  # torch has no arithmetic on uint32
    if raw.device.type == "cuda" and has_triton():
        from torch_backend import kernels

        return kernels.decode_affine(raw.view(torch.int32), scales, biases, scheme)
    codes = unpack(raw, scheme.bits).to(scales.dtype)
    grouped = codes.view(codes.shape[0], -1, scheme.group_size)
    return grouped.mul_(scales[..., None]).add_(biases[..., None]).view(codes.shape[0], -1)


def decode_microscaling(arrays: Arrays, stored: Stored) -> torch.Tensor:
    """Return the weight (O, I) of words (O, I*bits/32) and scale bytes (O, G); bfloat16 holds every value."""
    scheme, raw, scales = stored.scheme, arrays["weight"].view(torch.uint8), arrays["scales"]
    tables = load_tables(scheme, dtype=TO_TORCH[stored.dtype], device=raw.device)
    values = tables.elements.index_select(0, unpack(raw, scheme.bits).int().view(-1))
    steps = tables.scales.index_select(0, scales.int().view(-1))
    return values.view(-1, scheme.group_size).mul_(steps[:, None]).view(len(raw), -1)


@dataclass(frozen=True)
class Tables:
    """What the codes and the scale bytes of a format stand for, on one device."""

    elements: torch.Tensor  # (16,) or (256,)
    scales: torch.Tensor  # (256,)


@lru_cache(maxsize=8)
def load_tables(scheme: Scheme, *, dtype: torch.dtype, device: torch.device) -> Tables:
    """Return the tables of a format, copied to a device once."""
    elements = e2m1_table() if scheme.bits == 4 else e4m3_table()
    made = (torch.tensor(table, dtype=dtype, device=device) for table in (elements, scale_table(scheme.group_size)))
    return Tables(*made)


def decode_bitnet(arrays: Arrays, stored: Stored) -> torch.Tensor:
    """Return the weight (O, I) of bytes (O/4, I), four rows of codes in each, and one scale."""
    dtype = TO_TORCH[stored.dtype]
    trits = unpack_rows(arrays["weight"], bits=2).float().sub_(1)
    scale = arrays["weight_scale"].float()
    return (trits.div_(scale) if stored.scheme.name == "bitnet-inverse" else trits.mul_(scale)).to(dtype)


def decode_quanto_rows(arrays: Arrays, stored: Stored) -> torch.Tensor:
    """Return the weight (O, I) of int8 codes or E4M3 bytes (O, I), and scales (O, 1)."""
    codes, scales = arrays["weight"], arrays["scales"]
    values = codes.view(torch.float8_e4m3fn) if stored.scheme.name == "quanto-qfloat8" else codes
    return values.to(scales.dtype).mul_(scales)


def decode_quanto_groups(arrays: Arrays, stored: Stored) -> torch.Tensor:
    """Return the weight (O, I) of bytes over groups (G, I/G), scales and shifts (G, 1)."""
    scales = arrays["scales"]
    codes = unpack_rows(arrays["weight"], bits=stored.scheme.bits)[: len(scales)]
    return codes.to(scales.dtype).mul_(scales).sub_(arrays["shifts"]).view(stored.shape)


def unpack_rows(raw: torch.Tensor, *, bits: int) -> torch.Tensor:
    """Return codes (R * 8/bits, I) of bytes (R, I): byte (r, i) holds rows r, r + R, ..., lowest bits first."""
    return torch.cat([(raw >> bits * place) & (2**bits - 1) for place in range(8 // bits)])


DECODERS: dict[str, Decoder] = {
    "affine": decode_affine,
    "ternary": decode_affine,
    **dict.fromkeys(("mxfp4", "nvfp4", "mxfp8"), decode_microscaling),
    **dict.fromkeys(("bitnet", "bitnet-inverse"), decode_bitnet),
    **dict.fromkeys(("quanto-qint2", "quanto-qint4"), decode_quanto_groups),
    **dict.fromkeys(("quanto-qint8", "quanto-qfloat8"), decode_quanto_rows),
}


def find_decoder(scheme: Scheme) -> Decoder:
    """Return the decoder of a scheme; raises CapabilityError where this backend has none."""
    if scheme.name not in DECODERS:
        raise CapabilityError(
            f'a base quantized to "{scheme}" does not run on the torch backend: it has no decoder for "{scheme.name}"',
            expected=", ".join(DECODERS), fix="the mlx backend, or another quantization",
        )  # fmt: skip
    return DECODERS[scheme.name]
