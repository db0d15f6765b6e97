"""Names -> "module:attribute", resolved when used, so that nobody imports a framework by accident."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar

from shared.errors import CapabilityError, ConfigError, did_you_mean
from shared.types import TERNARY_RULES

if TYPE_CHECKING:
    from shared.protocols import Backend, Quantizer
    from shared.types import Scheme

T = TypeVar("T")
BACKENDS = {"mlx": "mlxlora.backend:create", "torch": "torch_backend.backend:create"}
QUANTIZERS = {  # Scheme.codec: the format, and "+solver" where the config names one
    "affine": "shared.quant.affine:AffineQuantizer",
    "affine+hqq": "shared.quant.hqq:HQQuantizer",
    **dict.fromkeys(("mxfp4", "nvfp4", "mxfp8"), "shared.quant.microscaling:MicroscalingQuantizer"),
    "ternary": "shared.quant.ternary:TernaryQuantizer",
    **{f"ternary+{rule}": "shared.quant.ternary:TernaryQuantizer" for rule in TERNARY_RULES},
    **dict.fromkeys(("bitnet", "bitnet-inverse"), "shared.quant.bitnet:BitnetQuantizer"),
    **{f"quanto-{kind}": "shared.quant.quanto:QuantoQuantizer" for kind in ("qint2", "qint4", "qint8", "qfloat8")},
    "nf4": "shared.quant.four_bit:FourBitQuantizer",
    "fp4": "shared.quant.four_bit:FourBitQuantizer",
    "int8": "shared.quant.row_int8:RowInt8Quantizer",
}
OBJECTIVES = {"sft": "shared.objectives.sft:sft"}
INSTALL = {
    "mlx": 'pip install "mlxlora[mlx-cpu]" (Linux) or "mlxlora" (Mac with Apple silicon)',
    "torch": 'pip install "mlxlora[torch]", or "mlxlora[cuda]" on a GPU server',
}


def resolve(table: dict[str, str], name: str, what: str) -> Any:
    """Return the object a table names; raises ConfigError with the nearest known name."""
    if name not in table:
        raise ConfigError(f'unknown {what} "{name}"', fix=did_you_mean(name, table))
    module, attribute = table[name].split(":")
    return getattr(importlib.import_module(module), attribute)


def import_own(name: str, kind: type[T], *, key: str) -> T:
    """Return what a user's "package.module:NAME" stands for; raises ConfigError where it is no `kind`."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f'{key}: no "{name}": {error}', code="E202", fix="put its folder on PYTHONPATH, or correct it"
        ) from None
    if not isinstance(found, kind):
        raise ConfigError(
            f'{key}: "{name}" is a {type(found).__name__}', code="E202", expected=f"a {kind.__module__}.{kind.__name__}"
        )
    return found


def find_quantizer(scheme: Scheme) -> Quantizer:
    """Return the codec of a scheme."""
    return resolve(QUANTIZERS, scheme.codec, "quantization")(scheme)


def check_installed(name: str) -> None:
    """Raise CapabilityError where a backend's packages are not installed; imports none of them."""
    if name == "auto":
        return
    missing = [package for package in resolve(BACKENDS, name, "backend")().needs if not find_spec(package)]
    if missing:
        raise CapabilityError(
            f'backend "{name}" is not available: {missing[0]} is not installed', code="E401", fix=INSTALL[name]
        )


def find_backend(name: str) -> Backend:
    """Return a backend that runs on this machine; "auto" takes MLX on a Mac, else torch with CUDA, else any.

    Raises CapabilityError with the install line where none does.
    """
    if name != "auto":
        backend = resolve(BACKENDS, name, "backend")()
        found = backend.probe()
        if not found.available:
            raise CapabilityError(
                f'backend "{name}" is not available: {found.reason}', code="E401", fix=found.fix or INSTALL[name]
            )
        return backend
    probes = {key: resolve(BACKENDS, key, "backend")() for key in BACKENDS}
    able = {key: backend for key, backend in probes.items() if backend.probe().available}
    for key in preferred_order({key: backend.probe().device for key, backend in able.items()}):
        return able[key]
    reasons = "; ".join(f"{key}: {backend.probe().reason}" for key, backend in probes.items())
    raise CapabilityError(f"no backend is available ({reasons})", code="E401", fix="; or ".join(INSTALL.values()))


def preferred_order(devices: dict[str, str]) -> list[str]:
    """Return backend names, an accelerator before a CPU, torch before MLX on a CPU (it is faster there).

    >>> preferred_order({"mlx": "gpu", "torch": "cpu"})
    ['mlx', 'torch']
    >>> preferred_order({"mlx": "cpu", "torch": "cpu"})
    ['torch', 'mlx']
    """
    rank = {"mlx": 1, "torch": 0}
    return sorted(devices, key=lambda key: (devices[key] == "cpu", rank.get(key, 2)))
