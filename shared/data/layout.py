"""How examples become micro-batches: packed or padded, and how many positions at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from shared.data.shapes import choose_shapes
from shared.errors import CapabilityError
from shared.types import Example, ModelInfo, PaddingSide, Shape

if TYPE_CHECKING:
    from shared.config import RunConfig  # pydantic, which a plain script on a GPU server may lack

AUTO_MICRO_TOKENS = 1024  # enough rows for fast matmuls on a CPU, few enough for its caches and memory
GPU_MICRO_TOKENS = 4096


@dataclass(frozen=True)
class Layout:
    """How examples become micro-batches; changes memory and speed, never the result."""

    micro_tokens: int  # positions per micro-batch, at most, unless a single example is longer
    packed: bool = False
    shapes: tuple[Shape, ...] = ()  # of an update's micro-batches, each padded up to one of them; none: as it comes
    padding_side: PaddingSide = "right"  # of examples that are not packed


def choose_layout(
    info: ModelInfo, *, packing: str, micro_tokens: int | None, padding_side: PaddingSide = "right"
) -> Layout:
    """Return the layout for a model; raises CapabilityError where it cannot pack, or cannot pad on that side.

    micro_tokens: None: AUTO_MICRO_TOKENS.
    """
    if packing == "packed" and not info.can_pack:
        raise CapabilityError(
            f"data.packing: packed is not proven exact for {info.family} on this backend",
            fix="set data.packing: auto (rows sorted by length)",
        )
    packed = info.can_pack and packing != "none"
    if not packed:
        check_padding(info, padding_side)
    return Layout(micro_tokens or AUTO_MICRO_TOKENS, packed=packed, padding_side=padding_side)


def check_padding(info: ModelInfo, padding_side: PaddingSide) -> None:
    """Raise CapabilityError where a model is not proven to give the same with padding in front of its rows."""
    if padding_side == "left" and not info.can_pad_left:
        raise CapabilityError(
            f"data.padding_side: left is not proven exact for {info.family} on this backend",
            fix="set data.padding_side: right, which gives the same update",
        )


def training_layout(
    config: RunConfig, info: ModelInfo, examples: Sequence[Example], *, micro_tokens: int | None
) -> Layout:
    """Return the layout of a run's updates; where they are to be compiled, with the shapes that hold these rows."""
    packing, side = config.data.packing, config.data.padding_side
    layout = choose_layout(info, packing=packing, micro_tokens=micro_tokens, padding_side=side)
    if config.train.compile is not True:  # auto: packed rows waste nothing, and no measurement speaks against them
        return layout
    check_padding(info, side)
    size = config.train.batch_size
    return replace(layout, shapes=choose_shapes(examples, batch_size=size, micro_tokens=layout.micro_tokens))
