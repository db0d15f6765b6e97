"""The loss over a frozen head where it is hard: huge and equal logits, saturated rows, bfloat16, quantized heads."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx import nn

from mlxlora import objectives as on_mlx
from mlxlora.quantized import QuantizedEmbedding as MLXTable
from mlxlora.quantized import QuantizedLinear as MLXLinear
from shared import reference
from shared.families import HeadFacts
from shared.registry import find_quantizer
from shared.schemes import parse_scheme
from shared.tensors import from_float32, to_float32
from shared.types import Tensor
from tests import tolerances
from torch_backend import objectives as on_torch
from torch_backend.quantized import QuantizedEmbedding as TorchTable
from torch_backend.quantized import QuantizedLinear as TorchLinear

V, D, N = 700, 32, 200
FACTS = [HeadFacts(), HeadFacts(softcap=5.0), HeadFacts(scale=0.25), HeadFacts(scale=2.0, softcap=30.0)]
BOTH = pytest.mark.parametrize("backend", ["mlx", "torch"])


def draw(*, loud=1.0, seed=0, vocabulary=V, rows=N, width=D):
    random = np.random.default_rng(seed)
    h = random.standard_normal((rows, width)).astype(np.float32)
    w = (0.3 * random.standard_normal((vocabulary, width))).astype(np.float32)
    targets = random.integers(0, vocabulary, rows).astype(np.int32)
    return SimpleNamespace(h=loud * h, w=w, targets=targets, weights=random.uniform(0.5, 2.0, rows).astype(np.float32))


def cut(monkeypatch):
    """Make tiles of 64 positions and 128 tokens: three whole ones and a part, five whole ones and a part."""
    for module in (on_mlx, on_torch):
        monkeypatch.setattr(module, "TILE_ROWS", 64)
        monkeypatch.setattr(module, "TILE_ELEMENTS", 64 * 128)


def run(backend, drawn, facts, *, module=None, dtype="float32", trained=False):
    """Return the loss and its gradient with respect to the hidden states, the head frozen or trained."""
    if backend == "torch":
        kind = getattr(torch, dtype)
        h = torch.tensor(drawn.h, dtype=kind, requires_grad=True)
        weight = torch.tensor(drawn.w, dtype=kind, requires_grad=trained)
        head = on_torch.Head(module or SimpleNamespace(weight=weight), facts)
        loss = on_torch.sft(h, head, torch.tensor(drawn.targets).long(), torch.tensor(drawn.weights))
        return float(loss.detach()), torch.autograd.grad(loss, h)[0].float().numpy()
    kind = getattr(mx, dtype)
    if module is None:
        module = nn.Linear(1, 1, bias=False)
        module.weight = mx.array(drawn.w).astype(kind)
    head, targets, weights = on_mlx.Head(module, facts), mx.array(drawn.targets), mx.array(drawn.weights)
    value, grad = mx.value_and_grad(lambda h: on_mlx.sft(h, head, targets, weights, train_head=trained))(
        mx.array(drawn.h).astype(kind)
    )
    return float(value), np.array(grad.astype(mx.float32))


def wanted(drawn, facts):
    return reference.sft_loss(drawn.h, drawn.w, None, drawn.targets, drawn.weights, facts)


def close(found, exact, *, loss=1e-6, grad=1e-5):
    assert abs(found[0] - exact.loss) <= loss * abs(exact.loss)
    assert np.abs(found[1] - exact.hidden).max() <= grad * np.abs(exact.hidden).max()


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles in both directions."""
    cut(monkeypatch)


@BOTH
@pytest.mark.parametrize("facts", FACTS, ids=str)
def test_several_tiles_give_what_one_gives(backend, facts, monkeypatch):
    drawn = draw()
    whole = run(backend, drawn, facts)
    cut(monkeypatch)
    parts = run(backend, drawn, facts)
    exact = wanted(drawn, facts)
    assert parts[0] == pytest.approx(whole[0], rel=1e-6)
    assert np.abs(parts[1] - whole[1]).max() <= 1e-6 * np.abs(exact.hidden).max()
    close(whole, exact)
    close(parts, exact)


