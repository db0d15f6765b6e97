"""Activations in host memory: the same update as without recompute, and the device's copy really goes.

On a CPU the same code copies within its memory, without streams.
"""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch

from shared.adapters.spec import initial_adapter
from shared.data.batch import make_batch
from shared.errors import CapabilityError
from shared.registry import BACKENDS, find_backend
from shared.types import AdapterSpec, Method, Scheme
from torch_backend.loading import load_model
from torch_backend.offload import Shelf, Slot, offload_layers
from torch_backend.trainer import TorchTrainer

CPU = torch.device("cpu")
CUDA = pytest.param("cuda", marks=pytest.mark.cuda)


def trained(folder, batches, update, *, offload, device="cpu", scheme=None):
    """Return losses and trained tensors after three updates with dropout."""
    model = load_model(folder, dtype="float32", quantization=scheme, recompute=False, device=device)
    if offload:
        offload_layers(list(model.decoder.layers), torch.device(device))
    spec = AdapterSpec("lora", rank=4, alpha=8.0, dropout=0.1, modules=tuple(model.info.linears))
    model.attach(spec)
    model.load_tensors("adapter", initial_adapter(spec, model.info.linears, seed=1))
    trainer = TorchTrainer(model, objective="sft", optimizer=Method("adamw"))
    losses = [trainer.step(batches, update(step=step)).result().loss for step in (1, 2, 3)]
    return losses, {name: tensor.data.copy() for name, tensor in model.tensors("adapter")}


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("scheme", [None, Scheme("affine", 4, 64)], ids=str)
def test_three_updates_are_those_of_a_run_that_keeps_everything(
    tiny_model_folder, make_examples, make_update, device, scheme
):
    folder, rows = tiny_model_folder(layers=4), make_examples([9, 9, 14, 14])
    batches = [make_batch(rows[:2], [0, 1]), make_batch(rows[2:], [2, 3])]
    kept, moved = (
        trained(folder, batches, make_update, offload=offload, device=device, scheme=scheme)
        for offload in (False, True)
    )
    assert kept[0] == moved[0]
    assert all(np.array_equal(kept[1][name], moved[1][name]) for name in kept[1])


def test_the_inputs_of_all_layers_but_the_last_two_are_freed_in_the_forward_pass():
    class Watched(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(8, 8)
            self.seen = []

        def forward(self, x):
            self.seen.append(weakref.ref(x))
            return torch.tanh(self.inner(x))

    layers = [Watched() for _ in range(5)]
    offload_layers(layers, CPU)
    h = torch.randn(3, 8, requires_grad=True) * 1.0
    for layer in layers:
        h = layer(h)
    gc.collect()
    assert [layer.seen[0]() is None for layer in layers] == [True, True, True, True, False]
    h.sum().backward()
    assert [len(layer.seen) for layer in layers] == [2] * 5
    assert all(layer.inner.weight.grad is not None for layer in layers)


def test_gradients_reach_what_stands_before_the_first_layer():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(6, 6) for _ in range(3)]
    x = torch.randn(4, 6, requires_grad=True)

    def gradient():
        h = x * 2
        for layer in layers:
            h = torch.tanh(layer(h))
        return torch.autograd.grad(h.square().sum(), [x, *(layer.weight for layer in layers)])

    wanted = gradient()
    offload_layers(layers, CPU)
    assert all(torch.equal(a, b) for a, b in zip(gradient(), wanted, strict=True))


def test_without_gradients_nothing_is_put_away():
    layer = torch.nn.Linear(4, 4)
    offload_layers([layer], CPU)
    with torch.no_grad():
        assert not layer(torch.ones(2, 4)).requires_grad


def test_the_backward_pass_fetches_one_layer_ahead():
    shelf, slots = Shelf(CPU), []
    for n in range(4):
        slots.append(shelf.put(torch.full((2,), float(n)), first=n == 0, last=n == 3))
        assert float(slots[n].take()[0]) == n
    assert [slot.here is None for slot in slots] == [True, True, True, False]
    assert float(slots[3].take()[0]) == 3.0
    assert [slot.here is None for slot in slots] == [True, True, False, False]
    assert float(slots[2].take()[0]) == 2.0
    assert [slot.here is None for slot in slots] == [True, False, True, False]


def test_a_slot_that_is_dropped_before_its_backward_does_no_harm():
    slot = Slot(torch.ones(3), stream=None, before=None)
    slot.leave()
    slot.release()
    slot.fetch()
    del slot
    gc.collect()


@pytest.mark.parametrize("name", sorted(BACKENDS))
def test_offload_without_a_second_memory_is_refused_before_the_folder_is_read(name, tmp_path):
    with pytest.raises(CapabilityError, match="recompute: offload") as caught:
        find_backend(name).load_model(
            tmp_path / "none", dtype="float32", quantization=None, recompute="offload", device="cpu"
        )
    assert caught.value.exit_code == 4
