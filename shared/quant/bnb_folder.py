"""bitsandbytes folders as transformers writes them: which tensors hold a quantized weight, read and written.

4 bits: `X.weight` holds the codes (U8, or another dtype's words: bnb_4bit_quant_storage), `X.weight.absmax` the scales,
`X.weight.quant_map` the 16 values, `X.weight.quant_state.bitsandbytes__nf4` JSON bytes with blocksize, dtype and shape;
with double quantization also `X.weight.nested_absmax`, `X.weight.nested_quant_map`, and nested_offset in the JSON.
8 bits: `X.weight` (I8), `X.SCB` (F32), `X.weight_format` (0: row by row).
Source: bitsandbytes 0.50.2 `QuantState.as_dict`, `Linear8bitLt._save_to_state_dict`; checked by transformers 5.23.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from shared.errors import CapabilityError, ModelError
from shared.quant.blockwise import BLOCK, make_tables, num_blocks
from shared.quant.four_bit import CODES
from shared.quant.place import Place
from shared.tensors import Entry, read_tensor
from shared.types import Packed, Scheme, Stored, Tensor

STATE = ".weight.quant_state.bitsandbytes__"
MAX_STATE = 4096  # bytes; a real one has about 170
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
STORAGE = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4}  # bytes of a word that codes may be stored in
NEAR = 1e-6  # of two maps of values: they are computed, and by another version in another order


def find_bitsandbytes(path: Path, config: Mapping[str, Any], entries: Mapping[str, Entry]) -> dict[str, Place]:
    """Return the modules that bitsandbytes packed, checked against their headers; raises ModelError."""
    stated = config["quantization_config"]
    four = bool(stated.get("load_in_4bit", stated.get("_load_in_4bit")))
    if four == bool(stated.get("load_in_8bit", stated.get("_load_in_8bit"))):
        raise ModelError(
            f"{path / 'config.json'}: quantization_config says neither or both of load_in_4bit and load_in_8bit",
            code="E302", expected="one of them true", fix="download the model again",
        )  # fmt: skip
    skipped = stated.get("llm_int8_skip_modules")
    if skipped is not None and not (isinstance(skipped, list) and all(isinstance(name, str) for name in skipped)):
        raise ModelError(
            f"{path / 'config.json'}: llm_int8_skip_modules is {skipped!r}", code="E302", expected="a list of names"
        )
    places: dict[str, Place] = {}
    for name in entries:
        module, _, kind = name.partition(STATE)
        if four and kind:
            places[module] = find_four_bit(path, module, kind, entries)
        elif not four and name.endswith(".SCB"):
            places[name.removesuffix(".SCB")] = find_int8(path, name.removesuffix(".SCB"), entries)
    if not places:
        raise ModelError(
            f"{path}: config.json says bitsandbytes {'4' if four else '8'} bit, but no tensor is packed so",
            code="E302",
            fix="config.json and weights must belong together; download the model again",
        )
    return places


def find_four_bit(path: Path, module: str, kind: str, entries: Mapping[str, Entry]) -> Place:
    """Return the place of an nf4 or fp4 weight."""
    key, prefix = f"{module}{STATE}{kind}", f"{module}.weight."
    state = read_state(path, key, entries[key])
    shape, block, dtype = shape_of(state), state.get("blocksize"), DTYPES.get(str(state.get("dtype")))
    known = kind in CODES and state.get("quant_type") == kind
    if not known or type(block) is not int or block not in BLOCKS or shape is None or dtype is None:
        told = ", ".join(f"{key} {state.get(key)!r}" for key in ("quant_type", "blocksize", "dtype", "shape"))
        raise damaged(path, module, f"its quant_state says {told}")
    rows, width = cast(list[int], shape)
    blocks, double = -(-rows * width // block), "nested_offset" in state
    names = {"weight": f"{module}.weight", "absmax": f"{prefix}absmax"}
    check_bytes(path, names["weight"], entries, count=-(-rows * width // 2))
    check_shape(path, names["absmax"], entries, dtype="U8" if double else "F32", shape=(blocks,))
    check_map(path, f"{prefix}quant_map", entries, values=CODES[kind])
    constants: dict[str, Tensor] = {}
    if double:
        names |= {leaf: f"{prefix}{leaf}" for leaf in ("nested_absmax", "nested_quant_map")}
        check_shape(path, names["nested_absmax"], entries, dtype="F32", shape=(num_blocks(blocks),))
        check_map(path, names["nested_quant_map"], entries, values=make_tables(signed=True).code)
        constants["nested_offset"] = Tensor("F32", nested_offset(path, module, state))
    stored = Stored(Scheme(kind, 4, block, double=double), (rows, width), dtype)
    return Place(stored, names, constants, extra=(key, f"{prefix}quant_map"), raw=("weight",))


def read_state(path: Path, key: str, entry: Entry) -> dict[str, Any]:
    """Return the object in the bytes of a quant_state; raises ModelError."""
    if entry.dtype != "U8" or not 2 <= entry.end - entry.start <= MAX_STATE:
        raise ModelError(
            f'{path}: "{key}" is {entry.dtype} {entry.shape}', code="E308", expected=f"U8, {MAX_STATE} bytes at most"
        )
    try:
        state = json.loads(read_tensor(entry).data.tobytes().decode("utf-8"))
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict):
        raise ModelError(f'{path}: "{key}" does not hold a JSON object', code="E308", fix="download the model again")
    return state


def shape_of(state: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the (O, I) that a quant_state tells, None where it is not that of a matrix."""
    shape = state.get("shape")
    sound = isinstance(shape, list) and all(type(n) is int and 1 <= n < 2**31 for n in shape)
    return (shape[0], shape[1]) if isinstance(shape, list) and sound and len(shape) == 2 else None


