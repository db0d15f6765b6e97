"""The adapter folder: one folder that PEFT and mlx-lm both load as it is, and foreign ones read.

PEFT: adapter_model.safetensors, A (r, in) and B (out, r). mlx-lm: adapters.safetensors, lora_a (in, r) and
lora_b (r, out). adapter_config.json carries the keys of both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shared.adapters.spec import ADAPTER_LEAVES, LAYER, layer_of, natural, short_name
from shared.errors import AdapterError, CapabilityError, ModelError
from shared.folder import read_json
from shared.tensors import load_file, save_file
from shared.types import AdapterSpec, ModelInfo, Tensor

PEFT_FILE, MLX_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapters.safetensors", "adapter_config.json"
PEFT_PREFIX = "base_model.model."
MLX_LEAVES = {"lora_A": "lora_a", "lora_B": "lora_b", "lora_magnitude_vector": "m"}
OWN_LEAVES = {leaf: own for own, leaf in MLX_LEAVES.items()}
# Settings of PEFT that change what an adapter computes, and the value that leaves it as we understand it.
PLAIN = {
    "bias": "none", "lora_bias": False, "modules_to_save": None, "rank_pattern": {},
    "alpha_pattern": {}, "fan_in_fan_out": False, "trainable_token_indices": None, "target_parameters": None,
    "layer_replication": None, "alora_invocation_tokens": None,
}  # fmt: skip
# Values of init_lora_weights that leave the base's weights alone; pissa, olora, corda and loftq do not.
KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Adapter:
    """An adapter read from a folder: what it is, its tensors under canonical names, and our own notes."""

    spec: AdapterSpec
    tensors: Mapping[str, Tensor]
    notes: Mapping[str, Any]  # what mlxlora wrote about the training, empty for foreign folders


def write_adapter(
    folder: Path, spec: AdapterSpec, tensors: Mapping[str, Tensor], info: ModelInfo, *, base: str, notes: dict[str, Any]
) -> None:
    """Write the files of an adapter into an existing folder; base: path or hub id of the model."""
    peft = {peft_name(name): tensor for name, tensor in tensors.items()}
    save_file(folder / PEFT_FILE, peft.items(), metadata={"format": "pt"})
    mlx = {mlx_name(name): turned(tensor) for name, tensor in tensors.items()}
    save_file(folder / MLX_FILE, mlx.items(), metadata={"format": "mlx"})
    config = {**peft_config(spec, info, base=base), **mlx_config(spec, info), "mlxlora": notes}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def peft_name(name: str) -> str:
    """Return PEFT's name of an adapter tensor.

    >>> peft_name("a.q_proj.lora_A"), peft_name("a.q_proj.lora_magnitude_vector")
    ('base_model.model.a.q_proj.lora_A.weight', 'base_model.model.a.q_proj.lora_magnitude_vector')
    """
    return f"{PEFT_PREFIX}{name}" if name.endswith(".lora_magnitude_vector") else f"{PEFT_PREFIX}{name}.weight"


def mlx_name(name: str) -> str:
    """Return mlx-lm's name of an adapter tensor.

    >>> mlx_name("a.q_proj.lora_A"), mlx_name("a.q_proj.lora_magnitude_vector")
    ('a.q_proj.lora_a', 'a.q_proj.m')
    """
    module, _, leaf = name.rpartition(".")
    return f"{module}.{MLX_LEAVES[leaf]}"


def turned(tensor: Tensor) -> Tensor:
    """Return the transposed matrix, contiguous; a vector stays as it is."""
    return Tensor(tensor.dtype, np.ascontiguousarray(tensor.data.T))


def peft_config(spec: AdapterSpec, info: ModelInfo, *, base: str) -> dict[str, Any]:
    """Return PEFT's keys; targets by short name where that means exactly the same modules, else by path."""
    kinds = sorted({short_name(name) for name in spec.modules})
    same = {name for name in info.linears if short_name(name) in kinds} == set(spec.modules)
    return {
        **PLAIN,
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": spec.rank,
        "lora_alpha": int(spec.alpha) if spec.alpha == int(spec.alpha) else spec.alpha,
        "lora_dropout": spec.dropout,
        "target_modules": kinds if same else list(spec.modules),
        "use_rslora": spec.kind == "rslora",
        "use_dora": spec.kind == "dora",
        "init_lora_weights": True,
        "inference_mode": True,
    }


