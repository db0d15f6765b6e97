"""Strict checks of tensors that come from a file, the same for every backend."""

from __future__ import annotations

from collections.abc import Mapping

from shared.errors import AdapterError, CapabilityError, ModelError
from shared.folder import others
from shared.tensors import is_finite
from shared.types import ModelInfo, Recompute, Tensor


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
            raise AdapterError(
                f'adapter tensor "{name}" holds NaN or infinity', code="E311", fix="use an earlier checkpoint"
            )


def check_length(info: ModelInfo, tokens: int, *, what: str) -> None:
    """Raise ModelError for more tokens than this backend's zoo computes rightly."""
    if info.max_tokens is not None and tokens > info.max_tokens:
        raise ModelError(
            f"{what}: {tokens} tokens, but the {info.family} model has a sliding window of {info.max_tokens} tokens, "
            "which mlx-lm does not apply",
            code="E309",
            fix=f"data.max_length: {info.max_tokens} (or fewer tokens to generate), or the torch backend",
        )


def beyond_positions(tokens: int, most: int | None) -> str | None:
    """Return a line about rows of more tokens than a model has positions (of its config), None where they fit."""
    if not isinstance(most, int) or tokens <= most:
        return None
    return f"rows of up to {tokens} tokens, but the model was made for {most}; data.max_length: {most} cuts them"


def check_recompute(recompute: Recompute, *, place: str, cuda: bool) -> None:
    """Raise CapabilityError for offload where activations have no second memory to go to."""
    if recompute == "offload" and not cuda:
        raise CapabilityError(
            f"train.recompute: offload moves activations from a GPU to the host, but {place} has one memory only",
            code="E402",
            expected="the torch backend on a CUDA device",
            fix="train.recompute: true",
        )
