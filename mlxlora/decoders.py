"""How this backend decodes each storage format: one function per format, into a transient, the NumPy codec bit for bit.

Legend: O output width, I input width, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import mlx.core as mx
import numpy as np

from mlxlora import blockwise
from mlxlora.elementwise import on_gpu
from mlxlora.state import TO_MLX
from shared.errors import CapabilityError
from shared.quant.blockwise import BLOCK
from shared.quant.four_bit import pair_table
from shared.quant.row_int8 import STEP
from shared.types import Scheme, Stored

Arrays = Mapping[str, mx.array]  # under the names that the codec gives them
Decoder = Callable[[Arrays, Stored], mx.array]

BLOCK_SIZE = 2**20  # weights decoded at once on a CPU
WORDS = {
    2: (1, 4, mx.uint32), 3: (3, 8, mx.uint64), 4: (1, 2, mx.uint16), 5: (5, 8, mx.uint64), 6: (6, 8, mx.uint64),
}  # bits: bytes that make up a word, codes in them, what they are spread over  # fmt: skip


def unpack(words: mx.array, bits: int) -> mx.array:
    """Return codes (O, I) uint8 of a row's words (O, I*bits/32) uint32; the codes are one little-endian bit stream.

    A word's codes are moved apart by halves until each has a byte of its own: whole arrays of words at a time.
    """
    raw = words.view(mx.uint8)
    if bits == 8:
        return raw
    num_bytes, num_codes, dtype = WORDS[bits]
    wide = raw.astype(dtype) if num_bytes == 1 else widen(raw, num_bytes).view(dtype)
    while num_codes > 1:
        num_codes //= 2
        low = sum((2 ** (bits * num_codes) - 1) << at for at in range(0, 8 * dtype.size, 16 * num_codes))
        low, high = (mx.array(mask, dtype=dtype) for mask in (low, low << (8 * num_codes)))
        wide = ((wide << ((8 - bits) * num_codes)) & high) | (wide & low)
    return wide.view(mx.uint8)


def widen(raw: mx.array, num_bytes: int) -> mx.array:
    """Return rows (O, I) with every `num_bytes` bytes filled up to 8."""
    groups = mx.unflatten(raw, -1, (-1, num_bytes))
    return mx.flatten(mx.pad(groups, [*[(0, 0)] * raw.ndim, (0, 8 - num_bytes)]), -2)


def decode_affine(arrays: Arrays, stored: Stored) -> mx.array:
    """Return the weight (O, I) of words (O, I*bits/32), scales and biases (O, G).

    MLX's own kernel takes 2 to 8 times as long on a CPU (0.32).
    """
    scheme = stored.scheme
    weight, scales, biases = arrays["weight"], arrays["scales"], arrays["biases"]
    if on_gpu():
        return mx.dequantize(weight, scales, biases, group_size=scheme.group_size, bits=scheme.bits)
    rows = max(BLOCK_SIZE // (scales.shape[-1] * scheme.group_size), 1)
    if weight.ndim != 2 or len(weight) <= 2 * rows:
        return spread(weight, scales, biases, scheme)
    whole = mx.zeros((len(weight), scales.shape[1] * scheme.group_size), dtype=scales.dtype)
    for start in range(0, len(weight), rows):  # in place, so that one block has its codes in memory
        at = slice(start, start + rows)
        whole[at] = spread(weight[at], scales[at], biases[at], scheme)
        mx.eval(whole)
    return whole


def spread(weight: mx.array, scales: mx.array, biases: mx.array, scheme: Scheme) -> mx.array:
    """Return the weight: a product, then a sum, each rounded in the scales' dtype."""
    codes = unpack(weight, scheme.bits).astype(scales.dtype)
    grouped = mx.unflatten(codes, -1, (-1, scheme.group_size)) * scales[..., None]
    return (grouped + biases[..., None]).reshape(codes.shape)


def affine_product(arrays: Arrays, stored: Stored, x: mx.array, *, transpose: bool) -> mx.array:
    """Return x @ W.T or x @ W by MLX's kernel."""
    scheme = stored.scheme
    return mx.quantized_matmul(
        x, arrays["weight"], arrays["scales"], arrays["biases"], transpose=transpose,
        group_size=scheme.group_size, bits=scheme.bits,
    )  # fmt: skip


def microscaling_product(arrays: Arrays, stored: Stored, x: mx.array, *, transpose: bool) -> mx.array:
    """Return x @ W.T or x @ W by MLX's kernel."""
    scheme = stored.scheme
    return mx.quantized_matmul(
        x, arrays["weight"], arrays["scales"], None, transpose=transpose, group_size=scheme.group_size,
        bits=scheme.bits, mode=scheme.name,
    )  # fmt: skip


