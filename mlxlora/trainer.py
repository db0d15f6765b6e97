"""One optimizer update on MLX: sum over micro-batches, divide once, clip, update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import mlx.core as mx
from mlx.nn.utils import value_and_grad
from mlx.utils import tree_map

from mlxlora.compiling import Arrays, CompiledStep
from mlxlora.memory import read_memory
from mlxlora.model import MLXModel, flatten
from mlxlora.objectives import OBJECTIVES
from mlxlora.optim import Optimizer, PendingStats
from mlxlora.state import from_mlx, to_mlx
from shared import faults
from shared.adapters.spec import layer_of
from shared.errors import CheckpointError, OutOfMemory, is_out_of_memory
from shared.types import Batch, Memory, Method, Shapes, Tensor, Update


class MLXTrainer:
    """One model, one objective, one optimizer."""

    def __init__(self, model: MLXModel, *, objective: str, optimizer: Method, shapes: Shapes = ()) -> None:
        self.model, self.objective = model, OBJECTIVES[objective]
        self.optimizer = Optimizer(model.parameters, method=optimizer)
        self.loss_and_grad = value_and_grad(model.zoo, self.loss)
        self.shapes, self.compiled = frozenset(shapes), CompiledStep(model, self.loss_and_grad) if shapes else None

    def step(self, micro: Sequence[Batch], update: Update) -> PendingStats:
        """Do exactly one update; on OutOfMemory nothing has changed."""
        weight = float(sum(batch.weights_N.sum(dtype="float64") for batch in micro))
        scale = self.optimizer.scale
        factor, divisor = (1.0, weight) if scale is None else (scale / weight, scale)  # float16: mean loss times scale
        try:
            total, grads = self.sums(micro, update, factor)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise OutOfMemory(f"MLX has no memory left: {str(error)[:200]}") from None
            raise
        found = self.optimizer.step(
            self.model.parameters, grads, update, loss=total, weight=divisor, put=self.model.put_parameters
        )
        mx.async_eval(self.optimizer.arrays())
        return found

    def sums(self, micro: Sequence[Batch], update: Update, factor: float | mx.array) -> tuple[mx.array, Arrays]:
        """Return the micro-batches' summed loss, and the gradient of that by canonical name; both are there."""
        total, sums = mx.zeros(()), None
        for batch in micro:
            loss, grads = self.accumulate(batch, update, factor)
            self.compute(loss, grads)  # frees the graph before the next one, or the optimizer's, is built
            total = total + loss
            sums = grads if sums is None else tree_map(mx.add, sums, grads)
            mx.async_eval(total, sums)  # behind the gradients: summed in one go with them MLX keeps more layers' work
        mx.eval(total, sums)  # what fails, fails here
        return total, {self.model.canonical(name): grad for name, grad in flatten(sums)}

    def compute(self, loss: mx.array, grads: dict) -> None:
        """Have a micro-batch computed; with recompute from the last layer to the first, each done with in its turn.

        In one go MLX leaves gradients of upper layers for later and keeps what was computed again for them.
        """
        if self.model.recomputes:
            named = flatten(grads)
            for layer in sorted({layer_of(name) or 0 for name, _ in named}, reverse=True):
                mx.eval(loss, [grad for name, grad in named if (layer_of(name) or 0) == layer])
        mx.eval(loss, grads)

    def accumulate(self, batch: Batch, update: Update, factor: float | mx.array) -> tuple[mx.array, dict]:
        """Return factor times one micro-batch's summed loss, and the gradient of that."""
        faults.hit("micro.begin")
        dropout = self.model.dropout
        dropout.begin(seed=update.seed, step=update.step, places=batch.places())
        names = ["tokens_BT", "positions_N", "targets_N", "weights_N", *["pads_B"] * (batch.padding_side == "left")]
        arrays = {name: mx.array(getattr(batch, name)) for name in names}
        arrays["weights_N"] = arrays["weights_N"] * factor
        try:
            if self.compiled and batch.shape in self.shapes and not batch.is_packed:
                loss, grads = self.compiled(arrays)
            else:
                loss, grads = self.loss_and_grad(arrays, packed=batch.lengths_S.tolist() if batch.is_packed else ())
        finally:
            dropout.end()
        return loss, tree_map(lambda grad: grad.astype(mx.float32), grads)  # sums over micro-batches stay exact

    def loss(self, arrays: Arrays, *, packed: Sequence[int] = ()) -> mx.array:
        """Return the summed loss of a micro-batch, differentiable in the trained tensors."""
        model, targets_N, weights_N = self.model, arrays["targets_N"], arrays["weights_N"]
        h_ND = model.hidden_at(arrays["tokens_BT"], arrays["positions_N"], packed=packed, pads_B=arrays.get("pads_B"))
        return self.objective(h_ND, model.head, targets_N, weights_N, train_head=model.trains_head)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the optimizer's tensors."""
        return ((name, from_mlx(value)) for name, value in self.optimizer.tensors())

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the optimizer's tensors; strict."""
        own = dict(self.optimizer.tensors())
        if own.keys() != tensors.keys() or any(tuple(own[name].shape) != tensors[name].shape for name in own):
            raise CheckpointError(
                "the optimizer state is of another model or adapter", code="E322", fix="resume with the same config"
            )
        for name in own:
            self.optimizer.put(name, to_mlx(tensors[name]))

    def memory(self) -> Memory:
        """Return bytes active, at the highest, and at most."""
        return read_memory()
