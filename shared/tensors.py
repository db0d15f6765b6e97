"""safetensors files, strictly: the header is checked before anything reads a tensor.

Frameworks' own readers accept overlapping tensors, holes and absurd shapes; ours refuses them by name.
Writing goes through the safetensors library (sibling file, then rename).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shared.errors import ModelError
from shared.types import Tensor

MAX_HEADER = 16_000_000
MAX_TENSORS = 100_000
MAX_RANK = 8
MAX_DIMENSION = 2**40
BLOCK = 2**22  # values that are checked at once
FLOATS = ("F32", "F16", "BF16")  # what a weight may be
NUMPY = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "<i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "<u1", "BOOL": "|b1", "F8_E4M3": "|u1", "F8_E5M2": "|u1",
}  # fmt: skip
LIBRARY = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: dtype name, shape, and bytes [start, end) of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    file: Path


def read_header(path: Path) -> dict[str, Entry]:
    """Return the tensors of a safetensors file; raises ModelError for anything but a well-formed one."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 2 <= length <= min(MAX_HEADER, size - 8):
                raise damaged(path, f"a header of {length} bytes in a file of {size}")
            raw = file.read(length)
    except OSError as error:
        raise ModelError(
            f"cannot read {path}: {error.strerror}", code="E301", fix="check the path and its permissions"
        ) from None
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=no_duplicates, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"the header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise damaged(path, "the header is not an object")
    check_header(path, header)
    entries = {name: check_entry(path, name, value, base=8 + length) for name, value in header.items()}
    check_cover(path, entries, base=8 + length, size=size)
    return entries


def check_header(path: Path, header: dict[str, Any]) -> None:
    """Take the metadata out of a header; refuse one that is no map of texts, too many tensors, unprintable names."""
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # MLX writes null where there is none
    texts = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    if not texts or not all(is_text(part) for pair in metadata.items() for part in pair):
        raise damaged(path, "its metadata is not a map of texts")
    if len(header) > MAX_TENSORS:
        raise damaged(path, f"{len(header)} tensors, more than {MAX_TENSORS}")
    for name in header:
        if not name or not name.isprintable():
            raise damaged(path, f"a tensor is called {name!r}")


def is_text(value: str) -> bool:
    """Return whether a text has no half characters, which JSON's escapes can bring in.

    >>> is_text("a"), is_text(chr(0xD800))
    (True, False)
    """
    return not any(0xD800 <= ord(character) < 0xE000 for character in value)


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a dict; raises ValueError where a key stands twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name stands twice")
    return result


def no_constant(word: str) -> None:
    """Refuse NaN and infinity, which Python reads and JSON does not have."""
    raise ValueError(f"{word} stands in it")


def check_entry(path: Path, name: str, value: Any, *, base: int) -> Entry:
    """Return one checked entry: known dtype, sane shape, offsets that match both."""
    try:
        dtype, shape, (start, end) = value.pop("dtype"), value.pop("shape"), value.pop("data_offsets")
        whole = all(type(n) is int and n >= 0 for n in (*shape, start, end))
    except (AttributeError, TypeError, KeyError, ValueError):
        raise damaged(path, f'tensor "{name}" has no dtype, shape and data_offsets') from None
    if value:
        raise damaged(path, f'tensor "{name}" has more than dtype, shape and data_offsets: {next(iter(value))!r}')
    if not isinstance(dtype, str) or dtype not in NUMPY or not whole or len(shape) > MAX_RANK:
        raise damaged(path, f'tensor "{name}" has dtype {dtype} and shape {shape}')
    count = math.prod(shape)
    if any(n > MAX_DIMENSION for n in shape):
        raise damaged(path, f'tensor "{name}" has shape {shape}')
    if end - start != count * np.dtype(NUMPY[dtype]).itemsize:
        raise damaged(path, f'tensor "{name}" needs {count} values of {dtype} but holds {end - start} bytes')
    return Entry(dtype=dtype, shape=tuple(shape), start=base + start, end=base + end, file=path)


