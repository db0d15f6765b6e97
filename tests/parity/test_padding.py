"""Padding in front of rows or behind them gives the same update, on every architecture that takes both."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from mlxlora import attention as on_mlx
from shared.config_file import build_config
from shared.data.batch import Plan, make_batch, update_batches
from shared.data.layout import Layout, choose_layout
from shared.data.shapes import choose_shapes
from shared.errors import CapabilityError
from shared.jobs.train import train
from shared.registry import BACKENDS
from tests import tolerances
from tests.architectures import load, save
from tests.parity.test_batched_generation import WHOLE
from tests.parity.test_packing import LENGTHS, MODELS, OPTIONS, OTHERS, WINDOW, gap, norm_gap, step
from torch_backend import attention as on_torch

MOST = {
    **MODELS, **OTHERS, "window": WINDOW, "glm": ("glm", {"head_dim": 16, "rope_parameters": WHOLE}),
    "olmo3, window": ("olmo3", {"sliding_window": 10}),
}  # fmt: skip
SIX = {"num_hidden_layers": 6}  # for mlx-lm, which wants a layer without a window
FEW = ("llama llama3 rope", "window", "qwen2", "gemma3, window", "glm", "mixtral")
CASES = [
    pytest.param(backend, name, marks=() if name in FEW else pytest.mark.slow)
    for backend in sorted(BACKENDS)
    for name in MOST
    if (backend, MOST[name][0]) != ("mlx", "gemma2")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a factory of model folders, each written once."""
    made = {}

    def get(name, backend):
        family, settings = MOST[name]
        if backend == "mlx" and family in ("gemma3_text", "cohere2", "olmo3"):
            settings = {**settings, **SIX}
        key = name, len(settings)
        if key not in made:
            made[key] = save(tmp_path_factory.mktemp("model"), family, settings)
        return made[key]

    return get


def check(backend, path, right, left, update, **options):
    """Loss and gradient of an update are the same, whichever side its micro-batches are padded on."""
    loss, gradients = step(backend, path, right, update, warm=True, **options)
    found, theirs = step(backend, path, left, update, warm=True, **options)
    assert abs(found - loss) <= tolerances.LAYOUT * abs(loss)
    assert norm_gap(theirs, gradients) <= tolerances.LAYOUT
    assert gap(theirs, gradients) <= tolerances.LAYOUT_ELEMENT


@pytest.mark.parametrize(("backend", "name"), CASES)
def test_padding_in_front_gives_the_update_of_padding_behind(folder, make_examples, make_update, backend, name):
    examples = make_examples(LENGTHS)
    assert load(backend, folder(name, backend)).info.can_pad_left
    batches = [[make_batch(examples, range(len(examples)), padding_side=side)] for side in ("right", "left")]
    check(backend, folder(name, backend), *batches, make_update(max_grad_norm=None))


@pytest.mark.parametrize("backend", sorted(BACKENDS))
@pytest.mark.parametrize("option", ["dropout", "recompute", "quantized", "full"])
def test_padding_in_front_gives_the_same_update_whatever_is_trained(
    folder, make_examples, make_update, backend, option
):
    """In the shapes of compiled updates, run plain: rows without an example beside those with one."""
    examples, plan = make_examples(LENGTHS), Plan(len(LENGTHS), len(LENGTHS), seed=0)
    layout = Layout(64, shapes=choose_shapes(examples, batch_size=4, micro_tokens=64))
    sides = [update_batches(examples, plan, 1, replace(layout, padding_side=side)) for side in ("right", "left")]
    assert any((batch.lengths_S == 0).any() for batch in sides[1])
    check(backend, folder("qwen2", backend), *sides, make_update(max_grad_norm=None), **OPTIONS[option])


@pytest.mark.parametrize("backend", sorted(BACKENDS))
@pytest.mark.parametrize("name", FEW)
def test_what_stands_in_the_padding_is_never_read(folder, make_examples, backend, name):
    model, examples = load(backend, folder(name, backend)), make_examples(LENGTHS)
    batch = make_batch(examples, range(len(examples)), padding_side="left")
    found = model.log_probs(batch)
    in_front_BT = np.arange(batch.tokens_BT.shape[1]) < batch.pads_B[:, None]
    other = replace(batch, tokens_BT=np.where(in_front_BT, 7, batch.tokens_BT))
    assert np.array_equal(model.log_probs(other), found)
    right = model.log_probs(make_batch(examples, range(len(examples))))
    np.testing.assert_allclose(found, right, atol=tolerances.LAYOUT * np.abs(right).max())


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_families_that_take_padding_in_front_are_those_proven_here(backend):
    found = {"mlx": on_mlx.PADDABLE, "torch": on_torch.PADDABLE}[backend]
    assert found == {MOST[case.values[1]][0] for case in CASES if case.values[0] == backend}


def test_a_family_that_is_not_proven_is_refused_by_name(tmp_path):
    info = load("mlx", save(tmp_path / "model", *OTHERS["gemma2, window, soft-cap"])).info
    assert choose_layout(info, packing="none", micro_tokens=None).padding_side == "right"
    with pytest.raises(CapabilityError, match="padding_side: left is not proven exact for gemma2 on this backend"):
        choose_layout(info, packing="auto", micro_tokens=None, padding_side="left")


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_a_run_may_change_the_side_when_it_goes_on(tiny_model_folder, tmp_path, backend):
    random = np.random.default_rng(1)
    texts = ["hello world " * int(n) for n in random.integers(1, 9, 12)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def config(name, side, updates):
        return build_config(
            {
                "model": str(tiny_model_folder()), "backend": backend, "device": "cpu", "output": str(tmp_path / name),
                "data": {"path": str(tmp_path / "train.jsonl"), "packing": "none", "padding_side": side},
                "train": {"batch_size": 4, "updates": updates, "dtype": "float32"}, "log": {"every": 1},
                "schedule": {"name": "constant", "warmup": 0}, "evaluation": {"every": None},
            }
        )  # fmt: skip

    def losses(name):
        return [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    train(config("whole", "right", 6))
    train(config("parts", "right", 3))
    train(config("parts", "left", 6), allow_change=["train.updates"])
    np.testing.assert_allclose(losses("parts"), losses("whole"), rtol=10 * tolerances.LAYOUT)