def nested_offset(path: Path, module: str, state: Mapping[str, Any]) -> np.ndarray:
    """Return the mean that nested scales are about, a float32 scalar; raises ModelError for anything odd."""
    offset, block = state["nested_offset"], state.get("nested_blocksize")
    if type(offset) not in (int, float) or block != BLOCK or state.get("nested_dtype") != "float32":
        told = ", ".join(f"{key} {state.get(key)!r}" for key in ("nested_offset", "nested_blocksize", "nested_dtype"))
        raise damaged(path, module, f"its quant_state says {told}")
    if not abs(offset) < np.finfo(np.float32).max:
        raise damaged(path, module, f"its quant_state says nested_offset {offset!r}")
    return np.array(offset, dtype=np.float32)


def find_int8(path: Path, module: str, entries: Mapping[str, Entry]) -> Place:
    """Return the place of an int8 weight."""
    names = {"weight": f"{module}.weight", "SCB": f"{module}.SCB"}
    weight, scales = entries.get(names["weight"]), entries[names["SCB"]]
    if weight is None or weight.dtype != "I8" or len(weight.shape) != 2 or 0 in weight.shape:
        raise damaged(
            path, module, f"it has SCB, but its weight is {f'{weight.dtype} {weight.shape}' if weight else 'gone'}"
        )
    check_shape(path, names["SCB"], entries, dtype=scales.dtype, shape=weight.shape[:1])
    if scales.dtype != "F32":
        raise damaged(path, module, f"its SCB is {scales.dtype}")
    form = f"{module}.weight_format"
    if form in entries:
        check_shape(path, form, entries, dtype="U8", shape=entries[form].shape)
        if entries[form].end - entries[form].start != 1 or int(read_tensor(entries[form]).data.reshape(-1)[0]) != 0:
            raise CapabilityError(
                f'{path}: "{form}" is not 0: the weight is tiled for one kind of GPU',
                expected="0, row by row", fix="save the model again with bitsandbytes 0.45 or newer",
            )  # fmt: skip
    stored = Stored(Scheme("int8", 8, 0), (weight.shape[0], weight.shape[1]), "F32")
    return Place(stored, names, extra=(form,) if form in entries else ())


