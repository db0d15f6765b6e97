"""A model folder read as plain weights, block of rows by block of rows, however it is stored."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from shared.adapters.spec import layer_of
from shared.convert.shards import row_blocks
from shared.families import CHECKED
from shared.folder import COMPUTED, ModelFolder, check_tensors
from shared.registry import find_quantizer
from shared.types import Packed, Scheme, Tensor

LAYER = re.compile(r"^model\.layers\.\d+\.")
Choice = slice | np.ndarray  # rows, by range or by number
Rows = Callable[[Choice], Tensor]  # rows -> their values


@dataclass(frozen=True)
class Weight:
    """One tensor of the plain model: what it is called there, its decoded dtype, and the shard that holds it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    scheme: Scheme | None = None

    @property
    def module(self) -> str:
        """Return the name of the module that owns it."""
        return self.name.rpartition(".")[0]


def plain_weights(folder: ModelFolder) -> dict[str, Weight]:
    """Return every tensor of the model by its plain name, quantized modules as one weight each, in stored order."""
    found: dict[str, Weight] = {}
    owners = {name: module for module, place in folder.places.items() for name in (*place.names.values(), *place.extra)}
    for name, entry in folder.entries.items():
        if name not in owners:
            found[name] = Weight(name, entry.dtype, entry.shape, entry.file)
        elif f"{owners[name]}.weight" not in found:
            stored, plain = folder.places[owners[name]].stored, f"{owners[name]}.weight"
            found[plain] = Weight(plain, stored.dtype, stored.shape, entry.file, stored.scheme)
    return found


def check_whole(folder: ModelFolder) -> None:
    """Raise ModelError where a family whose layers are all alike misses a tensor, or has one that no layer has.

    A backend that loads the folder compares it with the built model; what only copies weights has this.
    """
    if folder.family not in CHECKED:
        return
    found = {name: weight.shape for name, weight in plain_weights(folder).items() if not COMPUTED.search(name)}
    layers = sorted({layer for name in found if (layer := layer_of(name)) is not None})
    usual: dict[str, Counter[tuple[int, ...]]] = {}
    for name, shape in found.items():
        if layer_of(name) is not None:
            usual.setdefault(LAYER.sub("", name), Counter())[shape] += 1
    alike = {end: shapes.most_common(1)[0][0] for end, shapes in usual.items()}
    expected = {f"model.layers.{layer}.{end}": shape for layer in layers for end, shape in alike.items()}
    check_tensors(
        folder.path,
        expected={**expected, **ends(folder, found)},
        found=found,
        tied=("lm_head.weight",) if folder.is_tied else (),
    )


def ends(folder: ModelFolder, found: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return embedding, last norm and head as config.json has them."""
    name = "model.embed_tokens.weight"
    rows, width = (*found.get(name, ()), 0, 0)[:2]
    rows, width = folder.config.get("vocab_size", rows), folder.config.get("hidden_size", width)
    return {name: (rows, width), "model.norm.weight": (width,), "lm_head.weight": (rows, width)}


def open_rows(folder: ModelFolder, weight: Weight) -> Rows:
    """Return a reader of a weight's rows, decoded where they are stored quantized.

    Raises ModelError where the weight is not finite.
    """
    if weight.scheme is None:
        stored = folder.value(weight.name)
        return lambda rows: Tensor(stored.dtype, stored.data[rows])
    packed = folder.packed(weight.module, shape=weight.shape)
    quantizer = find_quantizer(weight.scheme)
    if is_by_rows(packed):
        return lambda rows: quantizer.dequantize(packed_rows(packed, rows))
    whole = quantizer.dequantize(packed)
    return lambda rows: Tensor(whole.dtype, whole.data[rows])


def is_by_rows(packed: Packed) -> bool:
    """Return whether every array of a packed weight is a matrix with its rows, so that rows can be taken alone."""
    return all(len(array.shape) == 2 and array.shape[0] == packed.shape[0] for array in packed.arrays.values())


def packed_rows(packed: Packed, rows: Choice) -> Packed:
    """Return some rows of a packed weight that `is_by_rows`."""
    arrays = {key: Tensor(array.dtype, array.data[rows]) for key, array in packed.arrays.items()}
    count = next(iter(arrays.values())).shape[0]
    return replace(packed, arrays=arrays, shape=(count, packed.shape[1]))


def blocks(weight: Weight, read: Rows) -> Iterator[Tensor]:
    """Yield all rows of a weight, a block at a time."""
    if not weight.shape:
        yield read(...)  # type: ignore[arg-type]
        return
    for rows in row_blocks(weight.shape):
        yield read(rows)
