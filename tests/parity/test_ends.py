"""The head with an adapter, on both backends, against float64; more positions than one chunk on MLX."""

from __future__ import annotations

import numpy as np
import pytest

from shared.families import HeadFacts
from shared.reference import sft_loss
from shared.types import AdapterSpec
from tests import tolerances

N, D, V, R, SCALE = 40, 8, 2**16, 3, 2.0
FACTS = HeadFacts(scale=0.5, softcap=20.0)


def draw(*, biased):
    random = np.random.default_rng(0)
    shapes = {"h": (N, D), "W": (V, D), "A": (R, D), "B": (V, R), "m": (V,), "bias": (V,)}
    found = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    found |= {"m": 1 + 0.2 * np.abs(found["m"]), "W": 0.2 * found["W"], "B": 0.1 * found["B"]}
    targets, weights = random.integers(0, V, N).astype(np.int32), random.random(N).astype(np.float32)
    return found if biased else {**found, "bias": None}, targets, weights


def spec_of(kind):
    return AdapterSpec(kind, R, SCALE * R, 0.0, ("lm_head",))


def run_torch(kind, v, targets, weights):
    import torch

    from torch_backend.ends import attach_ends
    from torch_backend.objectives import Head, log_probs, sft

    root = torch.nn.Module()
    root.lm_head = torch.nn.Linear(D, V, bias=v["bias"] is not None)
    root.lm_head.weight = torch.nn.Parameter(torch.tensor(v["W"]), requires_grad=False)
    if v["bias"] is not None:
        root.lm_head.bias = torch.nn.Parameter(torch.tensor(v["bias"]), requires_grad=False)
    layer = attach_ends(root, spec_of(kind), {"lm_head": (V, D)})
    for leaf, key in zip(layer.trained_leaves, "ABm", strict=False):
        getattr(layer, leaf).data = torch.tensor(v[key])
    head, h = Head(layer, FACTS), torch.tensor(v["h"], requires_grad=True)
    loss = sft(h, head, torch.tensor(targets).long(), torch.tensor(weights))
    grads = torch.autograd.grad(3 * loss, [h, *(getattr(layer, leaf) for leaf in layer.trained_leaves)])
    logp = log_probs(h.detach(), head, torch.tensor(targets).long())
    return loss.item(), [grad.numpy() / 3 for grad in grads], logp.detach().numpy()


def run_mlx(kind, v, targets, weights):
    import mlx.core as mx
    from mlx import nn

    from mlxlora.ends import attach_ends
    from mlxlora.objectives import Head, log_probs, sft

    root = nn.Module()
    root.lm_head = nn.Linear(D, V, bias=False)
    root.lm_head.weight = mx.array(v["W"])
    if v["bias"] is not None:
        root.lm_head.bias = mx.array(v["bias"])
    layer = attach_ends(root, spec_of(kind), {"lm_head": (V, D)})
    head = Head(layer, FACTS)

    def loss(h, *trained):
        for leaf, value in zip(layer.trained_leaves, trained, strict=True):
            layer[leaf] = value
        return 3 * sft(h, head, mx.array(targets), mx.array(weights), train_head=False)

    values = [mx.array(v[key]) for key in ["h", *"ABm"[: len(layer.trained_leaves)]]]
    grads = mx.grad(loss, argnums=tuple(range(len(values))))(*values)
    found = loss(*values).item() / 3
    return found, [np.array(grad) / 3 for grad in grads], np.array(log_probs(values[0], head, mx.array(targets)))


@pytest.mark.parametrize("run", [run_mlx, run_torch], ids=["mlx", "torch"])
@pytest.mark.parametrize(("kind", "biased"), [("lora", True), ("dora", False)])
def test_loss_and_gradients_are_those_of_the_reference(run, kind, biased):
    v, targets, weights = draw(biased=biased)
    loss, grads, logp = run(kind, v, targets, weights)
    wide = {key: None if value is None else value.astype(np.float64) for key, value in v.items()}
    summed = wide["W"] + SCALE * wide["B"] @ wide["A"]
    norms = np.linalg.norm(summed, axis=1)
    gain = (wide["m"] / norms if kind == "dora" else np.ones(V))[:, None]
    exact = sft_loss(wide["h"], gain * summed, wide["bias"], targets, weights, FACTS)
    inner = gain * exact.weight
    wanted = [exact.hidden, SCALE * wide["B"].T @ inner, SCALE * inner @ wide["A"].T]
    wanted += [(exact.weight * summed).sum(axis=1) / norms] if kind == "dora" else []
    assert loss == pytest.approx(exact.loss, rel=tolerances.LOSS_LAYER)
    assert -(logp.astype(np.float64) * weights).sum() == pytest.approx(exact.loss, rel=tolerances.LOSS_LAYER)
    for found, value in zip(grads, wanted, strict=True):
        assert np.abs(found - value).max() <= tolerances.GRADIENTS * np.abs(value).max()
