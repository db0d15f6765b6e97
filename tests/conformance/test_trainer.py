"""`Trainer.step` is one whole update: sum, divide once, clip, update or skip."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from shared import reference
from shared.data.batch import make_batch, micro_batches
from shared.data.layout import Layout
from shared.errors import CheckpointError
from shared.schemes import parse_scheme
from shared.tensors import to_float32
from shared.types import Method, Scheme, Tensor
from tests import tolerances

LENGTHS = [12, 12, 12, 12, 12, 12, 12, 12]
OPTIMIZERS = [("adamw", "float32"), ("adamw", "8bit"), ("adafactor", "float32"), ("lion", "8bit"), ("muon", "float32")]
HALVES = [("bfloat16", "BF16"), ("float16", "F16")]
RAGGED = [5, 19, 8, 31, 12, 12, 3, 27]


def values(tensors):
    return {name: to_float32(tensor).astype(np.float64) for name, tensor in tensors}


def gap(one, two):
    largest = max(np.abs(array).max() for array in two.values())
    return max(np.abs(one[name] - two[name]).max() for name in two) / largest


def norm_gap(one, two):
    """Return |one - two| / |two|: AdamW divides by |g|, so single elements with g near eps are rounding alone."""
    return np.sqrt(sum(((one[n] - two[n]) ** 2).sum() for n in two) / sum((two[n] ** 2).sum() for n in two))


def gradients(lab, batches, update):
    """Return the gradient a step used."""
    lab.trainer.step(batches, update).result()
    return first_moments(lab, update)


def first_moments(lab, update):
    """Return the gradient of the first step: AdamW's first moment holds (1 - beta1) of it."""
    return {n[2:]: a / (1 - update.beta1) for n, a in values(lab.trainer.state()).items() if n.startswith("m.")}


def steady(adapter, grads, *, eps):
    """Return the adapter where |g| is 0 or far above eps: near it AdamW's g / (|g| + eps) is rounding alone."""
    return {n: np.where((grads[n] == 0) | (np.abs(grads[n]) > 1e3 * eps), adapter[n], 0) for n in adapter}


@pytest.mark.parametrize("lengths", [LENGTHS, RAGGED])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_accumulation_of_1_2_4_and_8_micro_batches_gives_the_same_update(
    make_lab, make_examples, make_update, lengths, dropout
):
    examples, update = make_examples(lengths), make_update()
    results = []
    for rows in (8, 4, 2, 1):
        lab = make_lab(dropout=dropout, warm=False)  # the start of every run
        by_length = sorted(range(8), key=lambda n: -lengths[n])
        groups = [by_length[n : n + rows] for n in range(0, 8, rows)]
        batches = [make_batch([examples[n] for n in group], group) for group in groups]
        stats = lab.trainer.step(batches, update).result()
        results.append((stats.loss, first_moments(lab, update), values(lab.model.tensors("adapter"))))
    (one_loss, one_grads, one), *others = results
    for loss, grads, adapter in others:
        assert abs(loss - one_loss) <= tolerances.MICRO * abs(one_loss)
        assert max(norm_gap(grads, one_grads), gap(grads, one_grads)) <= tolerances.MICRO
        found, wanted = (steady(some, one_grads, eps=update.eps) for some in (adapter, one))
        assert gap(found, wanted) <= tolerances.MICRO


def test_loss_is_nats_per_supervised_token_whatever_the_micro_batches(make_lab, make_examples, make_update):
    lab, examples = make_lab(), make_examples(RAGGED)
    batches = micro_batches(examples, Layout(40))
    log_probs = np.concatenate([lab.model.log_probs(batch) for batch in batches])
    stats = lab.trainer.step(batches, make_update()).result()
    assert stats.loss == pytest.approx(-log_probs.astype(np.float64).mean(), rel=tolerances.FIRST_LOSS)
    assert not stats.skipped


def test_update_is_that_of_the_float64_reference(make_lab, make_examples, make_update):
    update = make_update(weight_decay=0.1, max_grad_norm=0.05)
    lab, batches = make_lab(), micro_batches(make_examples(RAGGED), Layout(64))
    before = values(lab.model.tensors("adapter"))
    clipped = gradients(lab, batches, update)
    after = values(lab.model.tensors("adapter"))
    second = {n[2:]: a for n, a in values(lab.trainer.state()).items() if n.startswith("v.")}
    for name in before:
        zero = np.zeros_like(before[name])
        wanted = reference.adamw(before[name], clipped[name], zero, zero, update)
        moved = np.abs(wanted.param - before[name]).max()
        assert np.abs(after[name] - wanted.param).max() <= 1e-4 * moved + 1e-8
        np.testing.assert_allclose(second[name], wanted.v, rtol=1e-4, atol=1e-12)
    norm = np.sqrt(sum((array**2).sum() for array in clipped.values()))
    assert norm == pytest.approx(0.05, rel=1e-4)


