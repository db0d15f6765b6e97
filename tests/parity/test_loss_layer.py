"""The chunked head and loss of both backends against the float64 reference, over several chunks."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest

from shared import reference
from shared.families import HeadFacts
from tests import tolerances

V, D, N = 40_000, 16, 250  # 104 positions per chunk: three chunks, the last one partial
RANDOM = np.random.default_rng(0)
HIDDEN = RANDOM.standard_normal((N, D)).astype(np.float32)
WEIGHT = (0.3 * RANDOM.standard_normal((V, D))).astype(np.float32)
BIAS = RANDOM.standard_normal(V).astype(np.float32)
TARGETS = RANDOM.integers(0, V, N).astype(np.int32)
WEIGHTS = RANDOM.uniform(0.5, 2.0, N).astype(np.float32)
FACTS = [HeadFacts(), HeadFacts(softcap=5.0), HeadFacts(scale=0.25), HeadFacts(scale=2.0, softcap=10.0)]


def run_torch(facts, *, biased):
    import torch

    from torch_backend import objectives

    h, w = torch.tensor(HIDDEN, requires_grad=True), torch.tensor(WEIGHT, requires_grad=True)
    b = torch.tensor(BIAS, requires_grad=True) if biased else None
    head = objectives.Head(SimpleNamespace(weight=w, bias=b), facts)
    targets, weights = torch.tensor(TARGETS).long(), torch.tensor(WEIGHTS)
    assert objectives.chunk_rows(V, on_gpu=False) < N / 2
    loss = objectives.sft(h, head, targets, weights)
    grads = torch.autograd.grad(loss, [h, w, *([b] if biased else [])])
    with torch.no_grad():
        logp = objectives.log_probs(h, head, targets).numpy()
    return float(loss.detach()), [grad.numpy() for grad in grads], logp


def run_mlx(facts, *, biased):
    import mlx.core as mx
    from mlx import nn

    from mlxlora import objectives

    assert objectives.chunk_rows(V) < N / 2
    targets, weights = mx.array(TARGETS), mx.array(WEIGHTS)

    def head_of(w, b):
        module = nn.Linear(1, 1, bias=False)
        module.weight = w
        if b is not None:
            module.bias = b
        return objectives.Head(module, facts)

    def loss(h, w, b):
        return objectives.sft(h, head_of(w, b), targets, weights, train_head=True)

    arrays = [mx.array(HIDDEN), mx.array(WEIGHT), mx.array(BIAS) if biased else None]
    if biased:
        value, grads = mx.value_and_grad(loss, argnums=(0, 1, 2))(*arrays)
    else:
        value, grads = mx.value_and_grad(lambda h, w: loss(h, w, None), argnums=(0, 1))(*arrays[:2])
    logp = objectives.log_probs(arrays[0], head_of(arrays[1], arrays[2]), targets)
    return float(value), [np.array(grad) for grad in grads], np.array(logp)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks at a size that a float64 reference can follow."""
    from mlxlora import objectives as on_mlx
    from torch_backend import objectives as on_torch

    for module in (on_mlx, on_torch):
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", 2**22)


@pytest.mark.parametrize("run", [run_mlx, run_torch], ids=["mlx", "torch"])
@pytest.mark.parametrize(("facts", "biased"), list(product(FACTS, [False, True])), ids=str)
def test_loss_and_gradients_over_several_chunks_are_those_of_the_reference(run, facts, biased):
    loss, grads, logp = run(facts, biased=biased)
    bias = BIAS if biased else None
    wanted = reference.sft_loss(HIDDEN, WEIGHT, bias, TARGETS, WEIGHTS, facts)
    assert loss == pytest.approx(wanted.loss, rel=tolerances.LOSS_LAYER)
    for found, exact in zip(grads, [wanted.hidden, wanted.weight, *([wanted.bias] if biased else [])], strict=True):
        assert np.abs(found - exact).max() <= 1e-5 * np.abs(exact).max()
    alone = [
        reference.sft_loss(HIDDEN[n : n + 1], WEIGHT, bias, TARGETS[n : n + 1], np.ones(1), facts).loss
        for n in (0, 120, 249)
    ]
    np.testing.assert_allclose(-logp[[0, 120, 249]], alone, rtol=1e-5, atol=1e-6)
    assert -(logp * WEIGHTS).sum() == pytest.approx(wanted.loss, rel=1e-5)
