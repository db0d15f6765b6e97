"""safetensors shards written as a stream: no more than a few rows of one tensor are in memory at a time."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shared.durable import write_json
from shared.tensors import NUMPY, read_header
from shared.types import Tensor

BLOCK_VALUES = 2**18  # values of a tensor handled at once: 1 MB in float32, which stays in a core's cache
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: its rows come in blocks when its turn comes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[Tensor]]

    @property
    def num_bytes(self) -> int:
        """Return the size of its data."""
        return math.prod(self.shape) * np.dtype(NUMPY[self.dtype]).itemsize


def row_blocks(shape: Sequence[int]) -> Iterator[slice]:
    """Yield slices of rows that hold about BLOCK_VALUES values each, two rows or more, but for a rest.

    >>> list(row_blocks((5, 2**20)))
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    rows, width = (shape[0], math.prod(shape[1:])) if len(shape) else (1, 1)
    step = max(BLOCK_VALUES // max(width, 1), 2)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def write_shard(path: Path, planned: Sequence[Planned], *, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, wide types first so that every tensor is aligned, then by name."""
    ordered = sorted(planned, key=lambda item: (-np.dtype(NUMPY[item.dtype]).itemsize, item.name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    for item in ordered:
        header[item.name] = {
            "dtype": item.dtype, "shape": list(item.shape), "data_offsets": [at, at + item.num_bytes],
        }  # fmt: skip
        at += item.num_bytes
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for item in ordered:
            start = file.tell()
            for block in item.blocks():
                file.write(np.ascontiguousarray(block.data).data)
            if file.tell() - start != item.num_bytes:
                raise AssertionError(f"{item.name}: {file.tell() - start} bytes written, {item.num_bytes} planned")


def rewrite_shard(source: Path, target: Path, changed: Mapping[str, Callable[[], Iterable[Tensor]]]) -> None:
    """Copy a shard byte by byte, then replace tensors in the copy by others of the same size."""
    shutil.copyfile(source, target)
    entries = read_header(source)
    with target.open("r+b") as file:
        for name, blocks in changed.items():
            file.seek(entries[name].start)
            for block in blocks():
                file.write(np.ascontiguousarray(block.data).data)
            if file.tell() != entries[name].end:
                raise AssertionError(f"{name}: {file.tell()} is not the end, {entries[name].end}")


def write_shards(folder: Path, planned: Mapping[Path, Sequence[Planned]], *, metadata: Mapping[str, str]) -> None:
    """Write planned tensors into shards named as the source's, and the index where there are several."""
    kept = {file: items for file, items in planned.items() if items}
    names = [SINGLE] if len(kept) == 1 else [file.name for file in kept]
    weight_map: dict[str, str] = {}
    for name, items in zip(names, kept.values(), strict=True):
        write_shard(folder / name, items, metadata=metadata)
        weight_map.update((item.name, name) for item in items)
    if len(names) > 1:
        total = sum(item.num_bytes for items in kept.values() for item in items)
        write_index(folder, weight_map, total=total)


def write_index(folder: Path, weight_map: Mapping[str, str], *, total: int) -> None:
    """Write the index that says which shard holds which tensor; total: bytes of all."""
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX, index)
