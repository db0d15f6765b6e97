"""Optimizers alone, on the same gradients: both backends, the formula in float64, and the libraries that have it.

AdamW's state in 8 bits: both backends, the reference with the codec, and bitsandbytes' AdamW8bit.
"""

from __future__ import annotations

from dataclasses import replace

import bitsandbytes
import mlx.core as mx
import mlx.optimizers
import numpy as np
import pytest
import torch
import transformers.optimization
from torch import nn

import mlxlora.optim
import torch_backend.optim
from shared import reference
from shared.optimizers import RULES, make_groups, num_bytes, orthogonal
from shared.quant.blockwise import decode, encode
from shared.types import Method
from tests import tolerances

SHAPES = [(8, 288), (8, 288), (288, 8), (5,), (3, 100), (70, 31), (300,)]
STEPS = 10


@pytest.fixture
def start():
    random = np.random.default_rng(0)
    return {f"model.layers.{n}.w": random.standard_normal(shape).astype(np.float32) for n, shape in enumerate(SHAPES)}


def make_gradients(start, *, decades):
    """Return the summed gradients of ten updates, each value's typical size anywhere in so many decades below 1."""
    random = np.random.default_rng(1)
    sizes = {name: 10.0 ** -(decades * random.random(value.shape)) for name, value in start.items()}
    return [
        {name: (random.standard_normal(size.shape) * size).astype(np.float32) for name, size in sizes.items()}
        for _ in range(STEPS)
    ]


@pytest.fixture(params=[1, 3], ids=["one decade", "three decades"])
def gradients(start, request):
    return make_gradients(start, decades=request.param)


@pytest.fixture
def updates(make_update):
    return [make_update(step=n, lr=1e-2, beta2=0.99, weight_decay=0.1) for n in range(1, STEPS + 1)]


def on_mlx(start, gradients, updates, *, state="float32", name="adamw", ratio=1.0):
    parameters = {name: mx.array(value) for name, value in start.items()}
    optimizer = mlxlora.optim.Optimizer(parameters, method=Method(name, state, ratio))
    for grads, update in zip(gradients, updates, strict=True):
        arrays = {name: mx.array(grad) for name, grad in grads.items()}
        optimizer.step(dict(parameters), arrays, update, loss=mx.array(1.0), weight=3.0, put=parameters.update)
    kept = {name: np.array(array) for name, array in optimizer.tensors()}
    return {name: np.array(array) for name, array in parameters.items()}, kept


def on_torch(start, gradients, updates, *, state="float32", name="adamw", ratio=1.0):
    parameters = {name: nn.Parameter(torch.from_numpy(value.copy())) for name, value in start.items()}
    optimizer = torch_backend.optim.Optimizer(parameters, method=Method(name, state, ratio))
    for grads, update in zip(gradients, updates, strict=True):
        for name, view in zip(optimizer.parameters, optimizer.views(optimizer.grad), strict=True):
            view.copy_(torch.from_numpy(grads[name]))
        optimizer.step(update, loss=torch.tensor(1.0), weight=3.0)
    kept = {name: tensor.numpy() for name, tensor in optimizer.tensors()}
    return {name: parameter.detach().numpy() for name, parameter in parameters.items()}, kept


def on_reference(start, gradients, updates):
    """Return values and codes of AdamW in float64 that keeps its moments as the codec does."""
    values, kept = dict(start), {}
    coded = {
        name: (encode(np.zeros_like(v), signed=True), encode(np.zeros_like(v), signed=False))
        for name, v in start.items()
    }
    for grads, update in zip(gradients, updates, strict=True):
        clipped, _ = reference.clip({name: grad / 3.0 for name, grad in grads.items()}, update.max_grad_norm)
        for name, (m, v) in coded.items():
            old = decode(m, signed=True), decode(v, signed=False)
            found = reference.adamw(values[name], clipped[name], *old, update)
            values[name] = found.param
            coded[name] = encode(found.m, signed=True), encode(found.v, signed=False)
    for name, (m, v) in coded.items():
        kept |= {f"m.{name}": m.codes, f"v.{name}": v.codes, f"m_absmax.{name}": m.absmax, f"v_absmax.{name}": v.absmax}
    return values, kept


