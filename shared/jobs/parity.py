"""`parity`: one recipe on two backends, the same batches, and the gaps of every quantity between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from shared.adapters.start import start_values
from shared.config import RunConfig
from shared.data.batch import update_batches
from shared.data.layout import choose_layout
from shared.folder import end_tokens
from shared.jobs.prepare import Prepared, prepare
from shared.jobs.train import load_trainable
from shared.loop import build_update
from shared.optimizers import method_of
from shared.protocols import Backend, Model, Trainer
from shared.registry import BACKENDS, check_installed, find_backend
from shared.schedules import build_schedule
from shared.tensors import to_float32
from shared.types import Batch, Method, Sampling, Tensor, Update

# The contract's bounds for float32 on a CPU; tests/tolerances.py keeps the measurement behind each.
BOUNDS = {"first loss": 1e-6, "gradients": 2e-5, "loss curve": 1e-4, "final adapter": 1e-3}
MOST_UPDATES = 50  # that the bounds were measured over
GREEDY_TOKENS = 48
PROMPTS = 2


@dataclass(frozen=True)
class Gap:
    """One compared quantity: the largest gap, its bound, and what it is relative to."""

    quantity: str
    gap: float
    bound: float
    note: str

    @property
    def ok(self) -> bool:
        """Return whether the gap is within its bound; NaN is not."""
        return self.gap <= self.bound


@dataclass(frozen=True)
class ParityResult:
    """The gaps between two backends, the curve of each, and the texts they generate."""

    model: str
    backends: tuple[str, str]
    gaps: tuple[Gap, ...]
    curves: tuple[tuple[float, ...], tuple[float, ...]]
    texts: tuple[tuple[str, str], ...]

    @property
    def ok(self) -> bool:
        """Return whether every gap is within its bound."""
        return all(gap.ok for gap in self.gaps)


@dataclass(frozen=True)
class Trace:
    """What one backend did."""

    losses: tuple[float, ...]
    first_gradient: dict[str, np.ndarray]
    adapter: dict[str, np.ndarray]
    texts: tuple[str, ...]


def parity(
    config: RunConfig, *, updates: int | None = None, note: Callable[[str], None] = lambda text: None
) -> ParityResult:
    """Return the gaps between the two registered backends over the first `updates` updates, in float32.

    updates: by default those of the run, MOST_UPDATES at most. Raises CapabilityError where a backend is missing.
    """
    updates = updates or min(config.train.updates or MOST_UPDATES, MOST_UPDATES)
    for name in BACKENDS:
        check_installed(name)
    prepared = prepare(config)
    one, two = (find_backend(name) for name in BACKENDS)
    if config.train.dtype != "float32":
        note(f"compared in float32 (the config trains in {config.train.dtype}): the bounds are those of float32")
    if config.optimizer.state != "float32":
        note(
            f"compared with float32 moments (the config keeps them in {config.optimizer.state}): the bounds are theirs"
        )
    traces = []
    for backend in (one, two):
        note(f"{updates} updates on {backend.name} ({backend.probe().reason})")
        traces.append(trace(backend, prepared, updates=updates))
    return compare(config.model, (one.name, two.name), traces[0], traces[1])


def trace(backend: Backend, prepared: Prepared, *, updates: int) -> Trace:
    """Train on one backend and return what it did."""
    config = prepared.config
    model, spec = load_trainable(prepared, backend, dtype="float32")
    if spec.kind != "none":
        model.load_tensors("adapter", start_values(config, spec, model, prepared.base))
    method = replace(method_of(config), state="float32", scales_loss=False)
    plan = prepared.plan
    total = config.train.updates or plan.updates_per_epoch * (config.train.epochs or 1)
    schedule = build_schedule(config.schedule, lr=config.optimizer.lr, updates=total)
    micro = None if config.train.micro_tokens == "auto" else config.train.micro_tokens
    packing, side = config.data.packing, config.data.padding_side
    layout = choose_layout(model.info, packing=packing, micro_tokens=micro, padding_side=side)
    batches, update = update_batches(prepared.train, plan, 1, layout), build_update(config, 1, lr=0.0)
    first = first_gradient(backend.trainer(model, objective="sft", optimizer=Method("sgd")), batches, update)
    trainer, losses = backend.trainer(model, objective="sft", optimizer=method), []
    for step in range(1, updates + 1):
        batches = update_batches(prepared.train, plan, step, layout)
        losses.append(trainer.step(batches, build_update(config, step, lr=schedule(step))).result().loss)
    return Trace(tuple(losses), first, as_arrays(dict(model.tensors("adapter"))), greedy_texts(model, prepared))


def first_gradient(trainer: Trainer, batches: list[Batch], update: Update) -> dict[str, np.ndarray]:
    """Return the (clipped) gradient, which is SGD's momentum behind its first update; at rate 0 nothing moves."""
    trainer.step(batches, replace(update, weight_decay=0.0)).result()
    return as_arrays({name.removeprefix("m."): tensor for name, tensor in trainer.state()})