def test_gradient_norm_is_reported_before_clipping(make_lab, make_examples, make_update):
    batches = micro_batches(make_examples(RAGGED), Layout(4096))
    free, tight = make_lab(), make_lab()
    wide = free.trainer.step(batches, make_update(max_grad_norm=None)).result()
    narrow = tight.trainer.step(batches, make_update(max_grad_norm=1e-3)).result()
    assert wide.grad_norm == pytest.approx(narrow.grad_norm, rel=1e-6)


@pytest.mark.parametrize(
    ("dtype", "adapter"), [("float32", {}), ("float16", {}), ("float32", {"type": "none"})], ids=str
)
def test_norms_by_module_are_those_of_the_gradient_and_change_nothing(
    make_lab, make_examples, make_update, dtype, adapter
):
    batches = micro_batches(make_examples(RAGGED), Layout(64))
    runs = []
    for by_module in (False, True):
        lab = make_lab(dtype=dtype, **adapter)
        stats = lab.trainer.step(batches, make_update(max_grad_norm=None, by_module=by_module)).result()
        grads = {n[2:]: a / (1 - make_update().beta1) for n, a in values(lab.trainer.state()).items() if n[:2] == "m."}
        lab.trainer.step(batches, make_update(step=2, by_module=by_module)).result()
        state = {n: t.data.tobytes() for n, t in [*lab.model.tensors("adapter"), *lab.trainer.state()]}
        runs.append((stats, grads, state))
    (plain, _, off), (stats, grads, on) = runs
    assert off == on
    assert (plain.loss, plain.grad_norm, plain.norms) == (stats.loss, stats.grad_norm, {})
    wanted = by_module_of(grads)
    assert stats.norms.keys() == wanted.keys()
    assert [stats.norms[name] for name in wanted] == pytest.approx(list(wanted.values()), rel=1e-5)
    assert np.sqrt(sum(norm**2 for norm in stats.norms.values())) == pytest.approx(stats.grad_norm, rel=1e-5)


def by_module_of(grads):
    """Return the norm of each module's gradient in float64; a module is named for its layer and its last part."""
    squares = {}
    for name, grad in grads.items():
        *path, module, _ = name.split(".")
        place = f"layers.{path[2]}.{module}" if "layers" in path else module
        squares[place] = squares.get(place, 0.0) + float((grad**2).sum())
    return {place: np.sqrt(square) for place, square in squares.items()}


@pytest.mark.parametrize(("optimizer", "state"), OPTIMIZERS)
def test_non_finite_update_is_skipped_and_changes_nothing(make_lab, make_examples, make_update, optimizer, state):
    lab = make_lab(optimizer=optimizer, state=state)
    good = micro_batches(make_examples(RAGGED), Layout(4096))
    lab.trainer.step(good, make_update()).result()
    before = [*lab.model.tensors("adapter"), *lab.trainer.state()]
    kept = {name: tensor.data.copy() for name, tensor in before}
    broken = [replace(good[0], weights_N=np.full_like(good[0].weights_N, np.inf))]
    assert lab.trainer.step(broken, make_update(step=2)).result().skipped
    for name, tensor in [*lab.model.tensors("adapter"), *lab.trainer.state()]:
        assert np.array_equal(tensor.data, kept[name]), name
    assert not lab.trainer.step(good, make_update(step=3)).result().skipped


@pytest.mark.parametrize(("optimizer", "state"), OPTIMIZERS)
def test_state_round_trip_continues_bit_for_bit(make_lab, make_examples, make_update, optimizer, state):
    batches = micro_batches(make_examples(RAGGED), Layout(64))
    whole = make_lab(dropout=0.1, optimizer=optimizer, state=state)
    for step in range(1, 6):
        whole.trainer.step(batches, make_update(step=step)).result()
    first = make_lab(dropout=0.1, optimizer=optimizer, state=state)
    for step in range(1, 4):
        first.trainer.step(batches, make_update(step=step)).result()
    second = make_lab(dropout=0.1, seed=7)
    second.model.load_tensors("adapter", dict(first.model.tensors("adapter")))
    trainer = second.backend.trainer(second.model, objective="sft", optimizer=Method(optimizer, state))
    trainer.load_state(dict(first.trainer.state()))
    for step in range(4, 6):
        trainer.step(batches, make_update(step=step)).result()
    wanted = dict(whole.model.tensors("adapter"))
    for name, tensor in second.model.tensors("adapter"):
        assert np.array_equal(tensor.data, wanted[name].data), name