def mlx_config(spec: AdapterSpec, info: ModelInfo) -> dict[str, Any]:
    """Return mlx-lm's keys. It adapts the last N blocks; a module it adapts and we did not stays zero there."""
    first = min(layer_of(name) or 0 for name in spec.modules)
    keys = sorted({LAYER.split(name, maxsplit=1)[2] for name in spec.modules})
    return {
        "fine_tune_type": "dora" if spec.kind == "dora" else "lora",
        "num_layers": info.num_layers - first,
        "lora_parameters": {"rank": spec.rank, "scale": spec.scale, "dropout": spec.dropout, "keys": keys},
    }


def read_adapter(folder: Path) -> Adapter:
    """Return the adapter of a folder written by us, PEFT or mlx-lm; raises AdapterError or CapabilityError."""
    if not folder.is_dir():
        raise AdapterError(f"no adapter folder at {folder}", expected=f"a folder with {CONFIG_FILE}")
    if not (folder / CONFIG_FILE).is_file():
        raise no_adapter(folder)
    try:
        config = read_json(folder / CONFIG_FILE)
        if (folder / PEFT_FILE).is_file():
            spec, tensors = from_peft(config, load_file(folder / PEFT_FILE))
        elif (folder / MLX_FILE).is_file():
            spec, tensors = from_mlx_lm(config, load_file(folder / MLX_FILE))
        else:
            raise no_tensors(folder)
    except ModelError as error:
        raise AdapterError(error.what, expected=error.expected, fix="copy or train the adapter again") from None
    notes = config.get("mlxlora")
    return Adapter(spec, tensors, notes if isinstance(notes, dict) else {})


def no_adapter(folder: Path) -> AdapterError:
    """Return the error for a folder that holds something else."""
    if (folder / "adapter" / CONFIG_FILE).is_file():
        return AdapterError(f"{folder} is a run folder", fix=f"use {folder / 'adapter'}")
    if (folder / "config.json").is_file():
        return AdapterError(f"{folder} is a whole model, not an adapter", fix="give it as MODEL, without --adapter")
    return AdapterError(f"{folder} has no {CONFIG_FILE}", fix="is this an adapter folder?")


def no_tensors(folder: Path) -> AdapterError:
    """Return the error for a folder without safetensors."""
    if (folder / "adapter_model.bin").is_file():
        return AdapterError(
            f"{folder} holds its adapter as pickle (adapter_model.bin), which can run code and is never loaded",
            fix="save it again with PEFT: model.save_pretrained(folder, safe_serialization=True)",
        )
    return AdapterError(f"{folder} has neither {PEFT_FILE} nor {MLX_FILE}", fix="is this an adapter folder?")


def from_peft(config: Mapping[str, Any], stored: Mapping[str, Tensor]) -> tuple[AdapterSpec, dict[str, Tensor]]:
    """Return spec and tensors of PEFT's files; what this version cannot compute is refused by name."""
    if config.get("peft_type", "LORA") != "LORA":
        raise CapabilityError(f"the adapter is of PEFT type {config['peft_type']}", expected="LORA")
    for key, plain in PLAIN.items():
        value = config.get(key, plain)
        if value and value != plain:
            raise CapabilityError(
                f"the adapter uses {key} ({value}), which this version does not load",
                expected=f"{key}: {json.dumps(plain)}",
            )
    if config.get("init_lora_weights", True) not in KEEPS_BASE:
        raise CapabilityError(
            f"the adapter began with init_lora_weights {config['init_lora_weights']}, which changes the base as well",
            fix="convert it with PEFT: save_pretrained(folder, path_initial_model_for_weight_conversion=...)",
        )
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        plain_name = name.removeprefix(PEFT_PREFIX).removesuffix(".weight")
        if not plain_name.endswith(ADAPTER_LEAVES):
            raise CapabilityError(
                f'the adapter holds "{name}", which this version does not load', expected="lora_A, lora_B"
            )
        tensors[plain_name] = tensor
    rank, alpha = read_rank(config, "r", 8), read_number(config, "lora_alpha", 8)
    dropout, kind = read_number(config, "lora_dropout", 0.0), "rslora" if config.get("use_rslora") else "lora"
    if config.get("use_dora"):
        kind, alpha = "dora", alpha * math.sqrt(rank) if kind == "rslora" else alpha
    return spec_of(tensors, kind=kind, rank=rank, alpha=alpha, dropout=dropout), tensors


