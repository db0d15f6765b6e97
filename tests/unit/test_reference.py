"""The oracle is checked by finite differences, by closed forms and by torch in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shared.families import HeadFacts
from shared.objectives.sft import sft
from shared.reference import adamw, clip, lora, lora_backward, sft_loss

FACTS = [HeadFacts(), HeadFacts(scale=0.0625), HeadFacts(softcap=3.0), HeadFacts(scale=2.0, softcap=1.5)]
N, D, V, R, O = 5, 4, 7, 3, 6  # noqa: E741


@pytest.fixture
def random():
    return np.random.default_rng(0)


def slope(function, value, *, step=1e-6):
    """Return d function / d value by central differences."""
    grad = np.zeros_like(value)
    for place in np.ndindex(value.shape):
        moved = [value.copy(), value.copy()]
        moved[0][place] += step
        moved[1][place] -= step
        grad[place] = (function(moved[0]) - function(moved[1])) / (2 * step)
    return grad


def close(one, other):
    assert np.abs(one - other).max() <= 1e-8 * max(1.0, np.abs(other).max())


@pytest.mark.parametrize("facts", FACTS)
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_gradients_of_the_loss_are_its_finite_differences(random, facts, with_bias):
    h_ND, w_VD = random.standard_normal((N, D)), random.standard_normal((V, D))
    bias = random.standard_normal(V) if with_bias else None
    targets, weights = random.integers(0, V, N), random.random(N) * 3
    found = sft_loss(h_ND, w_VD, bias, targets, weights, facts)
    close(found.hidden, slope(lambda h: sft_loss(h, w_VD, bias, targets, weights, facts).loss, h_ND))
    close(found.weight, slope(lambda w: sft_loss(h_ND, w, bias, targets, weights, facts).loss, w_VD))
    if with_bias:
        close(found.bias, slope(lambda b: sft_loss(h_ND, w_VD, b, targets, weights, facts).loss, bias))
    else:
        assert found.bias is None


@pytest.mark.parametrize("facts", FACTS)
def test_the_loss_is_torch_s_cross_entropy_in_float64(random, facts):
    h_ND, w_VD, bias = random.standard_normal((N, D)), random.standard_normal((V, D)), random.standard_normal(V)
    targets, weights = random.integers(0, V, N), random.random(N)
    logits = torch.from_numpy((h_ND @ w_VD.T + bias) * facts.scale)
    logits = logits if facts.softcap is None else facts.softcap * torch.tanh(logits / facts.softcap)
    each = torch.nn.functional.cross_entropy(logits, torch.from_numpy(targets), reduction="none").numpy()
    assert sft_loss(h_ND, w_VD, bias, targets, weights, facts).loss == pytest.approx((each * weights).sum(), rel=1e-12)


def test_the_loss_is_the_shared_objective_of_its_log_probabilities(random):
    h_ND, w_VD, targets = random.standard_normal((N, D)), random.standard_normal((V, D)), random.integers(0, V, N)
    logits = h_ND @ w_VD.T
    logp = logits[np.arange(N), targets] - np.log(np.exp(logits).sum(axis=1))
    assert sft_loss(h_ND, w_VD, None, targets, np.ones(N), HeadFacts()).loss == pytest.approx(
        float(sft(logp, np.ones(N))), rel=1e-12
    )


def test_large_logits_do_not_overflow():
    found = sft_loss(np.array([[1e4]]), np.array([[1.0], [-1.0]]), None, np.array([0]), np.ones(1), HeadFacts())
    assert found.loss == 0.0
    assert np.isfinite(found.weight).all()


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_the_gradients_of_lora_are_its_finite_differences(random, p):
    x, W, bias = random.standard_normal((N, D)), random.standard_normal((O, D)), random.standard_normal(O)
    A, B, dy = random.standard_normal((R, D)), random.standard_normal((O, R)), random.standard_normal((N, O))
    mask = random.random((N, D)) >= p if p else None
    found = lora_backward(dy, x, W, A, B, 1.7, mask, p)
    close(found.x, slope(lambda value: (dy * lora(value, W, bias, A, B, 1.7, mask, p)).sum(), x))
    close(found.A, slope(lambda value: (dy * lora(x, W, bias, value, B, 1.7, mask, p)).sum(), A))
    close(found.B, slope(lambda value: (dy * lora(x, W, bias, A, value, 1.7, mask, p)).sum(), B))


def test_a_fresh_adapter_changes_nothing(random):
    x, W, A = random.standard_normal((N, D)), random.standard_normal((O, D)), random.standard_normal((R, D))
    assert np.array_equal(lora(x, W, None, A, np.zeros((O, R)), 2.0), x @ W.T)


def test_dropout_keeps_the_mean(random):
    x, W, A, B = np.ones((1, 20_000)), np.zeros((1, 20_000)), np.ones((1, 20_000)), np.ones((1, 1))
    mask = random.random((1, 20_000)) >= 0.25
    assert lora(x, W, None, A, B, 1.0, mask, 0.25).item() == pytest.approx(20_000, rel=0.02)


@pytest.mark.parametrize("shape", [(3, 4), (5,)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_ten_updates_are_those_of_torch_adamw_in_float64(random, make_update, shape, weight_decay):
    """torch decays every tensor; ours only those of two or more dimensions."""
    value, m, v = random.standard_normal(shape), np.zeros(shape), np.zeros(shape)
    parameter = torch.nn.Parameter(torch.from_numpy(value.copy()))
    theirs = torch.optim.AdamW(
        [parameter], lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=weight_decay if len(shape) >= 2 else 0.0
    )
    for step in range(1, 11):
        grad = random.standard_normal(shape)
        parameter.grad = torch.from_numpy(grad.copy())
        theirs.step()
        update = make_update(step=step, lr=1e-2, beta1=0.9, beta2=0.99, weight_decay=weight_decay)
        found = adamw(value, grad, m, v, update)
        value, m, v = found.param, found.m, found.v
        np.testing.assert_allclose(value, parameter.detach().numpy(), rtol=1e-12, atol=1e-14)


def test_the_first_update_without_bias_correction_is_its_closed_form(make_update):
    update = make_update(lr=0.1, beta1=0.9, beta2=0.99, eps=0.0, weight_decay=0.5, bias_correction=False)
    found = adamw(np.ones((1, 1)), np.full((1, 1), 2.0), np.zeros((1, 1)), np.zeros((1, 1)), update)
    assert found.param.item() == pytest.approx(1 * (1 - 0.05) - 0.1 * 0.2 / np.sqrt(0.04), rel=1e-12)


def test_clipping_is_torch_s(random):
    grads = {"a": random.standard_normal((3, 4)), "b": random.standard_normal(5)}
    for max_norm in (0.5, 100.0):
        tensors = [torch.nn.Parameter(torch.zeros(grad.shape, dtype=torch.float64)) for grad in grads.values()]
        for tensor, grad in zip(tensors, grads.values(), strict=True):
            tensor.grad = torch.from_numpy(grad.copy())
        norm = torch.nn.utils.clip_grad_norm_(tensors, max_norm)
        clipped, found = clip(grads, max_norm)
        assert found == pytest.approx(float(norm), rel=1e-12)
        for tensor, name in zip(tensors, grads, strict=True):
            np.testing.assert_allclose(clipped[name], tensor.grad.numpy(), rtol=1e-12)


def test_no_bound_clips_nothing(random):
    grads = {"a": random.standard_normal((3, 4)) * 1e6}
    assert np.array_equal(clip(grads, None)[0]["a"], grads["a"])


def test_everything_is_float64_whatever_comes_in():
    one = np.ones((1, 1), dtype=np.float32)
    assert lora(one, one, None, one, one, 1.0).dtype == np.float64
    assert sft_loss(one, one, None, np.array([0]), np.ones(1, dtype=np.float32), HeadFacts()).weight.dtype == np.float64
