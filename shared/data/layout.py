"""How examples become micro-batches: packed or padded, and how many positions at once."""

from __future__ import annotations

from dataclasses import dataclass

from shared.errors import CapabilityError
from shared.types import ModelInfo

AUTO_MICRO_TOKENS = 1024


@dataclass(frozen=True)
class Layout:
    """How examples become micro-batches; changes memory and speed, never the result."""

    micro_tokens: int  # positions per micro-batch, at most, unless a single example is longer
    packed: bool = False
    lanes: int = 1  # micro-batches computed at the same time: each gets its share


def choose_layout(info: ModelInfo, *, packing: str, micro_tokens: int | None) -> Layout:
    """Return the layout for a model; micro_tokens None: chosen here. Raises CapabilityError where it cannot pack."""
    if packing == "packed" and not info.can_pack:
        raise CapabilityError(
            f"data.packing: packed is not proven exact for {info.family} on this backend",
            fix="set data.packing: auto (rows sorted by length)",
        )
    if micro_tokens is None:
        micro_tokens = AUTO_MICRO_TOKENS // info.lanes
    return Layout(micro_tokens, packed=info.can_pack and packing != "none", lanes=info.lanes)
