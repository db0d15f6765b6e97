"""Which tensors of a model folder hold quantized weights: one reader per way to store them.

A reader looks at config.json and at the headers, and returns a `Place` for every module that is stored quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.errors import CapabilityError, ModelError
from shared.quant.bnb_folder import find_bitsandbytes
from shared.quant.place import Place
from shared.tensors import Entry
from shared.types import Scheme, Stored

AFFINE_BITS, AFFINE_GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)


def find_places(path: Path, config: Mapping[str, Any], entries: Mapping[str, Entry]) -> dict[str, Place]:
    """Return the place of every module that the folder stores quantized; raises ModelError or CapabilityError."""
    foreign = config.get("quantization_config")
    method = foreign.get("quant_method") if isinstance(foreign, dict) and not config.get("quantization") else None
    if method is None:
        return find_mlx(path, quantization_of(config), entries)
    if method not in READERS:
        raise CapabilityError(
            f"the folder is quantized with {method}, which this version does not read",
            expected=f"float weights, an mlx-lm folder, or one of: {', '.join(READERS)}",
            fix="use the unquantized model with quantization: affine-4bit-g64",
        )
    return READERS[method](path, config, entries)


def quantization_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return mlx-lm's quantization entry; raises CapabilityError for a mode without a codec."""
    own = config.get("quantization") or config.get("quantization_config")
    if own is not None and not isinstance(own, dict):
        raise ModelError(f"config.json: quantization is {own!r}", expected='{"group_size": 64, "bits": 4}')
    if own is not None and own.get("mode", "affine") != "affine":
        raise CapabilityError(
            f"the folder is quantized with mode {own['mode']}, which this version does not read",
            expected="affine", fix="convert the original model with `mlx_lm convert -q`",
        )  # fmt: skip
    return own


def find_mlx(path: Path, quantization: dict[str, Any] | None, entries: Mapping[str, Entry]) -> dict[str, Place]:
    """Return the modules that have scales, as mlx-lm stores them, checked against their shapes."""
    places: dict[str, Place] = {}
    for name in entries:
        if not name.endswith(".scales"):
            continue
        module = name.removesuffix(".scales")
        found = (quantization or {}).get(module, quantization)
        if not isinstance(found, dict) or f"{module}.weight" not in entries or f"{module}.biases" not in entries:
            raise ModelError(f'{path}: "{name}" has no weight, biases or entry in config.json', fix="convert it again")
        group, bits = found.get("group_size", 64), found.get("bits", 4)
        weight, scales = entries[f"{module}.weight"], entries[name]
        known = type(bits) is type(group) is int and bits in AFFINE_BITS and group in AFFINE_GROUPS
        matrices = weight.dtype == "U32" and min(len(weight.shape), len(scales.shape)) >= 2
        if not known or not matrices or weight.shape[-1] * 32 != scales.shape[-1] * group * bits:
            raise ModelError(
                f'{path}: "{module}" does not hold {bits} bits in groups of {group}: weight {weight.shape}, '
                f"scales {scales.shape}", fix="convert the model again",
            )  # fmt: skip
        shape = (scales.shape[0], scales.shape[1] * group)
        names = {leaf: f"{module}.{leaf}" for leaf in ("weight", "scales", "biases")}
        places[module] = Place(Stored(Scheme("affine", bits, group), shape, scales.dtype), names)
    return places


READERS = {  # quant_method of a folder's quantization_config -> its reader
    "bitsandbytes": find_bitsandbytes,
}