@BOTH
@pytest.mark.parametrize("facts", FACTS, ids=str)
def test_a_head_with_a_bias_has_it_in_every_tile(backend, facts, small_tiles):
    drawn = draw()
    bias = np.linspace(-3, 3, V, dtype=np.float32)
    if backend == "torch":
        module = SimpleNamespace(weight=torch.tensor(drawn.w), bias=torch.tensor(bias))
    else:
        module = nn.Linear(1, 1)
        module.weight, module.bias = mx.array(drawn.w), mx.array(bias)
    exact = reference.sft_loss(drawn.h, drawn.w, bias, drawn.targets, drawn.weights, facts)
    close(run(backend, drawn, facts, module=module), exact)


@BOTH
@pytest.mark.parametrize("order", [1, -1])
def test_logits_that_rise_or_fall_from_tile_to_tile(backend, order, small_tiles):
    """The highest logit so far changes with every tile, or never again: earlier sums shrink to nothing, or later ones.

    Of 400 nats between one tile and the next, float16 and float32 hold no power.
    """
    drawn = draw()
    drawn.h[:, 0], drawn.w[:, 0] = 1.0, np.linspace(0, 2000, V)[::order]
    close(run(backend, drawn, HeadFacts()), wanted(drawn, HeadFacts()))


@BOTH
@pytest.mark.parametrize("facts", FACTS, ids=str)
def test_huge_logits_stay_finite_and_right(backend, facts, small_tiles):
    drawn = draw(loud=3e3)
    exact = wanted(drawn, facts)
    found = run(backend, drawn, facts)
    assert np.isfinite(found[1]).all()
    assert found[0] == pytest.approx(exact.loss, rel=1e-6)


@BOTH
def test_a_large_vocabulary_has_the_loss_of_float64(backend):
    """Added one after the other in float32, as by MLX on a CPU, 130,001 shares are 2e-4 short of one."""
    drawn = draw(loud=2.0, vocabulary=130_001, rows=8)
    exact, found = wanted(drawn, HeadFacts()), run(backend, drawn, HeadFacts())
    close(found, exact, loss=tolerances.LOSS_VOCABULARY, grad=2e-6)


@BOTH
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-3), ("float16", 1e-2)])
def test_equal_logits_of_ten_thousand_give_the_logarithm_of_their_number(backend, dtype, bound):
    """Of logits this size float32 keeps three decimals; the difference to the largest is exact all the same."""
    drawn = draw()
    drawn.h, drawn.w = np.full((N, D), 100.0, dtype=np.float32), np.full((V, D), 3.125, dtype=np.float32)
    loss, grad = run(backend, drawn, HeadFacts(), dtype=dtype)
    assert loss == pytest.approx(np.log(V) * drawn.weights.astype(np.float64).sum(), rel=1e-6)
    assert np.abs(grad).max() <= bound


@BOTH
@pytest.mark.parametrize("facts", FACTS[:3], ids=str)
def test_saturated_rows_cost_nothing_and_teach_nothing(backend, facts):
    """The target leads by far more than float32 resolves, or with a soft-cap as far as that lets it."""
    drawn = draw()
    drawn.h = 400 * drawn.w[drawn.targets] / np.square(drawn.w[drawn.targets]).sum(axis=1, keepdims=True)
    exact, found = wanted(drawn, facts), run(backend, drawn, facts)
    assert np.isfinite(found[1]).all()
    assert found[0] == pytest.approx(exact.loss, rel=1e-5, abs=1e-5)
    assert np.abs(found[1] - exact.hidden).max() <= 1e-5


def sure(lead, *, dtype):
    """Return rows whose targets come with probability 0.05 (lead 8) to 0.9999 (lead 20), held exactly by dtype."""
    drawn = draw()
    drawn.h += lead * drawn.w[drawn.targets] / np.square(drawn.w[drawn.targets]).sum(axis=1, keepdims=True)
    drawn.h, drawn.w = (torch.tensor(x).to(getattr(torch, dtype)).float().numpy() for x in (drawn.h, drawn.w))
    return drawn


