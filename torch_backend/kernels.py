"""Triton kernels for CUDA tensors: one launch decodes an affine-quantized weight, with no temporary beside the result.

Only for CUDA: MLX brings kernels of its own for its format, so that the MLX side needs no such file.
Legend: O output width, I input width, G groups. A unit is the shortest run of codes that fills whole words.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from shared.types import Scheme

WORD_BITS = 32
TILE = 4096  # codes that one program decodes: 32 a thread, in stores of 16 bytes


@triton.jit
def decode_affine_kernel(
    words,
    scales,
    biases,
    out,
    num_units,
    BITS: tl.constexpr,
    CODES: tl.constexpr,
    UNITS_PER_GROUP: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Write UNITS x CODES values: code * scale, then + bias, each rounded in the scales' dtype."""
    unit_U = tl.program_id(0).to(tl.int64) * UNITS + tl.arange(0, UNITS)
    inside_U = unit_U < num_units
    code_C = tl.arange(0, CODES)
    bit_C = code_C * BITS
    if CODES * BITS == 32:  # 2, 4 and 8 bits: a unit is one word
        word_U = tl.load(words + unit_U, mask=inside_U, other=0).to(tl.uint32, bitcast=True)
        code_UC = word_U[:, None] >> bit_C.to(tl.uint32)[None, :]
    else:  # 3, 5 and 6 bits: 32 codes in BITS words, and a code may begin in one word and end in the next
        at_UC = unit_U[:, None] * BITS + (bit_C // 32)[None, :]
        shift_C = bit_C % 32
        spills_UC = inside_U[:, None] & (shift_C + BITS > 32)[None, :]
        low_UC = tl.load(words + at_UC, mask=inside_U[:, None], other=0).to(tl.uint32, bitcast=True)
        high_UC = tl.load(words + at_UC + 1, mask=spills_UC, other=0).to(tl.uint32, bitcast=True)
        rest_C = (32 - shift_C) & 31  # a shift by 32 has no meaning; there the high word is 0
        code_UC = (low_UC >> shift_C.to(tl.uint32)[None, :]) | (high_UC << rest_C.to(tl.uint32)[None, :])
    code_UC = (code_UC & ((1 << BITS) - 1)).to(tl.float32)
    group_U = unit_U // UNITS_PER_GROUP
    scale_U = tl.load(scales + group_U, mask=inside_U, other=0).to(tl.float32)
    bias_U = tl.load(biases + group_U, mask=inside_U, other=0).to(tl.float32)
    product_UC = (code_UC * scale_U[:, None]).to(scales.dtype.element_ty).to(tl.float32)
    value_UC = (product_UC + bias_U[:, None]).to(out.dtype.element_ty)
    to_UC = out + unit_U[:, None] * CODES + code_C[None, :]
    tl.store(to_UC, value_UC, mask=inside_U[:, None])


def decode_affine(words: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Return the weight (O, I) in the scales' dtype of words (O, I*bits/32) int32, the NumPy codec's bit for bit.

    Product and sum are not contracted to one fused multiply-add: the product's cast forbids it for 16-bit scales, and
    `enable_fp_fusion=False` (no contraction in LLVM, --fmad=false in ptxas) for float32 ones.
    """
    out = torch.empty(scales.shape[0], scales.shape[1] * scheme.group_size, dtype=scales.dtype, device=scales.device)
    codes = WORD_BITS // scheme.bits if WORD_BITS % scheme.bits == 0 else WORD_BITS
    units, tile = out.numel() // codes, TILE // codes
    kernel: Any = decode_affine_kernel
    kernel[(triton.cdiv(units, tile),)](
        words.contiguous(),
        scales.contiguous(),
        biases.contiguous(),
        out,
        units,
        BITS=scheme.bits,
        CODES=codes,
        UNITS_PER_GROUP=scheme.group_size // codes,
        UNITS=tile,
        enable_fp_fusion=False,
    )
    return out