def test_repeated_run_is_bit_identical(make_lab, make_examples, make_update):
    batches = micro_batches(make_examples(RAGGED), Layout(64))
    runs = []
    for _ in range(2):
        lab = make_lab(dropout=0.3)
        losses = [lab.trainer.step(batches, make_update(step=step)).result().loss for step in (1, 2, 3)]
        runs.append((losses, {n: t.data.tobytes() for n, t in lab.model.tensors("adapter")}))
    assert runs[0] == runs[1]


def test_moments_of_the_other_format_are_refused_and_leave_no_trace(make_lab, make_examples, make_update):
    labs = [make_lab(state=state) for state in ("float32", "8bit")]
    batches = micro_batches(make_examples(RAGGED), Layout(64))
    for lab, other in (labs, labs[::-1]):
        lab.trainer.step(batches, make_update()).result()
        before = dict(lab.trainer.state())
        with pytest.raises(CheckpointError, match="another model or adapter"):
            lab.trainer.load_state(dict(other.trainer.state()))
        assert all(np.array_equal(tensor.data, before[name].data) for name, tensor in lab.trainer.state())


def test_optimizer_state_of_another_adapter_is_refused(make_lab):
    lab, other = make_lab(), make_lab(targets=["q_proj"])
    with pytest.raises(CheckpointError, match="another model or adapter"):
        lab.trainer.load_state(dict(other.trainer.state()))


@pytest.mark.parametrize("quantization", ["none", "affine-4bit-g64"])
def test_recompute_gives_the_same_update(make_lab, make_examples, make_update, quantization):
    batches = micro_batches(make_examples(RAGGED), Layout(64))
    scheme = parse_scheme(quantization)
    results = []
    for recompute in (False, True):
        lab = make_lab(recompute=recompute, dropout=0.1, quantization=scheme)
        stats = lab.trainer.step(batches, make_update()).result()
        results.append((stats, values(lab.model.tensors("adapter"))))
    assert results[0][0].loss == pytest.approx(results[1][0].loss, rel=tolerances.MICRO)
    assert norm_gap(results[1][1], results[0][1]) <= tolerances.MICRO


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_training_never_changes_packed_bytes(make_lab, make_examples, make_update, bits):
    lab = make_lab(quantization=Scheme("affine", bits, 32))
    batches = micro_batches(make_examples(RAGGED), Layout(64))

    def digest():
        words = b"".join(tensor.data.tobytes() for _, tensor in sorted(lab.model.tensors("base"), key=lambda p: p[0]))
        return hashlib.sha256(words).hexdigest()

    before = digest()
    first = lab.trainer.step(batches, make_update(lr=1e-2)).result().loss
    for step in range(2, 12):
        last = lab.trainer.step(batches, make_update(step=step, lr=1e-2)).result().loss
    assert digest() == before
    assert last < first
    assert len(lab.model.info.quantized) == 14


@pytest.mark.parametrize("tied", [True, False])
def test_full_fine_tuning_trains_every_parameter_as_torch_does(
    make_lab, make_examples, make_update, tiny_model_folder, tied
):
    import torch
    from transformers import AutoModelForCausalLM

    folder = tiny_model_folder(tied=tied)
    lab, examples = make_lab(folder, type="none"), make_examples([9, 9, 14])
    update = make_update(max_grad_norm=None, lr=1e-3)
    batches = micro_batches(examples, Layout(4096))
    found = gradients(lab, batches, update)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total, weight = torch.zeros(()), 0
    for example in examples:
        logits = plain(torch.from_numpy(example.tokens)[None].long()).logits[0]
        at = np.flatnonzero(example.supervised)
        targets = torch.from_numpy(example.tokens[at]).long()
        total = total + torch.nn.functional.cross_entropy(logits[at - 1], targets, reduction="sum")
        weight += len(at)
    (total / weight).backward()
    wanted = {name: p.grad.double().numpy() for name, p in plain.named_parameters()}
    assert found.keys() == wanted.keys()
    assert gap(found, wanted) <= tolerances.GRADIENTS


@pytest.mark.parametrize(("dtype", "stored"), HALVES)
def test_a_half_precision_base_trains_float32_adapters(make_lab, make_examples, make_update, dtype, stored):
    lab = make_lab(dtype=dtype)
    batches = micro_batches(make_examples(RAGGED), Layout(4096))
    losses = [lab.trainer.step(batches, make_update(step=n, lr=1e-2)).result().loss for n in range(1, 9)]
    assert losses[-1] < losses[0]
    assert {tensor.dtype for _, tensor in lab.model.tensors("adapter")} == {"F32"}
    assert {tensor.dtype for _, tensor in lab.model.tensors("base")} == {stored}


