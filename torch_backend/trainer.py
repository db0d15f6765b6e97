"""One optimizer update on PyTorch: sum over micro-batches, divide once, clip, update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from shared import faults
from shared.errors import CheckpointError, OutOfMemory, is_out_of_memory
from shared.types import Batch, Memory, Method, Shapes, Tensor, Update
from torch_backend.compiling import compile_layers
from torch_backend.memory import read_memory
from torch_backend.model import TorchModel
from torch_backend.objectives import OBJECTIVES
from torch_backend.optim import Optimizer, PendingStats
from torch_backend.state import from_torch, to_torch


class TorchTrainer:
    """One model, one objective, one optimizer."""

    def __init__(self, model: TorchModel, *, objective: str, optimizer: Method, shapes: Shapes = ()) -> None:
        self.model, self.objective = model, OBJECTIVES[objective]
        self.optimizer = Optimizer(model.parameters, method=optimizer)
        if shapes:
            compile_layers(model, shapes)

    def step(self, micro: Sequence[Batch], update: Update) -> PendingStats:
        """Do exactly one update; on OutOfMemory nothing has changed."""
        weight = float(sum(batch.weights_N.sum(dtype="float64") for batch in micro))
        scale = self.optimizer.scale
        factor, divisor = (1.0, weight) if scale is None else (scale / weight, scale)  # float16: mean loss times scale
        try:
            total = torch.stack([self.accumulate(batch, update, factor) for batch in micro]).sum()
            return self.optimizer.step(update, loss=total, weight=divisor)
        except (RuntimeError, MemoryError) as error:
            self.optimizer.grad.zero_()
            if is_out_of_memory(error):
                raise OutOfMemory(f"torch has no memory left: {str(error)[:200]}") from None
            raise

    def accumulate(self, batch: Batch, update: Update, factor: float | torch.Tensor) -> torch.Tensor:
        """Add the gradient of factor times one micro-batch's summed loss to the flat one; return that loss."""
        faults.hit("micro.begin")
        model = self.model
        targets_N = model.put(batch.targets_N, torch.long)
        weights_N = model.put(batch.weights_N, torch.float32) * factor
        model.dropout.begin(seed=update.seed, step=update.step, places=batch.places(), device=model.device)
        try:
            loss = self.objective(model.hidden(batch), model.head, targets_N, weights_N)
            parameters = list(self.optimizer.parameters.values())
            grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        finally:
            model.dropout.end()
        pairs = zip(self.optimizer.views(self.optimizer.grad), grads, strict=True)
        reached = [(view, grad) for view, grad in pairs if grad is not None]
        if reached:
            views, grads = zip(*reached, strict=True)
            torch.ops.aten._foreach_add_.List(views, grads)
        return loss.detach()

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the optimizer's tensors."""
        return ((name, from_torch(value)) for name, value in self.optimizer.tensors())

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the optimizer's tensors; strict."""
        own = dict(self.optimizer.tensors())
        if own.keys() != tensors.keys() or any(tuple(own[name].shape) != tensors[name].shape for name in own):
            raise CheckpointError(
                "the optimizer state is of another model or adapter", code="E322", fix="resume with the same config"
            )
        for name, value in own.items():
            value.copy_(to_torch(tensors[name]))

    def memory(self) -> Memory:
        """Return bytes active, at the highest, and at most."""
        return read_memory(self.model.device)
