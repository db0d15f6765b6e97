"""How this backend decodes each storage format: one function per format, into a transient, the NumPy codec bit for bit.

Legend: O output width, I input width, G groups.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec

import numpy as np
import torch

from shared.errors import CapabilityError
from shared.quant.blockwise import BLOCK
from shared.quant.four_bit import FourBitQuantizer, pair_table
from shared.quant.microscaling import e2m1_table, e4m3_table, scale_table
from shared.quant.row_int8 import STEP
from shared.types import Packed, Scheme, Stored, Tensor
from torch_backend.state import TO_TORCH, from_torch

Arrays = Mapping[str, torch.Tensor]  # under the names that the codec gives them
Decoder = Callable[[Arrays, Stored], torch.Tensor]
BLOCK_SIZE = 2**20  # weights decoded at once: the codes of a whole head would take half as much memory again
WORDS = {
    2: (1, 4, torch.int32), 3: (3, 8, torch.int64), 4: (1, 2, torch.int16), 5: (5, 8, torch.int64),
    6: (6, 8, torch.int64),
}  # bits: bytes that make up a word, codes in them, what they are spread over  # fmt: skip
PLAIN_DECODE = "triton is not installed: quantized weights are decoded by many small kernels (pip install triton)"


@cache
def has_triton() -> bool:
    """Return whether triton is installed: torch brings it on Linux, not everywhere else."""
    return find_spec("triton") is not None


def unpack(raw: torch.Tensor, bits: int) -> torch.Tensor:
    """Return codes (O, I) of a row's bytes (O, I*bits/8) uint8; the codes are one little-endian bit stream.

    A word's codes are moved apart by halves until each has a byte of its own: whole arrays of words at a time.
    """
    if bits == 8:
        return raw
    num_bytes, num_codes, dtype = WORDS[bits]
    words = raw.to(dtype) if num_bytes == 1 else widen(raw, num_bytes).view(dtype)
    while num_codes > 1:
        num_codes //= 2
        low = sum((2 ** (bits * num_codes) - 1) << at for at in range(0, 8 * dtype.itemsize, 16 * num_codes))
        upper = (words << ((8 - bits) * num_codes)).bitwise_and_(low << (8 * num_codes))
        words = upper.bitwise_or_(words & low)
    return words.view(torch.uint8)


def widen(raw: torch.Tensor, num_bytes: int) -> torch.Tensor:
    """Return rows (O, I) with every `num_bytes` bytes filled up to 8."""
    groups = raw.view(len(raw), -1, num_bytes)
    wide = torch.zeros(*groups.shape[:2], 8, dtype=torch.uint8, device=raw.device)
    wide[..., :num_bytes] = groups
    return wide.view(len(raw), -1)


def decode_affine(arrays: Arrays, stored: Stored) -> torch.Tensor:
    """Return the weight (O, I) of words (O, I*bits/32), scales and biases (O, G); product and sum are each rounded."""
    scheme, scales, biases = stored.scheme, arrays["scales"], arrays["biases"]
    raw = arrays["weight"].view(torch.uint8)  # torch has no arithmetic on uint32
    if raw.device.type == "cuda" and has_triton():
        from torch_backend import kernels

        return kernels.decode_affine(raw.view(torch.int32), scales, biases, scheme)
    whole = scales.new_empty(len(raw), scales.shape[1] * scheme.group_size)
    rows = max(BLOCK_SIZE // whole.shape[1], 1)
    parts = (part.split(rows) for part in (whole, raw, scales, biases))
    for out, bytes_OI, scales_OG, biases_OG in zip(*parts, strict=True):
        spread(out, bytes_OI, scales_OG, biases_OG, scheme)
    return whole


def spread(out: torch.Tensor, raw: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor, scheme: Scheme) -> None:
    """Write the weight into `out`: a product, then a sum, each rounded in the scales' dtype."""
    out.copy_(unpack(raw, scheme.bits))
    out.view(len(out), -1, scheme.group_size).mul_(scales[..., None]).add_(biases[..., None])


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


