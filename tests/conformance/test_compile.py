"""Compiled updates: at most eight functions a run, the same update, the same dropout, the same resume."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from shared.adapters.spec import initial_adapter, resolve
from shared.config import AdapterConfig
from shared.config_file import build_config
from shared.data.batch import Plan, update_batches
from shared.data.layout import Layout
from shared.data.shapes import MOST_SHAPES, choose_shapes
from shared.errors import CapabilityError, ConfigError
from shared.jobs.train import train
from shared.registry import find_backend
from shared.types import Method, Shape
from tests import tolerances
from tests.conformance.test_trainer import norm_gap, values

LENGTHS = [5, 60, 8, 31, 12, 12, 3, 27, 90, 14, 41, 22, 7, 70, 18, 33, 55, 9, 26, 11, 37, 6, 80, 16]
UPDATES = 12
DROPOUT = {"mlx": 0.1, "torch": 0.0}  # refused on PyTorch
QUIET = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's compiler looks at every input
SLOW = [pytest.mark.slow, pytest.mark.timeout(1800), QUIET]  # it takes minutes
BACKENDS = ["mlx", pytest.param("torch", marks=SLOW)]
needs_compiler = pytest.mark.xfail(
    shutil.which("g++") is None, raises=CapabilityError, reason="no C++ compiler", strict=True
)  # fmt: skip


def make_trainer(backend, folder, *, shapes, dropout=0.0):
    """Return a tiny model, ready to train, and its trainer."""
    front = find_backend(backend)
    model = front.load_model(folder, dtype="float32", quantization=None, recompute=False, device="cpu")
    spec = resolve(AdapterConfig(rank=4, dropout=dropout), model.info)
    model.attach(spec)
    model.load_tensors("adapter", initial_adapter(spec, model.info.linears, seed=0))
    return model, front.trainer(model, objective="sft", optimizer=Method("adamw"), shapes=shapes)


def count_traces(trainer):
    """Return how many functions have been traced: by this trainer on MLX, by this process on PyTorch."""
    if hasattr(trainer, "compiled"):
        return trainer.compiled.num_traces
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


@needs_compiler
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_updates_are_the_plain_ones_in_at_most_eight_traces(
    tiny_model_folder, make_examples, make_update, backend
):
    examples, plan = make_examples(LENGTHS), Plan(len(LENGTHS), 6, seed=0)
    shapes = choose_shapes(examples, batch_size=6, micro_tokens=128)
    results = []
    side = "left" if backend == "mlx" else "right"  # padding in front is one more input of the graph there
    for layout in (Layout(128, packed=True), Layout(128, shapes=shapes, padding_side=side)):
        model, trainer = make_trainer(backend, tiny_model_folder(), shapes=layout.shapes, dropout=DROPOUT[backend])
        before = count_traces(trainer) if layout.shapes else 0
        losses, starts = [], values(model.tensors("adapter"))
        for step in range(1, UPDATES + 1):
            micro = update_batches(examples, plan, step, layout)
            losses.append(trainer.step(micro, make_update(step=step)).result().loss)
            if step == 1:
                first = {name: value - starts[name] for name, value in values(model.tensors("adapter")).items()}
        results.append((losses, first))
    bound = tolerances.COMPILED_TORCH if backend == "torch" else tolerances.MICRO
    assert norm_gap(results[1][1], results[0][1]) <= bound
    np.testing.assert_allclose(results[1][0], results[0][0], rtol=bound)
    functions = 2 if backend == "torch" else 1  # of one shape: the first layer, whose input has no gradient, and others
    assert 1 < count_traces(trainer) - before <= functions * len(shapes) <= functions * MOST_SHAPES


@needs_compiler
@pytest.mark.parametrize("backend", BACKENDS)
def test_micro_batches_of_other_shapes_run_plain(tiny_model_folder, make_examples, make_update, backend):
    examples = make_examples(LENGTHS[:4])
    shapes = choose_shapes(examples, batch_size=4, micro_tokens=128)
    _, trainer = make_trainer(backend, tiny_model_folder(), shapes=shapes)
    batches = update_batches(examples, Plan(4, 4, seed=0), 1, Layout(128, packed=True))
    before = count_traces(trainer)
    trainer.step(batches, make_update()).result()
    assert trainer.model.log_probs(batches[0]).size
    assert count_traces(trainer) == before


class StopAfter:
    """A callback that ends a run the hard way."""

    def __init__(self, step):
        self.step = step

    def on_update(self, step):
        if step == self.step:
            raise KeyboardInterrupt


@needs_compiler
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_run_resumes_bit_for_bit(tiny_model_folder, tmp_path, backend):
    random = np.random.default_rng(1)
    texts = ["hello world " * int(n) for n in random.integers(1, 9, 16)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def config(name):
        sections = {
            "model": str(tiny_model_folder()), "data": {"path": str(tmp_path / "train.jsonl")}, "device": "cpu",
            "adapter": {"rank": 4, "dropout": DROPOUT[backend]}, "checkpoint": {"every": 2},
            "evaluation": {"every": None},
            "train": {"updates": 6, "batch_size": 4, "dtype": "float32", "micro_tokens": 64, "compile": True},
        }  # fmt: skip
        return build_config({**sections, "backend": backend, "output": str(tmp_path / name)})

    train(config("whole"))
    with pytest.raises(KeyboardInterrupt):
        train(config("parts"), callbacks=[StopAfter(5)])
    train(config("parts"))
    whole, parts = ((tmp_path / name / "adapter/adapter_model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts


def test_where_nothing_can_be_compiled_it_is_refused_by_name(tiny_model_folder, monkeypatch):
    import mlx.core as mx

    shapes = [Shape(1, 8, 8)]
    mx.disable_compile()
    try:
        with pytest.raises(CapabilityError, match=r"mx\.compile does nothing here"):
            make_trainer("mlx", tiny_model_folder(), shapes=shapes)
    finally:
        mx.enable_compile()
    with pytest.raises(CapabilityError, match="no two layers could share"):
        make_trainer("torch", tiny_model_folder(), shapes=shapes, dropout=0.1)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(CapabilityError, match=r"torch\.compile needs a C\+\+ compiler"):
        make_trainer("torch", tiny_model_folder(), shapes=shapes)


def test_packed_rows_and_compiled_updates_exclude_each_other():
    with pytest.raises(ConfigError, match=r"train\.compile true with data\.packing packed"):
        build_config({"model": "m", "data": {"path": "d", "packing": "packed"}, "train": {"compile": True}})
