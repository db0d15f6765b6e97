"""Experts of a float folder as stacks: quantized at load, as `quantization:` of a recipe asks for, or written so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from shared.errors import CapabilityError
from shared.experts import BLOCK, STACK, STACKED, expert_names, mlx_stack, stack_shapes
from shared.folder import ModelFolder
from shared.protocols import Quantizer
from shared.types import Packed, Scheme, Tensor


def stacks_of(folder: ModelFolder) -> dict[str, tuple[int, int, int]]:
    """Return the shapes (E, O, I) of a folder's stacks of experts, by the names that adapters give them."""
    floats = {name.removesuffix(".weight"): folder.entries[name].shape for name in folder.entries}
    return stack_shapes(
        folder.config, {**floats, **{name: place.stored.shape for name, place in folder.places.items()}}
    )


def pack_experts(folder: ModelFolder, quantizer: Quantizer, layer: str) -> dict[str, Packed] | None:
    """Return the stacks of a layer, e.g. "model.layers.0", by mlx-lm's names; None where they must stay float.

    That is so where a width does not divide into groups, or a format does not quantize each row for itself.
    """
    names = {leaf: expert_names(folder.config, layer, leaf) for leaf in STACKED}
    shapes = {folder.entries[name].shape for stack in names.values() for name in stack}
    if not (quantizer.by_rows and all(quantizer.fits((shape[0], shape[1])) for shape in shapes)):
        return None
    return {leaf: one_below_another([quantizer.quantize(folder.value(name)) for name in names[leaf]]) for leaf in names}


def written_stacks(folder: ModelFolder) -> dict[str, list[str]]:
    """Return the stacks that mlx-lm stores, by its names, with the tensors of a float folder by expert."""
    known = (name.removesuffix(".weight") for name in stacks_of(folder))
    parts = {name: name.rpartition(f".{BLOCK}.experts.") for name in known}
    return {
        mlx_stack(folder.family, name): expert_names(folder.config, layer, leaf)
        for name, (layer, _, leaf) in parts.items()
    }


def check_stacks(modules: Mapping[str, Scheme | None], stacks: Iterable[str], *, why: Mapping[str, str]) -> None:
    """Raise CapabilityError unless all stacks of experts are quantized, or none: mlx-lm reads no mixed folder."""
    floats = [module for module in stacks if modules[module] is None]
    if floats and len(floats) < len(list(stacks)):
        raise CapabilityError(
            f'experts would stay floats ("{floats[0]}": {why.get(floats[0], "asked for")}) beside quantized ones, and '
            "mlx-lm stacks either all of them or none",
            fix=f"a scheme with smaller groups, or --keep '*{STACK}*' for floats",
        )


def one_below_another(parts: list[Packed]) -> Packed:
    """Return weights of one width as one, rows below rows."""
    first = parts[0]
    arrays = {
        key: Tensor(one.dtype, np.concatenate([part.arrays[key].data for part in parts]))
        for key, one in first.arrays.items()
    }
    return Packed(first.scheme, arrays, (sum(part.shape[0] for part in parts), first.shape[1]), first.dtype)
