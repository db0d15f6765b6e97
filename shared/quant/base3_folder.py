"""Folders of ternary weights in base 3, 1.6 bits per value and the scales: our own form, read and written here only.

`X.trits` holds five codes to a byte (`ternary.pack_base3`), `X.scales` one scale per group; quantization_config says
`ternary-base3` and the group size. In memory they are the affine codes of `ternary.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from shared.errors import ModelError
from shared.quant.affine import pack, unpack
from shared.quant.place import Form, Place
from shared.quant.ternary import TRITS, pack_base3, unpack_base3
from shared.tensors import FLOATS, Entry, from_float32, to_float32
from shared.types import Packed, Scheme, Stored, Tensor

METHOD = "ternary-base3"
GROUPS = (32, 64, 128)


def find_base3(path: Path, config: Mapping[str, Any], entries: Mapping[str, Entry]) -> dict[str, Place]:
    """Return the modules that have trits, checked against their shapes."""
    group = config["quantization_config"].get("group_size")
    if type(group) is not int or group not in GROUPS:
        raise ModelError(f"{path / 'config.json'}: group_size is {group!r}", code="E302", expected="32, 64 or 128")
    modules = [name.removesuffix(".trits") for name in entries if name.endswith(".trits")]
    return {module: find_place(path, module, group, entries) for module in modules}


def find_place(path: Path, module: str, group: int, entries: Mapping[str, Entry]) -> Place:
    """Return where a module's weight lies; raises ModelError unless trits and scales belong together."""
    trits, scales = entries[f"{module}.trits"], entries.get(f"{module}.scales")
    matrices = scales is not None and len(trits.shape) == len(scales.shape) == 2 and 0 not in scales.shape
    if scales is None or not matrices or trits.dtype != "U8" or scales.dtype not in FLOATS:
        found = f"{scales.dtype} {scales.shape}" if scales else "missing"
        raise ModelError(
            f'{path}: "{module}" holds no ternary weight: trits {trits.dtype} {trits.shape}, scales {found}',
            code="E308",
            fix="quantize the model again",
        )
    rows, width = scales.shape[0], scales.shape[1] * group
    if trits.shape != (rows, -(-width // TRITS)):
        raise ModelError(
            f'{path}: "{module}" has trits {trits.shape} for a weight of {(rows, width)}', code="E308",
            expected=f"{(rows, -(-width // TRITS))}", fix="quantize the model again",
        )  # fmt: skip
    names = {leaf: f"{module}.{leaf}" for leaf in ("trits", "scales")}
    stored = Stored(Scheme("ternary", 2, group), (rows, width), scales.dtype)
    return Place(stored, names, form=Form("trits", partial(to_affine, width=width), from_affine))


def to_affine(arrays: Mapping[str, Tensor], *, width: int) -> dict[str, Tensor]:
    """Return the affine arrays of trits and scales; raises ModelError for bytes that hold no five trits."""
    codes, scales = unpack_base3(arrays["trits"].data, width=width), arrays["scales"]
    biases = from_float32(np.float32(0) - to_float32(scales), scales.dtype)
    return {"weight": Tensor("U32", pack(codes, bits=2)), "scales": scales, "biases": biases}


def from_affine(packed: Packed) -> dict[str, Tensor]:
    """Return the trits and scales of a packed ternary weight."""
    codes = unpack(packed.arrays["weight"].data, bits=2)
    return {"trits": Tensor("U8", pack_base3(codes)), "scales": packed.arrays["scales"]}


def to_tensors(module: str, packed: Packed) -> dict[str, Tensor]:
    """Return the tensors that hold a packed ternary weight, by their names in the folder."""
    return {f"{module}.{leaf}": tensor for leaf, tensor in from_affine(packed).items()}


def quantization_config(scheme: Scheme) -> dict[str, Any]:
    """Return the quantization_config of a folder's config.json."""
    return {"quant_method": METHOD, "group_size": scheme.group_size}
