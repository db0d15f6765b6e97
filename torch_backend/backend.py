"""The PyTorch backend's front: what this machine can do, and how a folder becomes a model."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from shared.errors import CapabilityError
from shared.importing import collector_paused, versions_of
from shared.strict import check_recompute
from shared.threads import wait_politely
from shared.types import Capability, Method, Packed, Recompute, Scheme, Shapes, Tensor

if TYPE_CHECKING:
    from torch_backend.model import TorchModel
    from torch_backend.trainer import TorchTrainer

NEEDS = ("torch", "transformers", "accelerate")
INSTALL = 'pip install "mlxlora[torch]" (CPU or Mac), "mlxlora[cuda]" (GPU server)'


def create() -> TorchBackend:
    """Return the backend; imports torch only when something is loaded."""
    wait_politely()
    return TorchBackend()


class TorchBackend:
    """PyTorch with transformers' models, on CUDA or CPU."""

    name = "torch"
    needs = NEEDS

    def probe(self) -> Capability:
        """Return what this machine can do with it, or why nothing."""
        missing = [package for package in NEEDS if importlib.util.find_spec(package) is None]
        if missing:
            return capability(device="none", reason=f"{missing[0]} is not installed", fix=INSTALL)
        return probe_device()

    def load_model(
        self, folder: Path, *, dtype: str, quantization: Scheme | None, recompute: Recompute, device: str | None
    ) -> TorchModel:
        """Return the base of a folder; quantization applies where the folder is not quantized already."""
        place = choose_device(device)
        check_recompute(recompute, place="torch on a CPU", cuda=place == "cuda")
        with collector_paused():
            from torch_backend.loading import load_model

        return load_model(folder, dtype=dtype, quantization=quantization, recompute=recompute, device=place)

    def trainer(self, model: TorchModel, *, objective: str, optimizer: Method, shapes: Shapes = ()) -> TorchTrainer:
        """Return a trainer for what `model.attach` made trainable; micro-batches of `shapes` run compiled."""
        from torch_backend.trainer import TorchTrainer

        return TorchTrainer(model, objective=objective, optimizer=optimizer, shapes=shapes)

    def decode(self, packed: Packed) -> Tensor:
        """Return a quantized weight as our kernels decode it."""
        from torch_backend.quantized import decode_packed

        return decode_packed(packed, device=choose_device(None))

    def input_gradient(self, packed: Packed, grad: np.ndarray) -> np.ndarray:
        """Return the gradient (N, I) that a layer over a packed weight gives its input for (N, O) of its output."""
        from torch_backend.quantized import input_gradient

        return input_gradient(packed, grad, device=choose_device(None))

    def dropout_mask(
        self, *, seed: int, step: int, name: str, slots: Sequence[int], shape: tuple[int, int], p: float
    ) -> np.ndarray:
        """Return (B, T, D) bool as the adapter layers use it."""
        from torch_backend.adapters import Dropout

        dropout = Dropout(p=p)
        places = (np.asarray(slots)[:, None], np.arange(shape[0])[None])
        dropout.begin(seed=seed, step=step, places=places, device="cpu")
        return dropout.mask(name, width=shape[1]).numpy()

    def workload(self, kind: str, *, size: int, dtype: str, device: str | None) -> Callable[[int], None]:
        """Return a function that does a "matmul" or a "copy" so many times and waits."""
        from torch_backend.workloads import WORKLOADS

        return WORKLOADS[kind](size, dtype, choose_device(device))

    def trace(self, folder: Path) -> AbstractContextManager[None]:
        """Return a context that writes trace.json for Perfetto: every operator, its time and memory."""
        return traced(folder / "trace.json")


@contextmanager
def traced(file: Path) -> Iterator[None]:
    """Write what torch's profiler sees inside."""
    from torch.profiler import profile

    with profile(profile_memory=True) as found:
        yield
    found.export_chrome_trace(str(file))


@lru_cache(maxsize=1)
def probe_device() -> Capability:
    """Return the capability with the device torch finds."""
    with collector_paused():
        import torch

        from torch_backend.decoders import DECODERS

    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        reason = f"{found.name}, {found.total_memory / 2**30:.0f} GiB"
        return capability(device="gpu", reason=reason, fix=None, schemes=DECODERS)
    reason = f"CPU, threads: {torch.get_num_threads()}, no CUDA device"
    return capability(device="cpu", reason=reason, fix=None, schemes=DECODERS)


def capability(*, device: str, reason: str, fix: str | None, schemes: Iterable[str] = ()) -> Capability:
    """Return a capability record with the versions that are installed."""
    return Capability(
        name="torch",
        available=device != "none",
        reason=reason,
        fix=fix,
        device=device,
        dtypes=("float32", "bfloat16", "float16"),
        schemes=tuple(schemes),
        objectives=("sft",),
        versions=versions_of((*NEEDS, "bitsandbytes", "optimum-quanto")),
    )


def choose_device(device: str | None) -> str:
    """Return "cuda" or "cpu"; raises CapabilityError where a GPU is asked for and none is there."""
    import torch

    able = torch.cuda.is_available()
    if device == "gpu" and not able:
        raise CapabilityError(
            "device: gpu, but torch finds no CUDA device",
            code="E402",
            fix="set device: auto, or install a CUDA build of torch",
        )
    return "cuda" if able and device != "cpu" else "cpu"
