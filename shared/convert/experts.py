"""Experts of a float folder, quantized to stacks as `quantization:` of a recipe asks for."""

from __future__ import annotations

import numpy as np

from shared.experts import STACKED, expert_names, stack_shapes
from shared.folder import ModelFolder
from shared.protocols import Quantizer
from shared.types import Packed, Tensor


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


def one_below_another(parts: list[Packed]) -> Packed:
    """Return weights of one width as one, rows below rows."""
    first = parts[0]
    arrays = {
        key: Tensor(one.dtype, np.concatenate([part.arrays[key].data for part in parts]))
        for key, one in first.arrays.items()
    }
    return Packed(first.scheme, arrays, (sum(part.shape[0] for part in parts), first.shape[1]), first.dtype)
