"""Compiled micro-batches: loss and gradient as one graph that is traced once per shape, then replayed without Python.

What a micro-batch brings is an input of the graph, dropout's words included; frozen weights are constants of it.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from mlxlora.elementwise import on_gpu
from mlxlora.model import MLXModel
from shared.errors import CapabilityError

Arrays = dict[str, mx.array]
Step = Callable[[Arrays], tuple[mx.array, dict]]


def check_compile(model: MLXModel) -> None:
    """Raise CapabilityError where `mx.compile` does nothing, or would do harm."""
    calls: list[int] = []
    function = mx.compile(lambda x: calls.append(1) or x + 1)
    for _ in range(2):
        function(mx.zeros(1))
    if len(calls) > 1:
        raise CapabilityError(
            "train.compile: true, but mx.compile does nothing here: it finds no C++ compiler, or is switched off",
            fix="install g++, or set train.compile: auto",
        )
    if model.info.quantized and not on_gpu():  # decoded in blocks, each evaluated, and so a constant of the graph
        raise CapabilityError(
            "train.compile: true would keep the decoded weights of a quantized base in memory on a CPU",
            fix="set train.compile: auto",
        )


class CompiledStep:
    """Loss and gradient of micro-batches that all have one of a few shapes; num_traces: of those seen so far."""

    def __init__(self, model: MLXModel, step: Step) -> None:
        check_compile(model)
        self.model, self.step, self.num_traces = model, step, 0
        self.compiled = mx.compile(self.trace)

    def __call__(self, arrays: Arrays) -> tuple[mx.array, dict]:
        """Return what `step` does for the arrays of a micro-batch and the dropout that has begun."""
        parameters, before = self.model.zoo.trainable_parameters(), self.num_traces
        words = self.model.dropout.token_BT
        try:
            return self.compiled(parameters, arrays if words is None else {**arrays, "token_BT": words})
        finally:
            if self.num_traces > before:  # the model holds what stood for its parameters
                self.model.zoo.update(parameters)

    def trace(self, parameters: dict, arrays: Arrays) -> tuple[mx.array, dict]:
        """Return loss and gradient as a function of arrays alone."""
        self.num_traces += 1
        self.model.dropout.token_BT = arrays.get("token_BT")
        self.model.zoo.update(parameters)
        return self.step(arrays)
