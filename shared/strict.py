"""Strict checks of tensors that come from a file, the same for every backend."""

from __future__ import annotations

from collections.abc import Mapping

from shared.errors import AdapterError
from shared.folder import others
from shared.tensors import is_finite
from shared.types import Tensor


def check_adapter(tensors: Mapping[str, Tensor], *, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise AdapterError unless the tensors are exactly the expected ones, and finite."""
    missing = [name for name in expected if name not in tensors]
    extra = [name for name in tensors if name not in expected]
    if missing or extra:
        what, found = ("lacks", missing) if missing else ("has no place for", extra)
        raise AdapterError(
            f'the adapter does not fit: the model {what} "{found[0]}"{others(found)}',
            fix="use the base it was trained on",
        )
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise AdapterError(f'adapter tensor "{name}" has shape {tensors[name].shape}', expected=f"{shape}")
        if not is_finite(tensors[name]):
            raise AdapterError(f'adapter tensor "{name}" holds NaN or infinity', fix="use an earlier checkpoint")
