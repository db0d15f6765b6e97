"""How this backend decodes each storage format: one function per format, into a transient, the NumPy codec bit for bit.

Legend: O output width, I input width, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec

import torch

from shared.errors import CapabilityError
from shared.types import Scheme, Stored

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


DECODERS: dict[str, Decoder] = {
    "affine": decode_affine,
}


def find_decoder(scheme: Scheme) -> Decoder:
    """Return the decoder of a scheme; raises CapabilityError where this backend has none."""
    if scheme.name not in DECODERS:
        raise CapabilityError(
            f'a base quantized to "{scheme}" does not run on the torch backend: it has no decoder for "{scheme.name}"',
            expected=", ".join(DECODERS), fix="the mlx backend, or another quantization",
        )  # fmt: skip
    return DECODERS[scheme.name]