def decode_four_bit(arrays: Arrays, stored: Stored) -> torch.Tensor:
    """Return the weight (O, I) of nf4 or fp4 bytes: code * absmax in float32, then rounded."""
    name, block, raw = stored.scheme.name, stored.scheme.group_size, arrays["weight"]
    size, absmax, dtype = stored.shape[0] * stored.shape[1], expand_absmax(arrays, stored), TO_TORCH[stored.dtype]
    if has_bitsandbytes(raw.device.type, name, stored.dtype) and stored.shape[1] % block == 0:
        return torch.ops.bitsandbytes.dequantize_4bit(raw, absmax, block, name, stored.shape, dtype)
    values = load_pairs(name, raw.device).index_select(0, raw.view(-1).int()).view(torch.float32)[:size]
    if size % block:
        values.mul_(absmax.repeat_interleave(block)[:size])
    else:
        values.view(-1, block).mul_(absmax[:, None])
    return values.view(stored.shape).to(dtype)


def expand_absmax(arrays: Arrays, stored: Stored) -> torch.Tensor:
    """Return the float32 absmax of every block, decoded where it is quantized too."""
    if not stored.scheme.double:
        return arrays["absmax"]
    values = arrays["nested_quant_map"].index_select(0, arrays["absmax"].int())
    return values.mul_(arrays["nested_absmax"].repeat_interleave(BLOCK)[: len(values)]).add_(arrays["nested_offset"])


@cache
def load_pairs(name: str, device: torch.device) -> torch.Tensor:
    """Return (256,) int64: the two float32 values of every byte, so that one look-up gives both."""
    return torch.tensor(pair_table(name).view(np.int64).reshape(-1), device=device)


@cache
def has_bitsandbytes(device: str, name: str, dtype: str) -> bool:
    """Return whether bitsandbytes is there and its kernel decodes all bytes as the NumPy codec does, on this device.

    Only for rows of whole blocks: in others its fp4 kernel on a CPU gives a zero the sign of its code.
    """
    if find_spec("bitsandbytes") is None:
        return False
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on some CPUs it asks for kernels that nobody calls here
    import bitsandbytes  # noqa: F401  registers torch.ops.bitsandbytes

    scheme, shape = Scheme(name, 4, 64), (8, 64)
    scales = np.linspace(1e-3, 3, 8, dtype=np.float32)
    raw = np.arange(256, dtype=np.uint8)[:, None]
    packed = Packed(scheme, {"weight": Tensor("U8", raw), "absmax": Tensor("F32", scales)}, shape, dtype)
    try:
        found = torch.ops.bitsandbytes.dequantize_4bit(
            torch.from_numpy(raw).to(device), torch.from_numpy(scales).to(device), 64, name, shape, TO_TORCH[dtype]
        )
    except (RuntimeError, NotImplementedError):
        return False
    wanted = FourBitQuantizer(scheme).dequantize(packed).data
    return from_torch(found).data.tobytes() == wanted.tobytes()


def decode_int8(arrays: Arrays, stored: Stored) -> torch.Tensor:
    """Return the float32 weight (O, I): code * absmax of the row, then / 127, each rounded."""
    return arrays["weight"].to(torch.float32).mul_(arrays["SCB"][:, None]).mul_(float(STEP))


DECODERS: dict[str, Decoder] = {
    "affine": decode_affine,
    "ternary": decode_affine,
    **dict.fromkeys(("mxfp4", "nvfp4", "mxfp8"), decode_microscaling),
    **dict.fromkeys(("bitnet", "bitnet-inverse"), decode_bitnet),
    **dict.fromkeys(("quanto-qint2", "quanto-qint4"), decode_quanto_groups),
    **dict.fromkeys(("quanto-qint8", "quanto-qfloat8"), decode_quanto_rows),
    "nf4": decode_four_bit,
    "fp4": decode_four_bit,
    "int8": decode_int8,
}


def find_decoder(scheme: Scheme) -> Decoder:
    """Return the decoder of a scheme; raises CapabilityError where this backend has none."""
    if scheme.name not in DECODERS:
        raise CapabilityError(
            f'a base quantized to "{scheme}" does not run on the torch backend: it has no decoder for "{scheme.name}"',
            expected=", ".join(DECODERS), fix="the mlx backend, or another quantization",
        )  # fmt: skip
    return DECODERS[scheme.name]
