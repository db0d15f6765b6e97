"""Both zoos take the rotary positions from a config as it is meant, in the old and in the new way of writing them."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from shared.data.batch import make_batch
from shared.registry import find_backend
from tests.tolerances import FIRST_LOSS

LLAMA_3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
ROPES = {
    "theta of transformers": {"rope_theta": 10_000.0, "rope_type": "default"},
    "theta 500,000": {"rope_theta": 500_000.0, "rope_type": "default"},
    "linear": {"rope_theta": 10_000.0, "rope_type": "linear", "factor": 4.0},
    "llama3": {"rope_theta": 500_000.0, "rope_type": "llama3", **LLAMA_3},
}


@pytest.fixture
def write(tiny_model_folder, tmp_path):
    """Return a writer of a model folder with these positions, nested (transformers 5) or flat (before)."""

    def make(family, rope, *, nested):
        folder = shutil.copytree(tiny_model_folder(family), tmp_path / "model")
        config = json.loads((folder / "config.json").read_text())
        del config["rope_parameters"]
        if nested:
            config["rope_parameters"] = rope
        else:
            config["rope_theta"] = rope["rope_theta"]
            if rope["rope_type"] != "default":
                config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


def losses(folder, examples):
    batch = make_batch(examples, range(len(examples)))
    options = {"dtype": "float32", "quantization": None, "recompute": False, "device": "cpu"}
    return [-find_backend(name).load_model(folder, **options).log_probs(batch).mean() for name in ("mlx", "torch")]


def check(folder, make_examples):
    mlx, torch = losses(folder, make_examples([60, 50]))
    np.testing.assert_allclose(mlx, torch, rtol=FIRST_LOSS)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("rope", ROPES)
def test_positions_written_flat_are_the_same_on_both_backends(write, make_examples, family, rope):
    check(write(family, ROPES[rope], nested=False), make_examples)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("rope", ROPES)
def test_positions_written_by_transformers_5_are_the_same_on_both_backends(write, make_examples, family, rope):
    """mlx-lm 0.32.2 passes over rope_parameters in llama and qwen2, so shared.families writes them flat too."""
    check(write(family, ROPES[rope], nested=True), make_examples)
