"""Folders that optimum-quanto saved with `QuantizedModelForCausalLM.save_pretrained`: read and written.

quanto_qmap.json names the quantized modules and their types. Codes are `X.weight._data` (8 bits) or
`X.weight._data._data`, scales `X.weight._scale`, and below 8 bits `X.weight._shift`; `X.input_scale` and
`X.output_scale` belong to quantized activations and are 1 without them.
Source: optimum-quanto 0.2.7 `models/transformers_models.py`, `nn/qmodule.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shared.errors import CapabilityError, ModelError
from shared.quant.place import Place
from shared.quant.quanto import group_size
from shared.tensors import FLOATS, Entry, from_float32
from shared.types import FIXED, Packed, Scheme, Stored, Tensor

MAP = "quanto_qmap.json"
TYPES = {"qint2": "quanto-qint2", "qint4": "quanto-qint4", "qint8": "quanto-qint8", "qfloat8_e4m3fn": "quanto-qfloat8"}
CODES = {"quanto-qint8": "I8", "quanto-qfloat8": "F8_E4M3"}
MODULE = re.compile(r"[\w.]{1,500}")


def find_quanto(path: Path, config: Mapping[str, Any], entries: Mapping[str, Entry]) -> dict[str, Place]:
    """Return the modules that quanto_qmap.json names, checked against their shapes."""
    places = {module: find_place(path, module, kind, config, entries) for module, kind in read_map(path).items()}
    owned = {name for place in places.values() for name in (*place.names.values(), *place.extra)}
    stray = [name for name in entries if ".weight._" in name and name not in owned]
    if stray:
        raise ModelError(
            f'{path}: {MAP} does not name the module of "{stray[0]}"', code="E302", fix="download the model again"
        )
    return places


def read_map(path: Path) -> dict[str, str]:
    """Return our names of the types of quantized modules; raises CapabilityError for quantized activations."""
    try:
        stated = json.loads((path / MAP).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path / MAP} cannot be read: {error}", code="E302", fix="download the file again") from None
    plain = isinstance(stated, dict) and all(MODULE.fullmatch(name) for name in stated)
    if not plain or not all(isinstance(entry, dict) for entry in stated.values()):
        raise ModelError(
            f"{path / MAP} holds no map of modules", code="E302", expected='{"module": {"weights": "qint4"}}'
        )
    for module, entry in stated.items():
        if entry.get("activations", "none") != "none" or str(entry.get("weights")) not in TYPES:
            raise CapabilityError(
                f'{path / MAP}: "{module}" has weights {entry.get("weights")!r} and activations '
                f"{entry.get('activations', 'none')!r}, which are not read",
                expected=f"weights in {', '.join(TYPES)}, and no activations", fix="quantize the weights alone",
            )  # fmt: skip
    return {module: TYPES[entry["weights"]] for module, entry in stated.items()}


def find_place(path: Path, module: str, kind: str, config: Mapping[str, Any], entries: Mapping[str, Entry]) -> Place:
    """Return where a module's weight lies; raises ModelError unless its tensors are what its type says."""
    bits, _ = FIXED[kind]
    prefix = f"{module}.weight._"
    names = {"weight": f"{prefix}data" if bits == 8 else f"{prefix}data._data", "scales": f"{prefix}scale"}
    if bits < 8:
        names["shifts"] = f"{prefix}shift"
    found = {key: entries.get(name) for key, name in names.items()}
    shape = find_shape(found, kind, widths=likely_widths(module, config))
    if shape is None:
        told = ", ".join(f"{key} {entry.dtype} {entry.shape}" if entry else f"no {key}" for key, entry in found.items())
        raise ModelError(f'{path}: "{module}" is no {kind} weight: {told}', code="E308", fix="download the model again")
    extra = tuple(name for leaf in ("input_scale", "output_scale") if (name := f"{module}.{leaf}") in entries)
    scales = entries[names["scales"]]
    return Place(Stored(Scheme(kind, *FIXED[kind]), shape, scales.dtype), names, extra=extra)


def likely_widths(module: str, config: Mapping[str, Any]) -> list[int]:
    """Return the widths that a module's rows may have by config.json, the likeliest first.

    >>> likely_widths("model.layers.0.mlp.down_proj", {"hidden_size": 64, "intermediate_size": 128})
    [128, 64]
    """
    heads, head, hidden = (config.get(key) for key in ("num_attention_heads", "head_dim", "hidden_size"))
    inner = heads * head if isinstance(heads, int) and isinstance(head, int) else hidden
    leaf = module.rpartition(".")[2]
    first = {"down_proj": config.get("intermediate_size"), "o_proj": inner}.get(leaf, hidden)
    every = (first, hidden, config.get("intermediate_size"), inner)
    return list(dict.fromkeys(width for width in every if type(width) is int and width > 0))


def find_shape(found: Mapping[str, Entry | None], kind: str, *, widths: list[int]) -> tuple[int, int] | None:
    """Return the shape (O, I) that a weight's tensors stand for, None where they do not belong together.

    Below 8 bits a tensor's rows are groups, and none says where a row of the weight ends: `widths` have to.
    """
    codes, scales, shifts = found["weight"], found["scales"], found.get("shifts")
    bits, _ = FIXED[kind]
    if codes is None or scales is None or scales.dtype not in FLOATS or len(codes.shape) != 2 or 0 in codes.shape:
        return None
    if bits == 8:
        sound = codes.dtype == CODES[kind] and scales.shape == (codes.shape[0], 1)
        return (codes.shape[0], codes.shape[1]) if sound else None
    if shifts is None or (shifts.dtype, shifts.shape) != (scales.dtype, scales.shape) or codes.dtype != "U8":
        return None
    groups, size = scales.shape[0] if scales.shape else 0, codes.shape[1]
    if scales.shape != (groups, 1) or codes.shape[0] != -(-groups // (8 // bits)):
        return None
    fitting = (width for width in widths if group_size(width) == size and groups * size % width == 0)
    width = next(fitting, None)
    return None if width is None else (groups * size // width, width)


def to_tensors(module: str, packed: Packed) -> dict[str, Tensor]:
    """Return the tensors that hold a packed weight, by their names in the folder."""
    prefix, one = f"{module}.weight._", from_float32(np.array(1, dtype=np.float32), packed.dtype)
    arrays = packed.arrays
    held = {f"{prefix}data" if packed.scheme.bits == 8 else f"{prefix}data._data": arrays["weight"]}
    held[f"{prefix}scale"] = arrays["scales"]
    if "shifts" in arrays:
        held[f"{prefix}shift"] = arrays["shifts"]
    return {**held, f"{module}.input_scale": one, f"{module}.output_scale": one}


def quantization_map(modules: Mapping[str, Scheme]) -> dict[str, dict[str, str]]:
    """Return what quanto_qmap.json says of quantized modules."""
    names = {ours: theirs for theirs, ours in TYPES.items()}
    return {module: {"weights": names[scheme.name], "activations": "none"} for module, scheme in modules.items()}
