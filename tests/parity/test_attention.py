"""Both backends' own attention against a float64 one: lengths around a block, shared heads, windows, soft-caps."""

from __future__ import annotations

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlxlora import attention as on_mlx
from tests import tolerances
from torch_backend import attention as on_torch

LENGTHS = [1, 2, 127, 128, 129, 300]
SCALE, K = 0.25, 16


def reference(q, k, v, *, window=None, softcap=None):
    """Return (B, H, T, K) in float64 for k and v of (B, heads, S, K), the queries being the last T of S."""
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
    groups, T, S = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    k, v = np.repeat(k, groups, axis=1), np.repeat(v, groups, axis=1)
    s = SCALE * q @ k.swapaxes(-1, -2)
    s = s if softcap is None else softcap * np.tanh(s / softcap)
    here, there = np.arange(S - T, S)[:, None], np.arange(S)
    s = np.where((there <= here) & (there > here - (window or S)), s, -np.inf)
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True) @ v


def gradients(q, k, v, do, **options):
    """Return the gradients of sum(do * attention) in float64, by torch's autograd over the plain formula."""
    q, k, v, do = (
        torch.tensor(np.asarray(x, dtype=np.float64), requires_grad=n < 3) for n, x in enumerate((q, k, v, do))
    )
    groups, T = q.shape[1] // k.shape[1], q.shape[2]
    s = SCALE * q @ k.repeat_interleave(groups, dim=1).mT
    s = s if options.get("softcap") is None else options["softcap"] * torch.tanh(s / options["softcap"])
    here, there = torch.arange(T)[:, None], torch.arange(T)
    seen = (there <= here) & (there > here - (options.get("window") or T))
    p = s.masked_fill(~seen, float("-inf")).softmax(-1)
    out = (do * (p @ v.repeat_interleave(groups, dim=1))).sum()
    return [grad.numpy() for grad in torch.autograd.grad(out, (q, k, v))]


def draw(T, *, heads, kv_heads, loud=1.0, B=2, seed=0):
    random = np.random.default_rng(seed)
    shapes = [(B, heads, T, K), (B, kv_heads, T, K), (B, kv_heads, T, K), (B, heads, T, K)]
    return [loud ** (n < 2) * random.standard_normal(shape).astype(np.float32) for n, shape in enumerate(shapes)]


def gap(found, wanted):
    """Return the largest difference relative to the largest element, or absolute where that is below 1."""
    return np.abs(found - wanted).max() / max(np.abs(wanted).max(), 1.0)


def run_mlx(attend, q, k, v, do, dtype=mx.float32):
    q, k, v, do = (mx.array(x).astype(dtype) for x in (q, k, v, do))
    out = attend(q, k, v)
    grads = mx.grad(lambda q, k, v: (attend(q, k, v) * do).sum(), argnums=(0, 1, 2))(q, k, v)
    assert {x.dtype for x in (out, *grads)} == {dtype}
    return [np.array(x.astype(mx.float32)) for x in (out, *grads)]


@pytest.fixture(autouse=True)
def on_a_cpu():
    mx.set_default_device(mx.Device(mx.DeviceType.cpu))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("loud", [1.0, 8.0])
def test_blockwise_attention_and_its_gradients_are_those_of_the_reference(length, heads, kv_heads, loud):
    drawn = draw(length, heads=heads, kv_heads=kv_heads, loud=loud)
    found = run_mlx(lambda q, k, v: on_mlx.causal(q, k, v, scale=SCALE), *drawn)
    for ours, exact in zip(found, [reference(*drawn[:3]), *gradients(*drawn)], strict=True):
        assert gap(ours, exact) <= tolerances.ATTENTION * loud**2  # as the scores grow


@pytest.mark.parametrize(("length", "window"), [(1, 1), (127, 5), (300, 130), (300, 300), (129, 1)])
def test_blockwise_attention_within_a_window_is_that_of_the_reference(length, window):
    drawn = draw(length, heads=4, kv_heads=2)
    found = run_mlx(lambda q, k, v: on_mlx.causal(q, k, v, scale=SCALE, window=window), *drawn)
    exact = [reference(*drawn[:3], window=window), *gradients(*drawn, window=window)]
    for ours, theirs in zip(found, exact, strict=True):
        assert gap(ours, theirs) <= tolerances.ATTENTION