def gap(one, other, start):
    """Return |one - other| / |other - start| over all tensors."""
    squares = [(np.square(one[name] - other[name]).sum(), np.square(other[name] - start[name]).sum()) for name in start]
    return float(np.sqrt(sum(a for a, _ in squares) / sum(b for _, b in squares)))


def code_gap(one, other):
    """Return the share of codes that differ; fails where one differs by more than a step."""
    names = [name for name, array in other.items() if array.dtype == np.uint8]
    steps = np.concatenate([np.abs(one[name].astype(int) - other[name]).reshape(-1) for name in names])
    assert steps.max() <= 1
    return (steps > 0).mean()


@pytest.mark.parametrize("state", ["float32", "8bit"])
def test_ten_updates_are_the_same_on_both_backends(start, gradients, updates, state):
    ours, kept = on_mlx(start, gradients, updates, state=state)
    theirs, their_kept = on_torch(start, gradients, updates, state=state)
    assert gap(ours, theirs, start) <= (tolerances.OPTIMIZER if state == "float32" else tolerances.OPTIMIZER_8BIT)
    assert kept.keys() == their_kept.keys()
    assert all(kept[name].shape == their_kept[name].shape for name in kept)
    assert all(kept[name].dtype == their_kept[name].dtype for name in kept)
    if state == "8bit":
        assert code_gap(kept, their_kept) <= tolerances.CODES


@pytest.mark.parametrize("train", [on_mlx, on_torch])
def test_ten_updates_in_8bit_are_those_of_the_reference_with_the_codec(start, gradients, updates, train):
    ours, kept = train(start, gradients, updates, state="8bit")
    theirs, their_kept = on_reference(start, gradients, updates)
    assert gap(ours, theirs, start) <= tolerances.OPTIMIZER_8BIT
    assert code_gap(kept, their_kept) <= tolerances.CODES
    for name, array in their_kept.items():
        if array.dtype == np.float32:
            np.testing.assert_allclose(kept[name], array, rtol=1e-3)