def check_bytes(path: Path, name: str, entries: Mapping[str, Entry], *, count: int) -> None:
    """Raise ModelError unless a tensor holds `count` bytes of codes, filled up to whole words."""
    entry = entries.get(name)
    size = STORAGE.get(entry.dtype, 0) if entry else 0
    if entry is None or not size or entry.end - entry.start != -(-count // size) * size:
        found = f"{entry.dtype} {entry.shape}" if entry else "missing"
        raise ModelError(
            f'{path}: "{name}" is {found}', code="E308", expected=f"{count} bytes", fix="download the model again"
        )


def check_shape(path: Path, name: str, entries: Mapping[str, Entry], *, dtype: str, shape: tuple[int, ...]) -> None:
    """Raise ModelError unless a tensor is there with this dtype and shape."""
    entry = entries.get(name)
    if entry is None or (entry.dtype, entry.shape) != (dtype, shape):
        found = f"{entry.dtype} {entry.shape}" if entry else "missing"
        raise ModelError(
            f'{path}: "{name}" is {found}', code="E308", expected=f"{dtype} {shape}", fix="download the model again"
        )


def check_map(path: Path, name: str, entries: Mapping[str, Entry], *, values: np.ndarray) -> None:
    """Raise ModelError unless a tensor holds the values of a known map."""
    check_shape(path, name, entries, dtype="F32", shape=values.shape)
    if not np.allclose(read_tensor(entries[name]).data, values, rtol=0, atol=NEAR):
        raise ModelError(
            f'{path}: "{name}" is a map that bitsandbytes does not make', code="E308", fix="download the model again"
        )


def damaged(path: Path, module: str, why: str) -> ModelError:
    """Return the error for a module that cannot be read."""
    return ModelError(f'{path}: "{module}" cannot be read: {why}', code="E308", fix="download the model again")


def to_tensors(module: str, packed: Packed) -> dict[str, Tensor]:
    """Return the tensors that hold a packed weight in a bitsandbytes folder, by their names there."""
    scheme, prefix = packed.scheme, f"{module}.weight."
    if scheme.name == "int8":
        form = Tensor("U8", np.array(0, dtype=np.uint8))
        return {
            f"{module}.weight": packed.arrays["weight"],
            f"{module}.SCB": packed.arrays["SCB"],
            f"{module}.weight_format": form,
        }
    dtype = next(name for name, word in DTYPES.items() if word == packed.dtype)
    state: dict[str, Any] = {
        "quant_type": scheme.name, "blocksize": scheme.group_size, "dtype": dtype, "shape": list(packed.shape),
    }  # fmt: skip
    arrays = {key: tensor for key, tensor in packed.arrays.items() if key not in ("weight", "nested_offset")}
    if scheme.double:
        offset = float(packed.arrays["nested_offset"].data)
        state |= {"nested_blocksize": BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    words = np.frombuffer(json.dumps(state).encode(), dtype=np.uint8)
    return {
        f"{module}.weight": packed.arrays["weight"],
        **{f"{prefix}{key}": tensor for key, tensor in arrays.items()},
        f"{prefix}quant_map": Tensor("F32", CODES[scheme.name]),
        f"{module}{STATE}{scheme.name}": Tensor("U8", words),
    }


def quantization_config(scheme: Scheme, *, kept: list[str], dtype: str) -> dict[str, Any]:
    """Return the quantization_config of a folder's config.json; kept: linear modules stored as floats.

    dtype: what bitsandbytes computes in, e.g. "bfloat16".
    """
    four = scheme.name in CODES
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": four, "load_in_8bit": not four, "_load_in_4bit": four, "_load_in_8bit": not four,
        "bnb_4bit_compute_dtype": dtype, "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": scheme.name if four else "fp4", "bnb_4bit_use_double_quant": scheme.double,
        "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": sorted(kept), "llm_int8_threshold": 6.0,
    }  # fmt: skip
