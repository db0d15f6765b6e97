"""Folders with BitNet's ternary layers as transformers packs them: read and written.

`X.weight` holds the packed trits (U8), `X.weight_scale` one number; quantization_config says which way it is meant.
Source: transformers 5.23 `integrations/bitnet.py`, `BitNetQuantConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.errors import CapabilityError, ModelError
from shared.quant.bitnet import PER_BYTE
from shared.quant.place import Place
from shared.tensors import FLOATS, Entry
from shared.types import FIXED, Packed, Scheme, Stored, Tensor

CLASSES = {"autobitlinear": "bitnet", "bitlinear": "bitnet-inverse"}  # linear_class -> our name of what it stores


def find_bitnet(path: Path, config: Mapping[str, Any], entries: Mapping[str, Entry]) -> dict[str, Place]:
    """Return the modules that have packed trits, checked against their shapes."""
    stated = config["quantization_config"]
    kind = CLASSES.get(str(stated.get("linear_class", "bitlinear")))
    if kind is None:
        raise ModelError(
            f"{path / 'config.json'}: linear_class is {stated.get('linear_class')!r}",
            code="E302",
            expected=" or ".join(CLASSES),
        )
    for key, plain in (("quantization_mode", "offline"), ("use_rms_norm", False)):
        if stated.get(key, plain) != plain:
            raise CapabilityError(
                f"{path / 'config.json'}: BitNet layers with {key} {stated[key]!r} are not read",
                expected=f"{plain!r}", fix="use the model's unpacked bfloat16 version",
            )  # fmt: skip
    places: dict[str, Place] = {}
    for name in entries:
        if name.endswith(".weight_scale"):
            module = name.removesuffix(".weight_scale")
            places[module] = find_place(path, module, kind, entries)
    if not places:
        raise ModelError(
            f"{path}: config.json says bitnet, but no tensor is packed so",
            code="E302",
            fix="config.json and weights must belong together; download the model again",
        )
    return places


def find_place(path: Path, module: str, kind: str, entries: Mapping[str, Entry]) -> Place:
    """Return where a module's weight lies; raises ModelError unless it is packed trits and one scale."""
    weight, scale = entries.get(f"{module}.weight"), entries[f"{module}.weight_scale"]
    packed = weight is not None and weight.dtype == "U8" and len(weight.shape) == 2 and 0 not in weight.shape
    if weight is None or not packed or scale.dtype not in FLOATS or scale.shape not in ((1,), ()):
        found = f"{weight.dtype} {weight.shape}" if weight else "missing"
        raise ModelError(
            f'{path}: "{module}" is no packed BitNet layer: weight {found}, weight_scale {scale.dtype} {scale.shape}',
            code="E308",
            expected="U8 (rows / 4, width), and one number", fix="download the model again",
        )  # fmt: skip
    shape = (weight.shape[0] * PER_BYTE, weight.shape[1])
    names = {leaf: f"{module}.{leaf}" for leaf in ("weight", "weight_scale")}
    return Place(Stored(Scheme(kind, *FIXED[kind]), shape, scale.dtype), names)


def to_tensors(module: str, packed: Packed) -> dict[str, Tensor]:
    """Return the tensors that hold a packed weight, by their names in the folder."""
    return {f"{module}.{key}": tensor for key, tensor in packed.arrays.items()}


def quantization_config(scheme: Scheme, *, kept: list[str]) -> dict[str, Any]:
    """Return the quantization_config of a folder's config.json; kept: linear modules stored as floats."""
    kind = next(name for name, ours in CLASSES.items() if ours == scheme.name)
    return {
        "quant_method": "bitnet", "linear_class": kind, "quantization_mode": "offline", "use_rms_norm": False,
        "rms_norm_eps": 1e-6, "modules_to_not_convert": sorted(kept),
    }  # fmt: skip