@BOTH
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("facts", FACTS[:1] + FACTS[3:], ids=str)
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 4e-6), ("float16", 6e-3), ("bfloat16", 0.05)])
@pytest.mark.parametrize("lead", [8, 16, 20])
def test_a_target_that_is_nearly_certain_keeps_its_pull(backend, facts, dtype, bound, lead, trained, small_tiles):
    """What a target lacks of 1 is no difference of rounded numbers: the gradient is right by its own size.

    Logits are rounded to the states' dtype, and a share by as much as its logit: about 0.03 of 8 nats in bfloat16.
    """
    drawn = sure(lead, dtype=dtype)
    exact, (loss, grad) = wanted(drawn, facts), run(backend, drawn, facts, dtype=dtype, trained=trained)
    assert loss == pytest.approx(exact.loss, rel=bound)
    assert np.linalg.norm(grad - exact.hidden) <= bound * np.linalg.norm(exact.hidden)


@BOTH
@pytest.mark.parametrize("trained", [False, True])
def test_a_logit_that_overflows_at_the_target_is_not_a_perfect_row(backend, trained):
    drawn = draw()
    drawn.h[3], drawn.w[drawn.targets[3]] = 300.0, 300.0
    assert not np.isfinite(run(backend, drawn, HeadFacts(), dtype="float16", trained=trained)[0])


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_tokens_that_can_never_come_cost_nothing(backend, dtype, small_tiles):
    """A bias of -inf over whole tiles, the first among them."""
    drawn, bias = draw(), np.zeros(V, dtype=np.float32)
    bias[:300] = -np.inf
    drawn.targets[:] = 300 + drawn.targets % 400
    if backend == "torch":
        kind = getattr(torch, dtype)
        module = SimpleNamespace(weight=torch.tensor(drawn.w).to(kind), bias=torch.tensor(bias).to(kind))
    else:
        module, kind = nn.Linear(1, 1), getattr(mx, dtype)
        module.weight, module.bias = mx.array(drawn.w).astype(kind), mx.array(bias).astype(kind)
    found = run(backend, drawn, HeadFacts(), module=module, dtype=dtype)
    few = SimpleNamespace(**{**vars(drawn), "w": drawn.w[300:], "targets": drawn.targets - 300})
    close(
        found,
        wanted(few, HeadFacts()),
        loss=1e-6 if dtype == "float32" else 1e-3,
        grad=1e-5 if dtype == "float32" else 5e-3,
    )


@BOTH
def test_a_target_outside_the_vocabulary_is_not_hidden(backend):
    drawn = draw()
    drawn.targets[5] = -100
    try:
        loss = run(backend, drawn, HeadFacts())[0]
    except IndexError:
        return
    assert np.isnan(loss)


@BOTH
@pytest.mark.parametrize("facts", FACTS, ids=str)
def test_log_probabilities_are_the_losses_of_single_positions(backend, facts, small_tiles):
    drawn = draw()
    if backend == "torch":
        head = on_torch.Head(SimpleNamespace(weight=torch.tensor(drawn.w)), facts)
        found = on_torch.log_probs(torch.tensor(drawn.h), head, torch.tensor(drawn.targets).long()).numpy()
    else:
        module = nn.Linear(1, 1, bias=False)
        module.weight = mx.array(drawn.w)
        found = np.array(on_mlx.log_probs(mx.array(drawn.h), on_mlx.Head(module, facts), mx.array(drawn.targets)))
    z = drawn.h.astype(np.float64) @ drawn.w.astype(np.float64).T * facts.scale
    z = z if facts.softcap is None else facts.softcap * np.tanh(z / facts.softcap)
    exact = z[np.arange(N), drawn.targets] - np.log(np.exp(z).sum(axis=1))
    np.testing.assert_allclose(found, exact, rtol=2e-6, atol=2e-6)


@BOTH
def test_not_a_number_in_a_hidden_state_is_not_hidden(backend):
    drawn = draw()
    drawn.h[3, 2] = np.nan
    assert np.isnan(run(backend, drawn, HeadFacts())[0])


@cache
def packed_head(scheme, stored="F32"):
    """Return a drawn head of 1.15 million weights, more than a tile decodes, packed, and what its codes stand for."""
    drawn, quantizer = draw(vocabulary=9000, rows=64, width=128), find_quantizer(parse_scheme(scheme))
    packed = quantizer.quantize(from_float32(drawn.w, stored))
    drawn.w = to_float32(quantizer.dequantize(packed))
    return drawn, packed