def check_cover(path: Path, entries: Mapping[str, Entry], *, base: int, size: int) -> None:
    """Refuse overlaps, holes, and bytes missing or left over at the end."""
    at = base
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != at:
            raise damaged(path, f'tensor "{name}" starts at byte {entry.start}, not {at}')
        at = entry.end
    if at != size:
        raise damaged(path, f"the tensors end at byte {at}, the file at {size}")


def damaged(path: Path, why: str) -> ModelError:
    """Return the error for a file that is not a whole safetensors file."""
    return ModelError(f"{path} is damaged: {why}", code="E301", fix="download or copy the file again")


def read_tensor(entry: Entry) -> Tensor:
    """Return one tensor, mapped from the file, read when used."""
    kind = np.dtype(NUMPY[entry.dtype])
    if entry.end == entry.start:
        return Tensor(entry.dtype, np.zeros(entry.shape, dtype=kind))
    data = np.memmap(entry.file, dtype=kind, mode="r", offset=entry.start, shape=entry.shape or (1,))
    return Tensor(entry.dtype, data.reshape(entry.shape))


def load_file(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a file, copied into memory."""
    entries = read_header(path)
    return {name: Tensor(entry.dtype, np.array(read_tensor(entry).data)) for name, entry in entries.items()}


def save_file(path: Path, tensors: Iterable[tuple[str, Tensor]], *, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file; the same tensors always give the same bytes (so: at most one metadata key)."""
    from safetensors import SafetensorError, TensorSpec, serialize_file

    pairs = list(tensors)
    held = {name: np.ascontiguousarray(tensor.data) for name, tensor in pairs}
    specs = {
        name: TensorSpec(
            dtype=LIBRARY[tensor.dtype], shape=tensor.shape, data_ptr=held[name].ctypes.data, data_len=held[name].nbytes
        )
        for name, tensor in sorted(pairs)
    }
    try:
        serialize_file(specs, path, metadata=metadata)
    except SafetensorError as error:  # it wraps what the system said, e.g. that the disk is full
        raise OSError(str(error)) from None
    path.chmod(0o644)  # the library's temporary file is for its owner only


def to_float32(tensor: Tensor) -> np.ndarray:
    """Return the values as float32: exact for F16, BF16 and F32.

    >>> to_float32(Tensor("BF16", np.array([0x3F80], dtype=np.uint16)))
    array([1.], dtype=float32)
    """
    if tensor.dtype == "BF16":
        return (tensor.data.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return np.asarray(tensor.data, dtype=np.float32)


def from_float32(values: np.ndarray, dtype: str) -> Tensor:
    """Return a tensor of `dtype` F32, F16 or BF16, rounded to nearest even.

    >>> from_float32(np.array([1.0], dtype=np.float32), "BF16").data
    array([16256], dtype=uint16)
    """
    values = np.asarray(values, dtype=np.float32)
    if dtype == "BF16":
        words = np.ascontiguousarray(values).view(np.uint32)
        rounded = ((words + np.uint32(0x7FFF) + ((words >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(
            np.uint16
        )
        nan = np.isnan(values)
        return Tensor("BF16", np.where(nan, np.uint16(0x7FC0), rounded).reshape(values.shape))
    return Tensor(dtype, values.astype(NUMPY[dtype], copy=False))


def is_finite(tensor: Tensor) -> bool:
    """Return whether a float tensor has neither NaN nor infinity; true for integers. A few values at a time."""
    flat = tensor.data.reshape(-1)
    return all(block_is_finite(tensor.dtype, flat[at : at + BLOCK]) for at in range(0, flat.size, BLOCK))


def block_is_finite(dtype: str, values: np.ndarray) -> bool:
    """Return whether the words of a dtype stand for finite numbers."""
    if dtype == "BF16":
        return not bool(((values & np.uint16(0x7F80)) == np.uint16(0x7F80)).any())
    if dtype in ("F64", "F32", "F16"):
        return bool(np.isfinite(values).all())
    if dtype == "F8_E4M3":
        return not bool(((values & np.uint8(0x7F)) == np.uint8(0x7F)).any())  # it has no infinities
    return True
