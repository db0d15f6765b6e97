"""How this backend decodes each storage format: one function per format, into a transient, the NumPy codec bit for bit.

Legend: O output width, I input width, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import mlx.core as mx

from shared.errors import CapabilityError
from shared.types import Scheme, Stored

Arrays = Mapping[str, mx.array]  # under the names that the codec gives them
Decoder = Callable[[Arrays, Stored], mx.array]


def decode_affine(arrays: Arrays, stored: Stored) -> mx.array:
    """Return the weight (O, I) of words (O, I*bits/32), scales and biases (O, G)."""
    scheme = stored.scheme
    weight, scales, biases = arrays["weight"], arrays["scales"], arrays["biases"]
    return mx.dequantize(weight, scales, biases, group_size=scheme.group_size, bits=scheme.bits)


def affine_product(arrays: Arrays, stored: Stored, x: mx.array, *, transpose: bool) -> mx.array:
    """Return x @ W.T or x @ W by MLX's kernel."""
    scheme = stored.scheme
    return mx.quantized_matmul(
        x, arrays["weight"], arrays["scales"], arrays["biases"], transpose=transpose,
        group_size=scheme.group_size, bits=scheme.bits,
    )  # fmt: skip


DECODERS: dict[str, Decoder] = {
    "affine": decode_affine,
}
# MLX's own kernels, for a GPU with activations in the weight's dtype: x @ W.T or x @ W without a decoded W.
PRODUCTS: dict[str, Callable[..., mx.array]] = {
    "affine": affine_product,
}


def find_decoder(scheme: Scheme) -> Decoder:
    """Return the decoder of a scheme; raises CapabilityError where this backend has none."""
    if scheme.name not in DECODERS:
        raise CapabilityError(
            f'a base quantized to "{scheme}" does not run on the mlx backend: it has no decoder for "{scheme.name}"',
            expected=", ".join(DECODERS), fix="the torch backend, or another quantization",
        )  # fmt: skip
    return DECODERS[scheme.name]
