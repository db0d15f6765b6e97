"""Every registered backend runs the same suite; a backend that is registered and missing fails it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from shared.adapters.spec import initial_adapter, resolve
from shared.config import AdapterConfig
from shared.protocols import Backend, Model, Trainer
from shared.registry import BACKENDS, find_backend
from shared.types import AdapterSpec, Method, MomentFormat


@dataclass
class Lab:
    """One backend with a tiny model in it, ready to train."""

    backend: Backend
    model: Model
    trainer: Trainer
    spec: AdapterSpec


GPU = [pytest.param((name, "gpu"), id=f"{name}-gpu", marks=pytest.mark.cuda) for name in sorted(BACKENDS)]


@pytest.fixture(params=[*(pytest.param((name, "cpu"), id=name) for name in sorted(BACKENDS)), *GPU])
def place(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Return each registered backend in turn on a CPU, and with `-m cuda` on a GPU."""
    return request.param


@pytest.fixture
def backend(place: tuple[str, str]) -> Backend:
    """Return the backend of a place."""
    return find_backend(place[0])


@pytest.fixture
def make_lab(backend: Backend, place: tuple[str, str], tiny_model_folder: Callable[..., Path]) -> Callable[..., Lab]:
    """Return a factory of labs: a tiny base, an adapter config, and options of load_model."""

    def make(folder: Path | None = None, *, dtype: str = "float32", recompute: bool = False, quantization: Any = None,
             state: MomentFormat = "float32", optimizer: str = "adamw", seed: int = 0, warm: bool = True,
             **adapter: Any) -> Lab:  # fmt: skip
        model = backend.load_model(
            folder or tiny_model_folder(), dtype=dtype, quantization=quantization, recompute=recompute, device=place[1]
        )
        spec = resolve(AdapterConfig(**adapter), model.info)
        model.attach(spec)
        if spec.kind == "lora":
            tensors = initial_adapter(spec, model.info.linears, seed=seed)
            if warm:  # B different from zero, so that every path carries a gradient
                for name, tensor in initial_adapter(spec, model.info.linears, seed=seed + 1).items():
                    if name.endswith("lora_B"):
                        _out, rank = tensor.shape
                        tensor.data[:] = 0.02 * tensors[name.replace("lora_B", "lora_A")].data[:, :1].T[:, :rank]
                        tensors[name] = tensor
            model.load_tensors("adapter", tensors)
        method = Method(optimizer, state, scales_loss=dtype == "float16")
        return Lab(backend, model, backend.trainer(model, objective="sft", optimizer=method), spec)

    return make