@pytest.mark.parametrize("length", LENGTHS)
def test_blockwise_attention_is_as_exact_in_bfloat16_as_mlx_s_own(length):
    drawn = [np.array(mx.array(x).astype(mx.bfloat16).astype(mx.float32)) for x in draw(length, heads=4, kv_heads=2)]
    ours = run_mlx(lambda q, k, v: on_mlx.causal(q, k, v, scale=SCALE), *drawn, dtype=mx.bfloat16)
    theirs = run_mlx(
        lambda q, k, v: mx.fast.scaled_dot_product_attention(q, k, v, scale=SCALE, mask="causal"), *drawn,
        dtype=mx.bfloat16,
    )  # fmt: skip
    for one, other, exact in zip(ours, theirs, [reference(*drawn[:3]), *gradients(*drawn)], strict=True):
        assert gap(one, exact) <= tolerances.ATTENTION_BF16
        assert not gap(one, exact) > max(1.5 * gap(other, exact), 4e-3)


def test_examples_share_a_call_where_filling_up_costs_less_than_one():
    segments = on_mlx.Segments([180, 170, 90, 80, 80, 150])
    assert [group.size for group in segments.groups_for(4)] == [350, 250, 150]
    assert [group.count for group in segments.groups_for(10**6)] == [1, 1, 1, 2, 1]


@pytest.mark.parametrize("lengths", [[7], [4, 4, 4], [9, 7, 7, 1]])
def test_positions_that_are_spread_and_gathered_are_the_same_with_no_gradient_from_what_fills_up(lengths):
    group, x = on_mlx.Group(lengths), mx.arange(2.0 * sum(lengths)).reshape(1, -1, 2)
    assert mx.array_equal(group.gather(group.spread(x)), x)
    weight = mx.random.normal((1, group.count * group.longest, 2), key=mx.random.key(0))
    own = group.gather(weight)
    assert mx.array_equal(mx.grad(lambda x: (group.spread(x) * weight).sum())(x), own)
    back = mx.grad(lambda y: (group.gather(y) * own).sum())(weight)
    assert mx.array_equal(group.gather(back), own)
    assert float(mx.square(back).sum()) == pytest.approx(float(mx.square(own).sum()), rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"window": 7}, {"softcap": 0.7}, {"window": 5, "softcap": 0.7}], ids=str)
@pytest.mark.parametrize("lengths", [[33], [1], [5, 1, 20, 7], [1, 1]])
def test_torch_attention_of_packed_rows_is_that_of_each_alone(options, lengths):
    q, k, v, do = draw(sum(lengths), heads=4, kv_heads=2, B=1)
    leaves = [torch.tensor(x, requires_grad=True) for x in (q, k, v)]
    out, _ = on_torch.attend(
        SimpleNamespace(), *leaves, None, scaling=SCALE, segments=lengths, sliding_window=options.get("window"),
        softcap=options.get("softcap"),
    )  # fmt: skip
    found = [x.numpy() for x in torch.autograd.grad((out.transpose(1, 2) * torch.tensor(do)).sum(), leaves)]
    start = 0
    for length in lengths:
        at = (slice(None), slice(None), slice(start, start + length))
        parts = [x[at] for x in (q, k, v, do)]
        assert gap(out.detach().numpy().swapaxes(1, 2)[at], reference(*parts[:3], **options)) <= tolerances.ATTENTION
        for ours, exact in zip(found, gradients(*parts, **options), strict=True):
            assert gap(ours[at], exact) <= tolerances.ATTENTION
        start += length


@pytest.mark.parametrize("options", [{}, {"window": 7}, {"softcap": 0.7}, {"window": 5, "softcap": 0.7}], ids=str)
@pytest.mark.parametrize("new", [1, 4])
def test_torch_attention_over_cached_keys_is_that_of_the_last_rows(options, new):
    q, k, v, _ = draw(30, heads=4, kv_heads=2)
    out, _ = on_torch.attend(
        SimpleNamespace(), torch.tensor(q[:, :, -new:]), torch.tensor(k), torch.tensor(v), None, scaling=SCALE,
        sliding_window=options.get("window"), softcap=options.get("softcap"),
    )  # fmt: skip
    wanted = reference(q, k, v, **options)[:, :, -new:]
    assert gap(out.numpy().swapaxes(1, 2), wanted) <= tolerances.ATTENTION


def test_attention_that_is_not_ours_to_compute_is_refused():
    q, k, v, _ = (torch.tensor(x) for x in draw(3, heads=2, kv_heads=2))
    for wrong in ({"dropout": 0.1}, {"s_aux": torch.zeros(2)}):
        with pytest.raises(NotImplementedError, match="mask, dropout or sinks"):
            on_torch.attend(SimpleNamespace(), q, k, v, None, scaling=SCALE, **wrong)
