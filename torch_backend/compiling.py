"""Compiled micro-batches: decoder layers as functions of `torch.compile`, one per shape.

Layers that differ in nothing but their weights share functions; the first, whose input has no gradient, has its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from shutil import which
from types import MethodType
from typing import Any

import torch

from shared.errors import CapabilityError
from shared.types import Shapes
from torch_backend.decoders import has_triton
from torch_backend.model import TorchModel, set_recompute


def check_compile(model: TorchModel) -> None:
    """Raise CapabilityError where torch's compiler has nothing to compile with, or would do harm."""
    if (
        model.dropout.p > 0
    ):  # a mask is made by its layer's name: 77 functions instead of 2 for one shape, benchmarks/LOG.md
        raise CapabilityError(
            "train.compile: true with adapter.dropout: on PyTorch no two layers could share a compiled function",
            fix="set adapter.dropout: 0, or train.compile: auto, or backend: mlx",
        )
    if model.device.type == "cuda" and not has_triton():
        raise CapabilityError(
            "train.compile: true, but torch.compile needs triton on CUDA, which is not installed",
            fix="pip install triton, or set train.compile: auto",
        )
    if model.device.type == "cpu" and not (which(os.environ.get("CXX", "g++")) or which("clang++")):
        raise CapabilityError(
            "train.compile: true, but torch.compile needs a C++ compiler, and none is installed",
            fix="install g++, or set train.compile: auto",
        )


def compile_layers(model: TorchModel, shapes: Shapes) -> None:
    """Have every decoder layer run compiled for micro-batches of these shapes."""
    check_compile(model)
    model.shapes = frozenset(shapes)
    layers: Any = model.decoder.layers
    limits: Any = torch._dynamo.config
    most = len(model.shapes) * len(layers)  # beyond its own limit torch would say so and run the layer plain
    limits.recompile_limit = max(limits.recompile_limit, most)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, most)
    for layer in layers:
        plain = MethodType(type(layer).forward, layer)  # what recompute put in front comes back in front
        layer.forward = partial(run_layer, model, plain, torch.compile(plain, dynamic=False))
    set_recompute(layers, model.recompute, device=model.device)


def run_layer(model: TorchModel, plain: Callable, compiled: Callable, *args: Any, **kwargs: Any) -> Any:
    """Call a layer, compiled where gradients are wanted of a micro-batch of one of the shapes."""
    return (compiled if model.runs_compiled and torch.is_grad_enabled() else plain)(*args, **kwargs)
