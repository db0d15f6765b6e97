"""The line between shared code and a backend. No code here: four nouns and their verbs.

Rules, each one a conformance test for every registered backend:
- `Trainer.step` is one whole update: sum over micro-batches, divide once, clip, update or skip.
- Names are Hugging Face parameter names; adapters are PEFT's A (r, in) and B (out, r).
- No numeric default lives below `shared/config.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from shared.types import (
    AdapterSpec,
    Batch,
    Capability,
    Memory,
    Method,
    ModelInfo,
    Packed,
    Part,
    Recompute,
    Sampling,
    Scheme,
    Shapes,
    StepStats,
    Tensor,
    Token,
    Update,
)

T_co = TypeVar("T_co", covariant=True)


class Pending(Protocol[T_co]):
    """A result that may still be in the making; `result` waits for it."""

    def result(self) -> T_co: ...


class Model(Protocol):
    """A base model with its adapters on one device."""

    @property
    def info(self) -> ModelInfo: ...

    def attach(self, spec: AdapterSpec) -> None:
        """Make adapters of `spec.modules` trainable, their matrices zero, or all parameters for kind "none".

        `spec.saved` become trainable as float32 copies of the base's modules, which hold its values.
        """
        ...

    def log_probs(self, batch: Batch) -> np.ndarray:
        """Return (N,) float32 log-probabilities in nats of the targets; no gradients, no dropout."""
        ...

    def tensors(self, part: Part) -> Iterator[tuple[str, Tensor]]:
        """Yield the base's or the trained tensors under canonical names, weights (out, in)."""
        ...

    def magnitudes(self) -> Mapping[str, Tensor]:
        """Return the norms that DoRA's magnitudes start from, under the names of those; empty for other adapters."""
        ...

    def load_tensors(self, part: Part, tensors: Mapping[str, Tensor]) -> None:
        """Replace them; strict: every name and shape is accounted for, or AdapterError."""
        ...

    def rows(self, *, width: int) -> Rows:
        """Return room for so many sequences side by side; only where `info.can_batch` for more than one at a time."""
        ...

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, ended: Collection[int] = (),
        rows: Rows | None = None,
    ) -> Iterator[Token]:  # fmt: skip
        """Yield tokens as they are made, those of up to `sampling.batch_size` prompts in turns.

        ended: prompts by number that get no more tokens; the reader may add to it while reading. rows: of width 1, kept
        by the caller from one call to the next; what a prompt begins with of the last sequence is not computed again.
        """
        ...


class Rows(Protocol):
    """Sequences that go on side by side, their keys and values kept, in the order in which they were added.

    Of width 1 it has one at a time, and the next goes on from what it begins with of the last. They are those of the
    adapter as it was: after a change of it begin anew.
    """

    def add(self, tokens: Sequence[int]) -> np.ndarray:
        """Begin one more sequence; return (V,) float32 logits of what follows it."""
        ...

    def step(self, tokens: Sequence[int]) -> np.ndarray:
        """Put one token behind every sequence; return (B, V) float32 logits of what follows."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Forget all sequences but these, by ascending place."""
        ...


class Trainer(Protocol):
    """One model, one objective, one optimizer."""

    def step(self, micro: Sequence[Batch], update: Update) -> Pending[StepStats]:
        """Do exactly one optimizer update from all micro-batches; OutOfMemory leaves no trace."""
        ...

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the optimizer's tensors: what its rule keeps, as `m.<name>`, and `master.<name>` where kept.

        In 8 bits `m.<name>` and `v.<name>` are codes (U8), `m_absmax.<name>` and `v_absmax.<name>` the scales of their
        blocks (F32), as in shared/quant/blockwise.py.
        """
        ...

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace them; strict."""
        ...

    def memory(self) -> Memory: ...


class Quantizer(Protocol):
    """One storage format; the NumPy codec is the specification."""

    @property
    def scheme(self) -> Scheme: ...

    @property
    def by_rows(self) -> bool:
        """Return whether blocks of two rows or more are packed to the same bytes as the whole."""
        ...

    def fits(self, shape: tuple[int, int]) -> bool:
        """Return whether a weight (out, in) can be stored so."""
        ...

    def num_bytes(self, shape: tuple[int, int], *, scale_bytes: int) -> int:
        """Return the bytes of the arrays of a weight (out, in); scale_bytes: of a value of the weight as given."""
        ...

    def quantize(self, weight: Tensor) -> Packed: ...

    def dequantize(self, packed: Packed) -> Tensor: ...


class Backend(Protocol):
    """A framework: "mlx" or "torch"."""

    @property
    def name(self) -> str: ...

    @property
    def needs(self) -> tuple[str, ...]:
        """Return the names of the packages it imports."""
        ...

    def probe(self) -> Capability: ...

    def load_model(
        self, folder: Path, *, dtype: str, quantization: Scheme | None, recompute: Recompute, device: str | None
    ) -> Model:
        """Return the base of a folder, quantized at load where asked; raises ModelError.

        Raises CapabilityError for recompute "offload" where no second memory is.
        """
        ...

    def trainer(self, model: Model, *, objective: str, optimizer: Method, shapes: Shapes = ()) -> Trainer:
        """Return a trainer; shapes: of the micro-batches that it computes by compiled functions.

        Raises CapabilityError for shapes where nothing can be compiled.
        """
        ...

    def decode(self, packed: Packed) -> Tensor:
        """Return the weight a packed array stands for, as this backend's kernels see it."""
        ...

    def input_gradient(self, packed: Packed, grad: np.ndarray) -> np.ndarray:
        """Return the gradient (N, I) that a layer over a packed weight gives its input for (N, O) of its output."""
        ...

    def dropout_mask(
        self, *, seed: int, step: int, name: str, slots: Sequence[int], shape: tuple[int, int], p: float
    ) -> np.ndarray:
        """Return (B, T, D) bool as the adapter layers use it, B = len(slots), shape = (T, D)."""
        ...

    def workload(self, kind: str, *, size: int, dtype: str, device: str | None) -> Callable[[int], None]:
        """Return a function that does a workload n times and waits: what `shared/measuring/ceilings.py` times.

        kind: "matmul" of two (size, size) matrices, or "copy" of size bytes.
        """
        ...

    def trace(self, folder: Path) -> AbstractContextManager[None]:
        """Return a context that writes what the framework's profiler sees inside into a folder.

        Raises CapabilityError where the framework has no profiler for its device.
        """
        ...
