"""How examples become micro-batches: packed or padded, and how many positions at once."""

from __future__ import annotations

from dataclasses import dataclass

from shared.errors import CapabilityError
from shared.types import ModelInfo

AUTO_MICRO_TOKENS = 1024  # enough rows for fast matmuls on a CPU, few enough for its caches and memory
GPU_MICRO_TOKENS = 4096


@dataclass(frozen=True)
class Layout:
    """How examples become micro-batches; changes memory and speed, never the result."""

    micro_tokens: int  # positions per micro-batch, at most, unless a single example is longer
    packed: bool = False


def choose_layout(info: ModelInfo, *, packing: str, micro_tokens: int | None) -> Layout:
    """Return the layout for a model; raises CapabilityError where it cannot pack.

    micro_tokens: None: AUTO_MICRO_TOKENS.
    """
    if packing == "packed" and not info.can_pack:
        raise CapabilityError(
            f"data.packing: packed is not proven exact for {info.family} on this backend",
            fix="set data.packing: auto (rows sorted by length)",
        )
    return Layout(micro_tokens or AUTO_MICRO_TOKENS, packed=info.can_pack and packing != "none")