def decode_microscaling(arrays: Arrays, stored: Stored) -> mx.array:
    """Return the weight (O, I) of words (O, I*bits/32) and scale bytes (O, G); bfloat16 holds every value."""
    scheme, dtype = stored.scheme, TO_MLX[stored.dtype]
    return mx.dequantize(
        arrays["weight"], arrays["scales"], None, group_size=scheme.group_size, bits=scheme.bits,
        mode=scheme.name, dtype=dtype,
    )  # fmt: skip


def decode_bitnet(arrays: Arrays, stored: Stored) -> mx.array:
    """Return the weight (O, I) of bytes (O/4, I), four rows of codes in each, and one scale."""
    dtype = TO_MLX[stored.dtype]
    trits = unpack_rows(arrays["weight"], bits=2).astype(mx.float32) - 1
    scale = arrays["weight_scale"].astype(mx.float32)
    return (trits / scale if stored.scheme.name == "bitnet-inverse" else trits * scale).astype(dtype)


def decode_quanto_rows(arrays: Arrays, stored: Stored) -> mx.array:
    """Return the weight (O, I) of int8 codes or E4M3 bytes (O, I), and scales (O, 1)."""
    codes, scales = arrays["weight"], arrays["scales"]
    is_float = stored.scheme.name == "quanto-qfloat8"
    values = mx.from_fp8(codes, dtype=scales.dtype) if is_float else codes.astype(scales.dtype)
    return values * scales


def decode_quanto_groups(arrays: Arrays, stored: Stored) -> mx.array:
    """Return the weight (O, I) of bytes over groups (G, I/G), scales and shifts (G, 1)."""
    scales = arrays["scales"]
    codes = unpack_rows(arrays["weight"], bits=stored.scheme.bits)[: len(scales)]
    return (codes.astype(scales.dtype) * scales - arrays["shifts"]).reshape(stored.shape)


def unpack_rows(raw: mx.array, *, bits: int) -> mx.array:
    """Return codes (R * 8/bits, I) of bytes (R, I): byte (r, i) holds rows r, r + R, ..., lowest bits first."""
    return mx.concatenate([(raw >> bits * place) & (2**bits - 1) for place in range(8 // bits)])


def decode_four_bit(arrays: Arrays, stored: Stored) -> mx.array:
    """Return the weight (O, I) of nf4 or fp4 bytes: code * absmax in float32, then rounded."""
    size, block = stored.shape[0] * stored.shape[1], stored.scheme.group_size
    pairs = blockwise.look_up(load_pairs(stored.scheme.name), arrays["weight"].reshape(-1))
    values, absmax = pairs.view(mx.float32)[:size], expand_absmax(arrays, stored)
    if size % block:
        product = values * mx.repeat(absmax, block)[:size]
    else:
        product = values.reshape(-1, block) * absmax[:, None]
    return product.reshape(stored.shape).astype(TO_MLX[stored.dtype])


def expand_absmax(arrays: Arrays, stored: Stored) -> mx.array:
    """Return the float32 absmax of every block, decoded where it is quantized too."""
    if not stored.scheme.double:
        return arrays["absmax"]
    values = blockwise.look_up(arrays["nested_quant_map"], arrays["absmax"])
    return values * mx.repeat(arrays["nested_absmax"], BLOCK)[: values.size] + arrays["nested_offset"]


@cache
def load_pairs(name: str) -> mx.array:
    """Return (256,) uint64: the two float32 values of every byte, so that one look-up gives both."""
    return mx.array(pair_table(name).view(np.uint64).reshape(-1))


def decode_int8(arrays: Arrays, stored: Stored) -> mx.array:
    """Return the float32 weight (O, I): code * absmax of the row, then / 127, each rounded."""
    return arrays["weight"].astype(mx.float32) * arrays["SCB"][:, None] * float(STEP)


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
# MLX's own kernels, for a GPU with activations in the weight's dtype: x @ W.T or x @ W without a decoded W.
PRODUCTS: dict[str, Callable[..., mx.array]] = {
    "affine": affine_product,
    "ternary": affine_product,
    **dict.fromkeys(("mxfp4", "nvfp4", "mxfp8"), microscaling_product),
}


def find_decoder(scheme: Scheme) -> Decoder:
    """Return the decoder of a scheme; raises CapabilityError where this backend has none."""
    if scheme.name not in DECODERS:
        raise CapabilityError(
            f'a base quantized to "{scheme}" does not run on the mlx backend: it has no decoder for "{scheme.name}"',
            expected=", ".join(DECODERS), fix="the torch backend, or another quantization",
        )  # fmt: skip
    return DECODERS[scheme.name]
