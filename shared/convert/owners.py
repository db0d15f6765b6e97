"""Who loads a quantized folder: which formats a tool has, what it keeps as floats, and how it names what it stores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from shared.errors import ConfigError
from shared.quant import base3_folder, bitnet_folder, bnb_folder, mlx_folder, quanto_folder
from shared.types import Packed, Scheme, Tensor

Modules = Mapping[str, Scheme | None]  # every module that could be quantized -> its scheme, None: stays a float


@dataclass(frozen=True)
class Owner:
    """A tool that loads folders of quantized weights."""

    name: str
    formats: tuple[str, ...]
    mixes: bool  # one folder may hold several formats
    linears_only: bool  # embeddings cannot be quantized; the head stays a float unless it is asked for
    metadata: Mapping[str, str]
    tensors: Callable[[str, Packed], Mapping[str, Tensor]]  # of a module
    config: Callable[[Scheme, Modules, str], Mapping[str, Any]]  # what config.json says; the last: dtype of the floats
    files: Callable[[Modules], Mapping[str, Any]]  # JSON files beside it


def mlx_config(scheme: Scheme, modules: Modules, dtype: str) -> dict[str, Any]:
    """Return mlx-lm's entry, and its copy for the hub."""
    entry = mlx_folder.quantization_entry(scheme, modules)
    return {"quantization": entry, "quantization_config": entry}


def bitsandbytes_config(scheme: Scheme, modules: Modules, dtype: str) -> dict[str, Any]:
    """Return transformers' entry for bitsandbytes."""
    return {"quantization_config": bnb_folder.quantization_config(scheme, kept=kept(modules), dtype=dtype)}


def bitnet_config(scheme: Scheme, modules: Modules, dtype: str) -> dict[str, Any]:
    """Return transformers' entry for BitNet."""
    return {"quantization_config": bitnet_folder.quantization_config(scheme, kept=kept(modules))}


def quanto_files(modules: Modules) -> dict[str, Any]:
    """Return the map that optimum-quanto reads in place of an entry in config.json."""
    chosen = {module: scheme for module, scheme in modules.items() if scheme is not None}
    return {quanto_folder.MAP: quanto_folder.quantization_map(chosen)}


def kept(modules: Modules) -> list[str]:
    """Return the modules that stay floats."""
    return [module for module, scheme in modules.items() if scheme is None]


MLX = Owner(
    name="mlx-lm", formats=("affine", "ternary", "mxfp4", "nvfp4", "mxfp8"), mixes=True, linears_only=False,
    metadata={"format": "mlx"}, tensors=mlx_folder.to_tensors, config=mlx_config, files=lambda modules: {},
)  # fmt: skip
BITSANDBYTES = Owner(
    name="bitsandbytes", formats=("nf4", "fp4", "int8"), mixes=False, linears_only=True,
    metadata={"format": "pt"}, tensors=bnb_folder.to_tensors, config=bitsandbytes_config, files=lambda modules: {},
)  # fmt: skip
QUANTO = Owner(
    name="optimum-quanto", formats=("quanto-qint2", "quanto-qint4", "quanto-qint8", "quanto-qfloat8"), mixes=True,
    linears_only=True, metadata={"format": "pt"}, tensors=quanto_folder.to_tensors,
    config=lambda scheme, modules, dtype: {}, files=quanto_files,
)  # fmt: skip
BITNET = Owner(
    name="transformers (bitnet)", formats=("bitnet", "bitnet-inverse"), mixes=False, linears_only=True,
    metadata={"format": "pt"}, tensors=bitnet_folder.to_tensors, config=bitnet_config, files=lambda modules: {},
)  # fmt: skip
BASE3 = Owner(
    name="mlxlora", formats=("ternary",), mixes=False, linears_only=False, metadata={"format": "pt"},
    tensors=base3_folder.to_tensors,
    config=lambda scheme, modules, dtype: {"quantization_config": base3_folder.quantization_config(scheme)},
    files=lambda modules: {},
)  # fmt: skip
OWNERS = (MLX, BITSANDBYTES, QUANTO, BITNET)


def find_owner(scheme: Scheme, *, base3: bool = False) -> Owner:
    """Return who loads a folder of this scheme; base3: ternary weights in base 3, which only we read.

    >>> find_owner(Scheme("ternary", 2, 64)).name
    'mlx-lm'
    """
    if base3 and scheme.name not in BASE3.formats:
        raise ConfigError(f"--base3 is for ternary weights, not for {scheme}", expected="ternary-g64 or the like")
    found = BASE3 if base3 else next((owner for owner in OWNERS if scheme.name in owner.formats), None)
    if found is None:
        raise ConfigError(
            f"no tool loads folders of {scheme}", expected=", ".join(sum((o.formats for o in OWNERS), ()))
        )
    return found


def check_together(owner: Owner, scheme: Scheme, other: Scheme, *, place: str) -> None:
    """Raise ConfigError unless a folder of `scheme` may also hold `other`."""
    if other.name not in owner.formats:
        raise ConfigError(
            f'{place}: a folder of {scheme} is loaded by {owner.name}, which has no "{other}"',
            code="E204",
            expected=", ".join(owner.formats),
        )
    if not owner.mixes and other != scheme:
        raise ConfigError(
            f"{place}: {owner.name} reads one format per folder, and this one holds {scheme}",
            code="E204",
            expected=f"{scheme} or none",
        )
