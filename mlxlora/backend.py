"""The MLX backend's front: what this machine can do, and how a folder becomes a model."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from shared.errors import CapabilityError
from shared.importing import collector_paused, defer_front, versions_of
from shared.strict import check_recompute
from shared.threads import keep_memory, wait_politely
from shared.types import Capability, Method, Packed, Recompute, Scheme, Shapes, Tensor

if TYPE_CHECKING:
    from mlxlora.model import MLXModel
    from mlxlora.trainer import MLXTrainer

NEEDS = ("mlx", "mlx_lm")
INSTALL = 'pip install "mlxlora" (Mac with Apple silicon), "mlxlora[mlx-cpu]" (Linux)'
OWN_BLAS = "MLXLORA_OWN_BLAS"  # set to 1: leave MLX its own BLAS on Linux


def create() -> MLXBackend:
    """Return the backend; imports MLX only when something is loaded."""
    return MLXBackend()


class MLXBackend:
    """MLX with mlx-lm's models, on Metal, CUDA or CPU."""

    name = "mlx"
    needs = NEEDS

    def probe(self) -> Capability:
        """Return what this machine can do with it, or why nothing."""
        missing = [package for package in NEEDS if importlib.util.find_spec(package) is None]
        if missing:
            return capability(device="none", reason=f"{missing[0]} is not installed", fix=INSTALL)
        return probe_device()

    def load_model(
        self, folder: Path, *, dtype: str, quantization: Scheme | None, recompute: Recompute, device: str | None
    ) -> MLXModel:
        """Return the base of a folder; quantization applies where the folder is not quantized already."""
        check_recompute(recompute, place="MLX", cuda=False)
        choose_device(device)
        defer_front("mlx_lm")  # it imports transformers and torch, which no model of it needs: 2 s
        with collector_paused():
            from mlxlora.loading import load_model

        return load_model(folder, dtype=dtype, quantization=quantization, recompute=bool(recompute))

    def trainer(self, model: MLXModel, *, objective: str, optimizer: Method, shapes: Shapes = ()) -> MLXTrainer:
        """Return a trainer for what `model.attach` made trainable; micro-batches of `shapes` run compiled."""
        from mlxlora.trainer import MLXTrainer

        return MLXTrainer(model, objective=objective, optimizer=optimizer, shapes=shapes)

    def decode(self, packed: Packed) -> Tensor:
        """Return a quantized weight as our kernels decode it."""
        lend_blas()
        from mlxlora.quantized import decode_packed

        return decode_packed(packed)

    def input_gradient(self, packed: Packed, grad: np.ndarray) -> np.ndarray:
        """Return the gradient (N, I) that a layer over a packed weight gives its input for (N, O) of its output."""
        lend_blas()
        from mlxlora.quantized import input_gradient

        return input_gradient(packed, grad)

    def dropout_mask(
        self, *, seed: int, step: int, name: str, slots: Sequence[int], shape: tuple[int, int], p: float
    ) -> np.ndarray:
        """Return (B, T, D) bool as the adapter layers use it."""
        lend_blas()
        from mlxlora.adapters import Dropout

        dropout = Dropout(p=p)
        places = (np.asarray(slots)[:, None], np.arange(shape[0])[None])
        dropout.begin(seed=seed, step=step, places=places)
        return np.array(dropout.mask(name, width=shape[1]))

    def workload(self, kind: str, *, size: int, dtype: str, device: str | None) -> Callable[[int], None]:
        """Return a function that does a "matmul" or a "copy" so many times and waits."""
        choose_device(device)
        from mlxlora.workloads import WORKLOADS

        return WORKLOADS[kind](size, dtype)

    def trace(self, folder: Path) -> AbstractContextManager[None]:
        """Return a context that writes trace.gputrace for Xcode; raises CapabilityError without Metal."""
        import mlx.core as mx

        if not mx.metal.is_available() or os.environ.get("MTL_CAPTURE_ENABLED") != "1":
            raise CapabilityError(
                "log.profile: MLX traces nothing but Metal, and there with MTL_CAPTURE_ENABLED=1 only",
                code="E402",
                fix="set it on a Mac, use --backend torch, or time the parts of an update: python benchmarks/step.py",
            )
        return traced(folder / "trace.gputrace")


@contextmanager
def traced(file: Path) -> Iterator[None]:
    """Write what Metal does inside."""
    import mlx.core as mx

    mx.metal.start_capture(str(file))
    try:
        yield
    finally:
        mx.metal.stop_capture()


@lru_cache(maxsize=1)
def probe_device() -> Capability:
    """Return the capability with the device MLX finds."""
    lent = lend_blas()
    try:
        import mlx.core as mx
    except ImportError as error:
        return capability(device="none", reason=f"mlx cannot be imported: {error}", fix=INSTALL)
    from mlxlora.decoders import DECODERS

    if mx.default_device().type == mx.DeviceType.gpu:
        kind = "Metal" if mx.metal.is_available() else "CUDA"
        reason = f"{kind}, {mx.device_info().get('device_name', 'GPU')}"
        return capability(device="gpu", reason=reason, fix=None, schemes=DECODERS)
    blas = "matmul by torch's BLAS" if lent else "matmul by MLX's own BLAS"
    return capability(device="cpu", reason=f"CPU ({blas})", fix=None, schemes=DECODERS)


@lru_cache(maxsize=1)
def lend_blas() -> bool:
    """Let MLX use the BLAS in torch's library on Linux x86-64, and return whether it does.

    MLX's Linux wheel brings reference BLAS and looks its symbols up globally; fp32 matmul is 10 to 25 times
    faster with torch's. Must run before MLX is imported. Only the library is loaded, not the torch package.
    """
    wanted = sys.platform == "linux" and platform.machine() == "x86_64" and os.environ.get(OWN_BLAS) != "1"
    torch = importlib.util.find_spec("torch") if wanted and "mlx.core" not in sys.modules else None
    if torch is None or torch.origin is None:
        return False
    wait_politely()
    keep_memory()
    try:
        ctypes.CDLL(str(Path(torch.origin).parent / "lib" / "libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def capability(*, device: str, reason: str, fix: str | None, schemes: Iterable[str] = ()) -> Capability:
    """Return a capability record with the versions that are installed."""
    return Capability(
        name="mlx",
        available=device != "none",
        reason=reason,
        fix=fix,
        device=device,
        dtypes=("float32", "bfloat16", "float16"),
        schemes=tuple(schemes),
        objectives=("sft",),
        versions=versions_of(("mlx", "mlx-lm", "transformers")),
    )


def choose_device(device: str | None) -> str:
    """Set and return "gpu" or "cpu"; raises CapabilityError where a GPU is asked for and none is there."""
    found = probe_device().device
    import mlx.core as mx

    if device == "gpu" and found != "gpu":
        raise CapabilityError("device: gpu, but MLX finds neither Metal nor CUDA", code="E402", fix="set device: auto")
    if device == "cpu":
        mx.set_default_device(mx.Device(mx.DeviceType.cpu))
        return "cpu"
    return found
