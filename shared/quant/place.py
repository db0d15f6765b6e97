"""Where a model folder keeps one quantized weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from shared.types import Stored, Tensor


@dataclass(frozen=True)
class Place:
    """The tensors of a folder that hold one quantized weight, and what they stand for."""

    stored: Stored
    names: Mapping[str, str]  # the codec's name of an array -> the tensor that holds it
    constants: Mapping[str, Tensor] = field(default_factory=dict)  # arrays that the folder keeps in another form
    extra: tuple[str, ...] = ()  # further tensors that belong to the weight and hold none of the arrays
    raw: tuple[str, ...] = ()  # arrays that are bytes, in whatever dtype the folder stores their words
    convert: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None  # the codec's arrays of the folder's