def read_number(config: Mapping[str, Any], key: str, default: float) -> float:
    """Return a number of an adapter's config, `default` where it is absent or null; raises AdapterError."""
    value = default if config.get(key) is None else config[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise AdapterError(f"{CONFIG_FILE}: {key} is {value!r}", expected="a finite number")
    return float(value)


def read_rank(config: Mapping[str, Any], key: str, default: int) -> int:
    """Return the rank of an adapter's config; raises AdapterError."""
    value = read_number(config, key, default)
    if value < 1 or value != int(value):
        raise AdapterError(f"{CONFIG_FILE}: {key} is {value:g}", expected="a whole number from 1")
    return int(value)


def from_mlx_lm(config: Mapping[str, Any], stored: Mapping[str, Tensor]) -> tuple[AdapterSpec, dict[str, Tensor]]:
    """Return spec and tensors of mlx-lm's files."""
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise CapabilityError(f"the adapter is of mlx-lm type {kind}", expected="lora or dora")
    settings = config.get("lora_parameters")
    if not isinstance(settings, dict) or "scale" not in settings or "rank" not in settings:
        raise AdapterError(f"{CONFIG_FILE} has no lora_parameters with rank and scale", fix="is this mlx-lm's file?")
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        module, _, leaf = name.rpartition(".")
        if leaf not in OWN_LEAVES or len(tensor.shape) != (1 if leaf == "m" else 2):
            raise CapabilityError(
                f'the adapter holds "{name}", which this version does not load', expected="lora_a, lora_b"
            )
        tensors[f"{module}.{OWN_LEAVES[leaf]}"] = turned(tensor)
    rank, scale = read_rank(settings, "rank", 8), read_number(settings, "scale", 1.0)
    dropout = read_number(settings, "dropout", 0.0)
    return spec_of(tensors, kind=kind, rank=rank, alpha=scale * rank, dropout=dropout), tensors


def spec_of(tensors: Mapping[str, Tensor], *, kind: str, rank: int, alpha: float, dropout: float) -> AdapterSpec:
    """Return the spec that these tensors imply; raises AdapterError where a rank is not the stated one."""
    for name, tensor in tensors.items():
        if name.endswith(".lora_magnitude_vector"):
            continue
        found = tensor.shape[0] if name.endswith("lora_A") else tensor.shape[-1]
        if found != rank:
            raise AdapterError(f'adapter tensor "{name}" has rank {found}', expected=f"rank {rank} by {CONFIG_FILE}")
    modules = sorted({name.rpartition(".")[0] for name in tensors}, key=natural)
    if not modules:
        raise AdapterError("the adapter holds no tensors", fix="train it again")
    return AdapterSpec(kind, rank=rank, alpha=alpha, dropout=dropout, modules=tuple(modules))


def check_fit(adapter: Adapter, info: ModelInfo) -> None:
    """Raise AdapterError unless every adapted module is a linear layer of the model with the right widths."""
    missing = [name for name in adapter.spec.modules if name not in info.linears]
    if missing:
        raise AdapterError(
            f'the adapter does not fit this {info.family} model: it has no linear layer "{missing[0]}" '
            f"({len(missing)} of {len(adapter.spec.modules)} modules are missing)",
            fix="use the base that the adapter was trained on",
        )
    for name in adapter.spec.modules:
        out, width = info.linears[name]
        shapes: dict[str, tuple[int, ...]] = {
            "lora_A": (adapter.spec.rank, width),
            "lora_B": (out, adapter.spec.rank),
        }
        if adapter.spec.kind == "dora":
            shapes["lora_magnitude_vector"] = (out,)
        for leaf, shape in shapes.items():
            found = adapter.tensors.get(f"{name}.{leaf}")
            if found is None or tuple(found.shape) != shape:
                state = "is missing" if found is None else f"has shape {tuple(found.shape)}"
                raise AdapterError(
                    f'adapter tensor "{name}.{leaf}" {state}', expected=f"{shape} for this base",
                    fix="use the base that the adapter was trained on",
                )  # fmt: skip
