"""Models and rows made for measurements are what a real folder and a real data set would be."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from shared.measuring.synthetic import Shape, make_rows, step_flops, write_llama
from shared.registry import BACKENDS, find_backend
from shared.tensors import read_header

SHAPE = Shape(layers=3, hidden=64, intermediate=160, heads=4, kv_heads=2, vocabulary=384, tied=False)
ROWS = {"median": 100, "sigma": 0.6, "longest": 1000, "supervised": 0.35, "vocabulary": 384, "seed": 1}


@pytest.mark.parametrize("name", sorted(BACKENDS))
@pytest.mark.parametrize("tied", [False, True])
def test_a_written_llama_loads_strictly_and_computes(name, tied, tmp_path):
    shape = Shape(**{**vars(SHAPE), "tied": tied})
    folder = write_llama(tmp_path / "llama", shape, positions=128, seed=0)
    model = find_backend(name).load_model(folder, dtype="float32", quantization=None, recompute=False, device="cpu")
    assert (model.info.num_layers, model.info.vocab_size) == (3, 384)
    assert model.info.num_parameters == shape.num_linear
    assert sum(math.prod(entry.shape) for entry in read_header(folder / "model.safetensors").values()) == (
        shape.num_parameters
    )
    values = dict(model.tensors("base"))["model.layers.1.mlp.up_proj.weight"].data
    assert 0.015 < values.std() < 0.025


def test_the_same_seed_writes_the_same_bytes(tmp_path):
    folders = [write_llama(tmp_path / str(n), SHAPE, positions=128, seed=seed) for n, seed in enumerate((4, 4, 5))]
    one, two, other = ((folder / "model.safetensors").read_bytes() for folder in folders)
    assert one == two != other
    assert json.loads((folders[0] / "config.json").read_text())["max_position_embeddings"] == 128


def test_rows_are_chat_like_and_a_function_of_the_seed():
    rows, again, other = make_rows(2000, **ROWS), make_rows(2000, **ROWS), make_rows(2000, **{**ROWS, "seed": 2})
    lengths = np.array([len(row.tokens) for row in rows])
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(rows, again, strict=True))
    assert not np.array_equal(lengths, [len(row.tokens) for row in other])
    assert abs(np.median(lengths) - 100) < 6
    assert abs(np.log(lengths).std() - 0.6) < 0.05
    share = sum(row.supervised.sum() for row in rows) / lengths.sum()
    assert abs(share - 0.35) < 0.02
    assert all(row.supervised.any() and not row.supervised[0] for row in rows)
    assert all(row.tokens.max() < 384 for row in rows)


def test_without_spread_every_row_has_the_median_length():
    rows = make_rows(7, **{**ROWS, "sigma": 0.0})
    assert {len(row.tokens) for row in rows} == {100}


def test_operations_of_an_update_are_those_that_torch_counts(tmp_path):
    """torch counts the whole square of attention, we its causal half; the shape makes attention small."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from shared.data.batch import make_batch
    from shared.loop import build_update
    from shared.measuring.measure import load, recipe

    shape = Shape(layers=8, hidden=128, intermediate=384, heads=4, kv_heads=2, vocabulary=1000, tied=False)
    folder = write_llama(tmp_path / "llama", shape, positions=128, seed=0)
    config = recipe(str(folder), rank=8, quantization="none", dtype="float32", recompute=False, rows=4)
    rows = make_rows(4, **{**ROWS, "median": 16, "sigma": 0.0, "vocabulary": 1000})
    trainer = load(find_backend("torch"), config, rows).trainer

    def product(_sum, left, right, **_):  # shapes; torch counts no in-place operations
        return 2 * math.prod(left) * right[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product}) as counter:
        trainer.step([make_batch(rows, range(4))], build_update(config, 1, lr=1e-4)).result()
    assert step_flops(shape, rows, rank=8) == pytest.approx(counter.get_total_flops(), rel=0.1)
