"""The unit between the projections of a decoder layer, silu(gate) * up: its product is made again in the backward pass.

The zoo keeps the sigmoid, the silu and the product of every layer beside gate and up. Here gate and up are kept,
nothing else.
"""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx

from mlxlora.elementwise import sigmoid


def gated(gate: mx.array, up: mx.array) -> mx.array:
    """Return silu(gate) * up."""
    return gate * sigmoid(gate) * up


def gated_gradients(gate: mx.array, up: mx.array, dy: mx.array, share: mx.array) -> tuple[mx.array, mx.array]:
    """Return the gradients of gate and up; share: sigmoid(gate)."""
    silu = gate * share
    return dy * up * (share + silu * (1 - share)), dy * silu


@mx.custom_function
def kept_gated(gate: mx.array, up: mx.array) -> mx.array:
    """Return silu(gate) * up where its reader does not make it again by itself."""
    return gated(gate, up)


@kept_gated.vjp
def kept_gradients(primals: list[mx.array], dy: mx.array, _output: mx.array) -> list[mx.array]:
    """Return the gradients of gate and up."""
    gate, up = primals
    return list(gated_gradients(gate, up, dy, sigmoid(gate)))


@lru_cache(maxsize=16)
def gating(mlp_class: type) -> type:
    """Return the class of a feed-forward layer of `shared.families.GATED` that computes its unit so."""

    class Gating(mlp_class):
        def __call__(self, x: mx.array) -> mx.array:
            gate, up = self.gate_proj(x), self.up_proj(x)
            if hasattr(self.down_proj, "after_gate"):
                return self.down_proj.after_gate(gate, up)
            return self.down_proj(kept_gated(gate, up))

    Gating.__name__ = Gating.__qualname__ = f"Gating{mlp_class.__name__}"
    return Gating
