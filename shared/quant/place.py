"""Where a model folder keeps one quantized weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from shared.types import Packed, Stored, Tensor


@dataclass(frozen=True)
class Form:
    """Arrays in another form than the codec's, there and back."""

    codes: str  # the folder's array that holds what the codec has in "weight"
    read: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]  # the folder's arrays -> the codec's
    write: Callable[[Packed], Mapping[str, Tensor]]  # a packed weight -> the folder's arrays


@dataclass(frozen=True)
class Place:
    """The tensors of a folder that hold one quantized weight, and what they stand for."""

    stored: Stored
    names: Mapping[str, str]  # the codec's name of an array -> the tensor that holds it
    constants: Mapping[str, Tensor] = field(default_factory=dict)  # arrays that are in no tensor of their own
    extra: tuple[str, ...] = ()  # further tensors that belong to the weight and hold none of the arrays
    raw: tuple[str, ...] = ()  # arrays that are bytes, in whatever dtype the folder stores their words
    form: Form | None = None  # where the folder keeps the arrays in another form than the codec's

    @property
    def codes(self) -> str:
        """Return the tensor that holds the codes."""
        return self.names[self.form.codes if self.form else "weight"]
