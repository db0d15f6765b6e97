"""Rotary positions by tables, against the zoo's own layers and their gradients."""

from __future__ import annotations

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx_lm.models.rope_utils import initialize_rope

from mlxlora.rotary import rotate, turned_width

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {
    "rope_type": "longrope", "original_max_position_embeddings": 64, "short_factor": [1.0] * 8,
    "long_factor": [1.0 + k for k in range(8)],
}  # fmt: skip
SCALINGS = [None, {"rope_type": "linear", "factor": 2.0}, LLAMA3, YARN, LONG]


def layer_of(rope):
    return SimpleNamespace(rope=rope, turned_width=turned_width(rope))


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling["rope_type"] if scaling else "plain")
def test_output_and_gradient_are_the_zoos(scaling):
    rope = initialize_rope(16, 10_000.0, False, scaling, max_position_embeddings=256)
    layer = layer_of(rope)
    assert layer.turned_width == 16
    x, dy = (mx.random.normal((2, 3, 100, 16), key=mx.random.key(seed)) for seed in (0, 1))
    (wanted,), (dx,) = mx.vjp(rope, [x], [dy])
    (found,), (ours,) = mx.vjp(lambda x: rotate(layer, x, x)[0], [x], [dy])
    np.testing.assert_allclose(np.array(found), np.array(wanted), rtol=0, atol=1e-6)
    np.testing.assert_allclose(np.array(ours), np.array(dx), rtol=0, atol=1e-6)


@pytest.mark.parametrize("rope", [nn.RoPE(16, traditional=True), lambda x: x], ids=["pairs side by side", "none"])
def test_another_layout_is_left_to_the_zoo(rope):
    layer, x = layer_of(rope), mx.random.normal((1, 2, 7, 16), key=mx.random.key(0))
    assert layer.turned_width == 0
    assert mx.array_equal(rotate(layer, x, x)[1], rope(x))


def test_a_head_wider_than_what_turns_is_left_to_the_zoo():
    layer, x = layer_of(nn.RoPE(8)), mx.random.normal((1, 2, 7, 16), key=mx.random.key(0))
    assert mx.array_equal(rotate(layer, x, x)[0], layer.rope(x))


def test_half_precision_is_left_to_the_zoo():
    layer, x = layer_of(nn.RoPE(16)), mx.random.normal((1, 2, 7, 16), key=mx.random.key(0)).astype(mx.bfloat16)
    assert mx.array_equal(rotate(layer, x, x)[0], layer.rope(x))
