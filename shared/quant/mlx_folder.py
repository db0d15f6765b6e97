"""Folders that mlx-lm quantized: which tensors hold a quantized weight, read and written.

`X.weight` holds words of codes, `X.scales` and (affine only) `X.biases` what they are read with. config.json says
under `quantization` how: group_size, bits and mode for all, and again under the name of a module that differs; false
there marks a module that is not quantized. The same stands under `quantization_config`, for the hub.
Source: mlx-lm 0.32.2 `utils.py`. Ternary weights are stored as the affine codes that they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from shared.errors import CapabilityError, ModelError
from shared.experts import STACK
from shared.quant.place import Form, Place
from shared.tensors import FLOATS, Entry
from shared.types import FIXED, Packed, Scheme, Stored, Tensor

AFFINE_BITS, AFFINE_GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)
MODES = ("affine", "mxfp4", "nvfp4", "mxfp8")


def find_mlx(path: Path, config: Mapping[str, Any], entries: Mapping[str, Entry]) -> dict[str, Place]:
    """Return the modules that have scales, checked against their shapes."""
    quantization = quantization_of(config)
    modules = [name.removesuffix(".scales") for name in entries if name.endswith(".scales")]
    return {module: find_place(path, module, quantization, entries) for module in modules}


def quantization_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return mlx-lm's quantization entry; raises CapabilityError for a mode without a codec."""
    own = config.get("quantization") or config.get("quantization_config")
    if own is not None and not isinstance(own, dict):
        raise ModelError(f"config.json: quantization is {own!r}", code="E302", expected='{"group_size": 64, "bits": 4}')
    for entry in (own, *own.values()) if own else ():
        if isinstance(entry, dict) and entry.get("mode", "affine") not in MODES:
            raise CapabilityError(
                f"the folder is quantized with mode {entry['mode']}, which this version does not read",
                expected=", ".join(MODES), fix="convert the original model with `mlx_lm convert -q`",
            )  # fmt: skip
    return own


def find_place(path: Path, module: str, quantization: dict[str, Any] | None, entries: Mapping[str, Entry]) -> Place:
    """Return where a module's weight lies; raises ModelError unless its tensors are what config.json says."""
    found = (quantization or {}).get(module, quantization)
    weight, scales = entries.get(f"{module}.weight"), entries[f"{module}.scales"]
    if not isinstance(found, dict) or weight is None:
        raise ModelError(
            f'{path}: "{module}.scales" has no weight, biases or entry in config.json',
            code="E302",
            fix="convert it again",
        )
    if module not in (quantization or {}) and scales.dtype == "U8":
        found = by_shape(weight, scales) or found
    mode = found.get("mode", "affine")
    bits, group = (found.get(key, usual) for key, usual in zip(("bits", "group_size"), usual_of(mode), strict=True))
    leaves = ("weight", "scales", "biases") if mode == "affine" else ("weight", "scales")
    if f"{module}.{leaves[-1]}" not in entries:
        raise ModelError(
            f'{path}: "{module}.scales" has no weight, biases or entry in config.json',
            code="E302",
            fix="convert it again",
        )
    if not (is_known(mode, bits, group) and fits(module, entries, leaves, bits=bits, group=group)):
        raise ModelError(
            f'{path}: "{module}" does not hold {bits} bits in groups of {group}: weight {weight.shape}, '
            f"scales {scales.shape}", code="E308", fix="convert the model again",
        )  # fmt: skip
    shape = (math.prod(scales.shape[:-1]), scales.shape[-1] * group)
    stored = Stored(Scheme(mode, bits, group), shape, scales.dtype if mode == "affine" else "BF16")
    form = Form("weight", as_rows, partial(as_stack, number=weight.shape[0])) if len(weight.shape) > 2 else None
    return Place(stored, {leaf: f"{module}.{leaf}" for leaf in leaves}, form=form)


def as_rows(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the arrays of stacked experts (E, O, ..) with their rows one below the other (E O, ..)."""
    return {key: Tensor(one.dtype, one.data.reshape(-1, one.shape[-1])) for key, one in arrays.items()}


def as_stack(packed: Packed, *, number: int) -> dict[str, Tensor]:
    """Return the arrays of experts, `number` of them stacked."""
    return {key: Tensor(one.dtype, one.data.reshape(number, -1, one.shape[-1])) for key, one in packed.arrays.items()}


def by_shape(weight: Entry, scales: Entry) -> dict[str, Any] | None:
    """Return the entry of a module that config.json does not name, by its bits per scale; as mlx-lm infers it."""
    for mode in MODES[1:]:
        bits, group = FIXED[mode]
        if weight.shape[-1:] and scales.shape[-1:] and weight.shape[-1] * 32 == scales.shape[-1] * bits * group:
            return {"mode": mode, "bits": bits, "group_size": group}
    return None


def usual_of(mode: str) -> tuple[int, int]:
    """Return bits and group size of a mode that config.json leaves out."""
    return (4, 64) if mode == "affine" else FIXED[mode]


def is_known(mode: str, bits: Any, group: Any) -> bool:
    """Return whether a codec is there for these numbers."""
    if not type(bits) is type(group) is int:
        return False
    return (bits in AFFINE_BITS and group in AFFINE_GROUPS) if mode == "affine" else (bits, group) == FIXED[mode]


def fits(module: str, entries: Mapping[str, Entry], leaves: Iterable[str], *, bits: int, group: int) -> bool:
    """Return whether a module's tensors are matrices of the dtypes and shapes that belong together."""
    weight, scales, *biases = (entries[f"{module}.{leaf}"] for leaf in leaves)
    kinds = {scales.dtype, *(entry.dtype for entry in biases)}
    return (
        weight.dtype == "U32"
        and (kinds <= {*FLOATS} if biases else kinds == {"U8"})
        and len(kinds) == 1
        and all(len(entry.shape) == 2 + (STACK in module) and 0 not in entry.shape for entry in (weight, scales))
        and weight.shape[:-1] == scales.shape[:-1]
        and weight.shape[-1] * 32 == scales.shape[-1] * group * bits
        and all(entry.shape == scales.shape for entry in biases)
    )


def to_tensors(module: str, packed: Packed) -> dict[str, Tensor]:
    """Return the tensors that hold a packed weight, by their names in the folder."""
    return {f"{module}.{key}": tensor for key, tensor in packed.arrays.items()}


def entry_of(scheme: Scheme) -> dict[str, Any]:
    """Return what config.json says of a scheme.

    >>> entry_of(Scheme("ternary", 2, 64))
    {'group_size': 64, 'bits': 2, 'mode': 'affine'}
    """
    mode = scheme.name if scheme.name in MODES else "affine"
    return {"group_size": scheme.group_size, "bits": scheme.bits, "mode": mode}


def quantization_entry(scheme: Scheme, modules: Mapping[str, Scheme | None]) -> dict[str, Any]:
    """Return the quantization entry of a folder: the common scheme, then the modules that differ (None: kept out)."""
    entry: dict[str, Any] = entry_of(scheme)
    for module, own in modules.items():
        if own is None:
            entry[module] = False
        elif entry_of(own) != entry_of(scheme):
            entry[module] = entry_of(own)
    return entry