def on_bitsandbytes(start, gradients, updates):
    """Return the values of AdamW8bit with our settings: no decay of vectors, small tensors in 8 bits too, clipped."""
    parameters = {name: nn.Parameter(torch.from_numpy(value.copy())) for name, value in start.items()}
    groups = [
        {"params": [p for p in parameters.values() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = bitsandbytes.optim.AdamW8bit(groups, lr=1e-2, betas=(0.9, 0.99), eps=1e-8, min_8bit_size=0)
    for grads, update in zip(gradients, updates, strict=True):
        clipped, _ = reference.clip({name: grad / 3.0 for name, grad in grads.items()}, update.max_grad_norm)
        for name, parameter in parameters.items():
            parameter.grad = torch.from_numpy(clipped[name].astype(np.float32))
        optimizer.step()
    return {name: parameter.detach().numpy() for name, parameter in parameters.items()}


def test_ten_updates_in_8bit_are_near_those_of_bitsandbytes(start, updates):
    """On a CPU its formula is ours, also where eps stands; its codes are those of its coarser kernel."""
    gradients = make_gradients(start, decades=1)
    ours, _ = on_torch(start, gradients, updates, state="8bit")
    assert gap(ours, on_bitsandbytes(start, gradients, updates), start) <= tolerances.BITSANDBYTES


def test_8bit_is_nearer_to_float32_than_bitsandbytes_where_gradients_differ_much_in_size(start, updates):
    """Second moments that code as zero, 6 decades and more below the largest, must not make an update explode."""
    gradients = make_gradients(start, decades=3)
    plain, _ = on_torch(start, gradients, updates, state="float32")
    ours, _ = on_torch(start, gradients, updates, state="8bit")
    assert gap(ours, plain, start) <= tolerances.EIGHT_BITS
    assert gap(ours, plain, start) < gap(on_bitsandbytes(start, gradients, updates), plain, start)


def test_float32_moments_are_four_times_as_large(start, gradients, updates):
    for train in (on_mlx, on_torch):
        sizes = []
        for state in ("float32", "8bit"):
            _, kept = train(start, gradients[:1], updates[:1], state=state)
            sizes.append(sum(array.nbytes for array in kept.values()))
        codes = sum(value.size for value in start.values())
        blocks = sum(-(-value.size // 256) for value in start.values())
        assert sizes == [8 * codes, 2 * codes + 8 * blocks]


# the other optimizers

NUMBERS = {"lr": 1e-2, "beta2": 0.99, "weight_decay": 0.1}
OTHERS = {
    "adam": {},
    "sgd": {"nesterov": True},
    "plain_sgd": {},
    "lion": {"lr": 1e-3},
    "adadelta": {"lr": 1.0, "beta2": 0.9, "eps": 1e-6},
    "adafactor": {},
    "muon": {"momentum": 0.95, "nesterov": True},
}


@pytest.fixture(params=OTHERS)
def other(request, make_update):
    """Return the name of an optimizer that is not AdamW, and ten updates of it."""
    numbers = {**NUMBERS, **OTHERS[request.param]}
    return request.param, [make_update(step=n, **numbers) for n in range(1, STEPS + 1)]


def in_float64(start, gradients, updates, *, optimizer, weight=3.0):
    """Return the values that an optimizer's formula gives in float64, tensor by tensor."""
    groups = [make_groups({name: value.shape}, Method(optimizer), limit=1)[0] for name, value in start.items()]
    values = {name: value.astype(np.float64) for name, value in start.items()}
    kept = [
        {prefix: np.zeros(shape) for prefix, shape in group.rule.keeps(group.stack[1:]).items()} for group in groups
    ]
    for grads, update in zip(gradients, updates, strict=True):
        clipped, _ = reference.clip({name: grad / weight for name, grad in grads.items()}, update.max_grad_norm)
        for number, group in enumerate(groups):
            (tensor,) = group.shapes
            olds = {prefix: array[None] for prefix, array in kept[number].items()}
            value, news = group.rule.step(values[tensor][None], clipped[tensor][None], olds, group.numbers(update))
            values[tensor], kept[number] = value[0], {prefix: array[0] for prefix, array in news.items()}
    return values


def away(one, other):
    """Return |one - other| / |other| over all tensors."""
    squares = [(np.square(one[name] - other[name]).sum(), np.square(other[name]).sum()) for name in other]
    return float(np.sqrt(sum(a for a, _ in squares) / sum(b for _, b in squares)))


@pytest.mark.parametrize("train", [on_mlx, on_torch])
def test_ten_updates_of_every_optimizer_are_those_of_its_formula_in_float64(start, gradients, other, train):
    name, updates = other
    found, _ = train(start, gradients, updates, name=name)
    wanted = in_float64(start, gradients, updates, optimizer=name)
    assert away(found, wanted) <= tolerances.TRAJECTORY
    assert gap(found, wanted, start) <= tolerances.MOVEMENT


def test_what_every_optimizer_keeps_is_the_same_on_both_backends_and_as_large_as_estimated(start, gradients, other):
    name, updates = other
    found = [train(start, gradients, updates, name=name)[1] for train in (on_mlx, on_torch)]
    ours, theirs = ({key: (array.shape, array.dtype) for key, array in kept.items()} for kept in found)
    assert ours == theirs
    shapes = {tensor: value.shape for tensor, value in start.items()}
    assert sum(array.nbytes for array in found[0].values()) == num_bytes(shapes, Method(name))


@pytest.mark.parametrize("name", ["adam", "sgd", "lion"])
def test_ten_updates_in_8bit_are_near_those_in_float32(start, make_update, name):
    updates = [make_update(step=n, **{**NUMBERS, **OTHERS[name]}) for n in range(1, STEPS + 1)]
    gradients = make_gradients(start, decades=1)
    plain = in_float64(start, gradients, updates, optimizer=name)
    found = [train(start, gradients, updates, name=name, state="8bit")[0] for train in (on_mlx, on_torch)]
    assert gap(found[0], found[1], start) <= tolerances.OPTIMIZER_8BIT
    assert gap(found[0], plain, start) <= tolerances.EIGHT_BITS


def test_lora_plus_is_another_rate_for_every_B(start, make_update):
    start = {
        "model.layers.0.q_proj.lora_A": start["model.layers.0.w"],
        "model.layers.0.q_proj.lora_B": start["model.layers.2.w"],
    }
    gradients = make_gradients(start, decades=1)
    updates = [make_update(step=n, weight_decay=0.1, max_grad_norm=None) for n in range(1, STEPS + 1)]
    faster = [replace(update, lr=16 * update.lr) for update in updates]
    for train in (on_mlx, on_torch):
        plain, quick = (train(start, gradients, some)[0] for some in (updates, faster))
        found, _ = train(start, gradients, updates, ratio=16.0)
        for name, wanted in zip(start, (plain, quick), strict=True):
            assert np.array_equal(found[name], wanted[name])


OWN = """
from shared.optimizers import Rule, like

def step(p, g, kept, n):
    m = n.momentum * kept["m"] + g
    return p - n.lr * m / (1 + m * m), {"m": m}

RULE = Rule(step, like("m"))
"""


def test_a_rule_of_ones_own_is_the_same_on_both_backends(start, updates, tmp_path, monkeypatch):
    (tmp_path / "own_rule_for_parity.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    ours, theirs = (
        train(start, make_gradients(start, decades=1), updates, name="own_rule_for_parity:RULE")[0]
        for train in (on_mlx, on_torch)
    )
    assert away(ours, theirs) <= tolerances.TRAJECTORY


# the formulae against the libraries that have them, in float64 where those compute in it


def by_formula(matrix, updates, *, name):
    """Return a tensor behind updates with a rule in its own dtype."""
    value, gradients = matrix
    rule, kept = (
        RULES[name],
        {prefix: np.zeros(shape, value.dtype) for prefix, shape in RULES[name].keeps(value.shape).items()},
    )
    kept, value = {prefix: array[None] for prefix, array in kept.items()}, value[None]
    for grad, update in zip(gradients, updates, strict=True):
        value, kept = rule.step(value, grad[None], kept, update)
    return value[0]


def by_torch(matrix, make):
    """Return a tensor behind updates with one of torch's optimizers."""
    value, gradients = matrix
    parameter = nn.Parameter(torch.from_numpy(value.copy()))
    optimizer = make([parameter])
    for grad in gradients:
        parameter.grad = torch.from_numpy(grad.copy())
        optimizer.step()
    return parameter.detach().numpy()


def by_mlx(value, gradients, optimizer):
    """Return a tensor behind updates with one of MLX's optimizers, in float32."""
    parameters = {"p": mx.array(value)}
    for grad in gradients:
        parameters = optimizer.apply_gradients({"p": mx.array(grad)}, parameters)
    return np.array(parameters["p"])


@pytest.fixture(params=[(12, 30), (30, 12)], ids=["wide", "tall"])
def matrix(request):
    """Return a value and ten gradients of one matrix."""
    random = np.random.default_rng(2)
    return random.standard_normal(request.param), random.standard_normal((STEPS, *request.param))


LIBRARY = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
    "plain_sgd": lambda p: torch.optim.SGD(p, lr=1e-2, weight_decay=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0, rho=0.9, eps=1e-6, weight_decay=0.1),
    "adafactor": lambda p: transformers.optimization.Adafactor(
        p, lr=1e-2, scale_parameter=False, relative_step=False, weight_decay=0.1
    ),
}


@pytest.mark.parametrize("name", LIBRARY)
def test_a_formula_is_that_of_torch_or_transformers(matrix, make_update, name):
    updates = [make_update(step=n, **{**NUMBERS, **OTHERS[name]}) for n in range(1, STEPS + 1)]
    found = by_formula(matrix, updates, name=name)
    np.testing.assert_allclose(found, by_torch(matrix, LIBRARY[name]), rtol=1e-11, atol=1e-12)


def test_lion_is_that_of_mlx(matrix, make_update):
    value, gradients = (array.astype(np.float32) for array in matrix)
    updates = [make_update(step=n, lr=1e-2, beta2=0.99, weight_decay=0.1) for n in range(1, STEPS + 1)]
    theirs = by_mlx(value, gradients, mlx.optimizers.Lion(1e-2, betas=[0.9, 0.99], weight_decay=0.1))
    np.testing.assert_allclose(by_formula((value, gradients), updates, name="lion"), theirs, rtol=1e-5, atol=1e-6)


def test_muon_is_that_of_mlx_at_another_rate(matrix, make_update):
    """MLX scales by the square root of rows / columns, and has its decay in the gradient."""
    value, gradients = (array.astype(np.float32) for array in matrix)
    updates = [make_update(step=n, lr=1e-2, momentum=0.95, nesterov=True) for n in range(1, STEPS + 1)]
    rows, columns = value.shape
    rate = 1e-2 * 0.2 * max(rows, columns) ** 0.5 / max(1, rows / columns) ** 0.5
    theirs = by_mlx(value, gradients, mlx.optimizers.Muon(rate, weight_decay=0.0))
    assert away({"p": by_formula((value, gradients), updates, name="muon")}, {"p": theirs}) <= tolerances.TRAJECTORY


def test_muon_is_that_of_torch_but_for_its_bfloat16(matrix, make_update):
    updates = [
        make_update(step=n, lr=1e-2, momentum=0.95, nesterov=True, weight_decay=0.1) for n in range(1, STEPS + 1)
    ]
    theirs = by_torch(matrix, lambda p: torch.optim.Muon(p, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"))
    start = {"p": matrix[0]}
    assert gap({"p": by_formula(matrix, updates, name="muon")}, {"p": theirs}, start) <= tolerances.BFLOAT16_MUON


def test_newton_schulz_brings_every_singular_value_near_1(matrix):
    """The polynomial acts on singular values alone; its fixed points lie between 0.7 and 1.2."""
    u, values, vt = np.linalg.svd(matrix[0], full_matrices=False)
    values = values / np.linalg.norm(matrix[0])
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    np.testing.assert_allclose(orthogonal(matrix[0][None])[0], u * values @ vt, atol=1e-6)
    assert (values > 0.65).all()
    assert (values < 1.25).all()


def test_on_mlx_old_and_new_values_of_one_group_are_in_memory_at_a_time(make_update):
    values = {f"model.layers.{n}.w": mx.zeros((1024, 1024)) for n in range(32)}
    optimizer = mlxlora.optim.Optimizer(values, method=Method("adamw"))
    grads = {name: mx.full(value.shape, 1e-3) for name, value in values.items()}
    total = 4 * sum(value.size for value in values.values())
    mx.eval(values, grads, optimizer.arrays())
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    optimizer.step(dict(values), grads, make_update(), loss=mx.array(1.0), weight=1.0, put=values.update)
    mx.eval(values, optimizer.arrays())
    assert mx.get_peak_memory() - before < total  # of it two thirds, however many groups; all new values: 3 * total


@pytest.mark.parametrize("state", ["float32", "8bit"])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_on_mlx_a_large_tensor_in_pieces_is_stepped_bit_for_bit(make_update, name, state):
    size = mlxlora.optim.GROUP + 700
    (group,) = make_groups({"w": (size,)}, Method(name, state), limit=mlxlora.optim.GROUP)
    random = np.random.default_rng(0)
    old, grad = (mx.array(random.standard_normal(group.size).astype(np.float32)) for _ in range(2))
    found = []
    for advance in (mlxlora.optim.advance, mlxlora.optim.advance_in_pieces):
        value, held = old, mlxlora.optim.make_moments(group, state=state)
        for ok in (True, False, True):
            numbers = {"divisor": mx.array(3.0), "ok": mx.array(ok)}
            value, held = advance(group, value, grad, held, make_update(weight_decay=0.1), **numbers)
        found.append({"value": value, **held})
    assert all(mx.array_equal(whole, found[1][name]) for name, whole in found[0].items())