@BOTH
@pytest.mark.parametrize("facts", FACTS, ids=str)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scheme", ["affine-4bit-g32", "mxfp4", "nf4"])  # of nf4 no rows can be decoded alone
def test_loss_of_a_quantized_head_is_that_of_its_decoded_weight(backend, facts, tied, scheme):
    drawn, packed = packed_head(scheme)
    if backend == "mlx":
        module = MLXTable(packed, mx.float32) if tied else MLXLinear(packed, None)
    else:
        module = TorchLinear.over(TorchTable(packed, torch.float32, scale=1.0)) if tied else TorchLinear(packed, None)
    close(run(backend, drawn, facts, module=module), wanted(drawn, facts))


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("scheme", ["affine-4bit-g32", "mxfp8"])
def test_a_packed_head_with_a_bias_in_every_dtype(backend, dtype, scheme):
    drawn, packed = packed_head(scheme, {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype])
    given = (drawn.h, np.linspace(-2, 2, len(drawn.w), dtype=np.float32))
    h, bias = (torch.tensor(x).to(getattr(torch, dtype)).float().numpy() for x in given)
    drawn = SimpleNamespace(**{**vars(drawn), "h": h})
    if backend == "mlx":
        module = MLXLinear(packed, mx.array(bias).astype(getattr(mx, dtype)))
    else:
        module = TorchLinear(packed, torch.nn.Parameter(torch.tensor(bias).to(getattr(torch, dtype)), False))
    exact = reference.sft_loss(drawn.h, drawn.w, bias, drawn.targets, drawn.weights, HeadFacts())
    bounds = {"loss": 1e-6, "grad": 1e-5} if dtype == "float32" else {"loss": 2e-3, "grad": 2e-2}
    close(run(backend, drawn, HeadFacts(), module=module, dtype=dtype), exact, **bounds)


@pytest.mark.parametrize("packed", [False, True])
def test_memory_on_mlx_is_one_tile_of_one_block_of_positions(packed):
    """Width 1536 is no power of two: a tile of one row more would be decoded before its turn, and all of them kept."""
    V, D, N = 6000, 1536, 1500
    random = np.random.default_rng(0)
    weight = random.standard_normal((V, D), dtype=np.float32) / 40
    if packed:
        module = MLXLinear(find_quantizer(parse_scheme("affine-4bit-g64")).quantize(Tensor("F32", weight)), None)
    else:
        module = nn.Linear(1, 1, bias=False)
        module.weight = mx.array(weight)
    h, targets = mx.array(random.standard_normal((N, D), dtype=np.float32)), mx.array(random.integers(0, V, N))
    head, weights = on_mlx.Head(module, HeadFacts()), mx.ones(N)
    mx.eval(module.parameters(), h, targets, weights)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(mx.value_and_grad(lambda h: on_mlx.sft(h, head, targets, weights, train_head=False))(h))
    assert mx.get_peak_memory() - before <= 60 * 2**20  # of which the gradient is 9; all tiles would be 68, decoded 35


@BOTH
def test_float16_holds_the_sums_of_long_tiles(backend):
    """65,536 shares of a row, one for every token, do not fit into a float16, their mean does."""
    drawn = draw(vocabulary=65_536, rows=4)
    drawn.h, drawn.w = np.zeros((4, D), dtype=np.float32), np.full((65_536, D), 2.0, dtype=np.float32)
    loss, grad = run(backend, drawn, HeadFacts(), dtype="float16")
    assert loss == pytest.approx(np.log(65_536) * drawn.weights.astype(np.float64).sum(), rel=1e-6)
    assert np.abs(grad).max() <= 1e-2


@BOTH
@pytest.mark.parametrize("facts", FACTS, ids=str)
def test_bfloat16_states_cost_the_rounding_of_their_logits_alone(backend, facts, small_tiles):
    drawn = draw()
    drawn.h, drawn.w = (torch.tensor(x).bfloat16().float().numpy() for x in (drawn.h, drawn.w))
    close(
        run(backend, drawn, facts, dtype="bfloat16"), wanted(drawn, facts), loss=tolerances.LOSS_BF16,
        grad=tolerances.LOSS_GRADIENT_BF16,
    )  # fmt: skip