def as_arrays(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Return float64 arrays by name."""
    return {name: to_float32(tensor).astype(np.float64) for name, tensor in tensors.items()}


def greedy_texts(model: Model, prepared: Prepared) -> tuple[str, ...]:
    """Return greedy continuations of the first rows' prompts."""
    tokenizer = prepared.tokenizer
    sampling = Sampling(GREEDY_TOKENS, 0.0, 0, end_tokens(prepared.base.path, tokenizer_eos=tokenizer.eos))
    texts = []
    for example in prepared.train[:PROMPTS]:
        length = max(int(np.argmax(example.supervised)), 1)
        tokens = [t.token for t in model.generate([example.tokens[:length].tolist()], sampling) if not t.stopped]
        texts.append(tokenizer.decode(tokens))
    return tuple(texts)


def compare(model: str, names: tuple[str, str], one: Trace, two: Trace) -> ParityResult:
    """Return the gaps between two traces."""
    curve = [relative(a, b) for a, b in zip(one.losses, two.losses, strict=True)]
    gaps = [
        Gap("first loss", curve[0], BOUNDS["first loss"], "relative"),
        Gap(
            "gradients",
            tensor_gap(one.first_gradient, two.first_gradient),
            BOUNDS["gradients"],
            "relative to the largest",
        ),
        Gap("loss curve", max(curve), BOUNDS["loss curve"], f"relative, worst of {len(curve)} updates"),
        Gap(
            "final adapter",
            norm_gap(one.adapter, two.adapter),
            BOUNDS["final adapter"],
            "norm of the difference, relative",
        ),
        Gap("greedy text", float(one.texts != two.texts), 0.0, f"{len(one.texts)} prompts, {GREEDY_TOKENS} tokens"),
    ]
    texts = tuple(zip(one.texts, two.texts, strict=True))
    return ParityResult(model, names, tuple(gaps), (one.losses, two.losses), texts)


def relative(a: float, b: float) -> float:
    """Return |a - b| / |b|."""
    return abs(a - b) / max(abs(b), 1e-30)


def tensor_gap(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> float:
    """Return the largest difference of any element, relative to the largest element of all."""
    if one.keys() != two.keys():
        return float("inf")
    largest = max(float(np.abs(array).max()) for array in two.values())
    return max(float(np.abs(one[name] - two[name]).max()) for name in two) / max(largest, 1e-30)


def norm_gap(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> float:
    """Return |one - two| / |two| over all tensors: Adam may flip single elements whose gradient is rounding."""
    if one.keys() != two.keys():
        return float("inf")
    squares = [(float(np.square(one[name] - two[name]).sum()), float(np.square(two[name]).sum())) for name in two]
    return (sum(a for a, _ in squares) / max(sum(b for _, b in squares), 1e-30)) ** 0.5