@pytest.mark.parametrize(("dtype", "stored"), HALVES)
def test_half_precision_full_fine_tuning_keeps_float32_masters(make_lab, make_examples, make_update, dtype, stored):
    lab = make_lab(dtype=dtype, type="none")
    batches = micro_batches(make_examples([9, 12]), Layout(4096))
    for step in range(1, 5):
        lab.trainer.step(batches, make_update(step=step, lr=1e-5)).result()
    state = dict(lab.trainer.state())
    masters = {name.removeprefix("master."): t for name, t in state.items() if name.startswith("master.")}
    own = dict(lab.model.tensors("adapter"))
    assert masters.keys() == own.keys()
    assert all(tensor.dtype == "F32" for tensor in masters.values())
    assert all(tensor.dtype == stored for tensor in own.values())


def test_a_float16_update_is_that_of_float32(make_lab, make_examples, make_update):
    """The loss scale is a power of two, and no trace of it is left."""
    batches, update = micro_batches(make_examples(RAGGED), Layout(64)), make_update()
    half, plain = make_lab(dtype="float16"), make_lab()
    stats, wanted = half.trainer.step(batches, update).result(), plain.trainer.step(batches, update).result()
    assert stats.loss == pytest.approx(wanted.loss, rel=tolerances.FLOAT16)
    assert stats.grad_norm == pytest.approx(wanted.grad_norm, rel=tolerances.FLOAT16)
    moments = [
        {name: array for name, array in values(lab.trainer.state()).items() if name.startswith("m.")}
        for lab in (half, plain)
    ]
    assert norm_gap(*moments) <= tolerances.FLOAT16


def test_an_overflow_halves_the_loss_scale_and_changes_nothing_else(make_lab, make_examples, make_update):
    lab, batches = make_lab(dtype="float16"), micro_batches(make_examples(RAGGED), Layout(64))
    lab.trainer.step(batches, make_update()).result()
    state = dict(lab.trainer.state())
    assert state["loss_scale.value"].data == 2.0**16
    lab.trainer.load_state({**state, "loss_scale.value": Tensor("F32", np.array(2.0**40, np.float32))})
    before = {name: tensor.data.copy() for name, tensor in [*lab.model.tensors("adapter"), *state.items()]}
    stats = lab.trainer.step(batches, make_update(step=2)).result()
    assert stats.skipped
    assert stats.overflowed
    assert np.isfinite(stats.loss)
    after = dict([*lab.model.tensors("adapter"), *lab.trainer.state()])
    assert {name for name, tensor in after.items() if not np.array_equal(tensor.data, before[name])} == {
        "loss_scale.value", "loss_scale.since",
    }  # fmt: skip
    assert after["loss_scale.value"].data == 2.0**39
    overflows = 1
    while lab.trainer.step(batches, make_update(step=3)).result().overflowed:
        overflows += 1
    assert 10 < overflows < 35
    assert dict(lab.trainer.state())["loss_scale.value"].data == 2.0 ** (40 - overflows)


def test_a_loss_that_is_not_finite_is_no_overflow(make_lab, make_examples, make_update):
    lab, good = make_lab(dtype="float16"), micro_batches(make_examples(RAGGED), Layout(4096))
    broken = [replace(good[0], weights_N=np.full_like(good[0].weights_N, np.nan))]
    stats = lab.trainer.step(broken, make_update()).result()
    assert stats.skipped
    assert not stats.overflowed
    assert dict(lab.trainer.state())["loss_scale.value"].data == 2.0**16


def test_memory_is_reported_in_bytes(make_lab, make_examples, make_update):
    lab = make_lab()
    lab.trainer.step(micro_batches(make_examples(RAGGED), Layout(64)), make_update()).result()
    memory = lab.trainer.memory()
    assert 0 < memory.active <= max(memory.peak, memory.active)
    assert memory.limit is None or memory.limit > memory.peak


def test_tensor_is_words_and_a_dtype():
    assert Tensor("BF16", np.zeros(2, dtype=np.uint16)).shape == (2,)


def test_gradients_of_micro_batches_sum_to_that_of_the_whole(make_lab, make_examples, make_update):
    examples, update = make_examples(RAGGED), make_update(max_grad_norm=None)
    whole = gradients(make_lab(), micro_batches(examples, Layout(4096)), update)
    for micro_tokens in (1, 33, 64):
        parts = gradients(make_lab(), micro_batches(examples, Layout(micro_tokens)), update)
        assert gap(parts, whole) <= tolerances.MICRO
