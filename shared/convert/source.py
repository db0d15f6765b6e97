"""A model folder read as plain weights, block of rows by block of rows, however it is stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from shared.convert.shards import row_blocks
from shared.folder import PACKED_LEAVES, ModelFolder
from shared.registry import find_quantizer
from shared.types import Packed, Scheme, Tensor

FLOATS = ("F32", "F16", "BF16")
Rows = Callable[[slice], Tensor]  # a slice of rows -> their values


@dataclass(frozen=True)
class Weight:
    """One tensor of the plain model: what it is called there, its decoded dtype, and the shard that holds it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    names: Mapping[str, str]  # of a quantized one: the codec's name of an array -> the tensor that holds it
    scheme: Scheme | None = None

    @property
    def module(self) -> str:
        """Return the name of the module that owns it."""
        return self.name.rpartition(".")[0]


def plain_weights(folder: ModelFolder) -> dict[str, Weight]:
    """Return every tensor of the model by its plain name, quantized modules as one weight each, in stored order."""
    found: dict[str, Weight] = {}
    held = {name: module for module in folder.schemes for name in place(folder, module).names.values()}
    for name, entry in folder.entries.items():
        if name not in held:
            found[name] = Weight(name, entry.dtype, entry.shape, entry.file, {})
        elif f"{held[name]}.weight" not in found:
            found[f"{held[name]}.weight"] = place(folder, held[name])
    return found


def place(folder: ModelFolder, module: str) -> Weight:
    """Return the weight of a module that is stored quantized."""
    scheme, scales = folder.schemes[module], folder.entries[f"{module}.scales"]
    names = {leaf: f"{module}.{leaf}" for leaf in PACKED_LEAVES}
    shape = (scales.shape[0], scales.shape[1] * scheme.group_size)
    return Weight(f"{module}.weight", scales.dtype, shape, scales.file, names, scheme)


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
    """Return whether every array of a packed weight has the weight's rows, so that rows can be taken alone."""
    return all(array.shape[:1] == packed.shape[:1] for array in packed.arrays.values())


def packed_rows(packed: Packed, rows: slice) -> Packed:
    """Return some rows of a packed weight that `is_by_rows`."""
    arrays = {key: Tensor(array.dtype, array.data[rows]) for key, array in packed.arrays.items()}
    count = next(iter(arrays.values())).shape[0]
    return Packed(packed.scheme, arrays, (count, packed.shape[1]))


def blocks(weight: Weight, read: Rows) -> Iterator[Tensor]:
    """Yield all rows of a weight, a block at a time."""
    if not weight.shape:
        yield read(...)  # type: ignore[arg-type]
        return
    for rows in row_blocks(weight.shape):
        yield read(rows)
