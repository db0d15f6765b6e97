"""Closed schemas of adapter configs: what changes an adapter's mathematics is understood or refused by name."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from shared.errors import AdapterError, CapabilityError

CONFIG_FILE = "adapter_config.json"
# Settings of PEFT that change what an adapter computes, and the value that leaves it as we understand it.
PLAIN = {
    "bias": "none", "lora_bias": False, "fan_in_fan_out": False,
    "trainable_token_indices": None, "layer_replication": None,
    "alora_invocation_tokens": None, "use_qalora": False, "use_bdlora": None,
    "arrow_config": None, "kasa_config": None, "velora_config": None, "monteclora_config": None, "enable_lora": None,
}  # fmt: skip
# Settings of PEFT that are read, or say only which modules there are, how training went or where files lie.
KNOWN = frozenset((
    "peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern",
    "modules_to_save", "ensure_weight_tying", "target_parameters",
    "init_lora_weights", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "qalora_group_size", "runtime_config", "merge_weights", "unsloth_fixed", "mlxlora",
))  # fmt: skip
# Keys of mlx-lm that its loader reads; it writes every option of its command line beside them and ignores those.
MLX_KNOWN = frozenset(("fine_tune_type", "num_layers", "lora_parameters"))
MLX_PARAMETERS = frozenset(("rank", "scale", "dropout", "keys"))
# Values of init_lora_weights that leave the base's weights alone; pissa, olora, corda and loftq do not.
KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
MAX_PATTERN = 200
NESTED = re.compile(r"[*+}]\)?[*+{]")  # repeated repetitions take exponential time


def check_peft(config: Mapping[str, Any]) -> None:
    """Raise CapabilityError for the first setting that this version cannot compute."""
    if config.get("peft_type", "LORA") != "LORA":
        raise CapabilityError(f"the adapter is of PEFT type {config['peft_type']}", code="E404", expected="LORA")
    for key, plain in PLAIN.items():
        value = config.get(key, plain)
        if value and value != plain:
            raise refused(key, value, plain)
    for key, value in config.items():
        if value and key not in PLAIN and key not in KNOWN and key not in MLX_KNOWN:
            raise refused(key, value, None)
    start = config.get("init_lora_weights", True)
    if start not in KEEPS_BASE:
        raise CapabilityError(
            f"the adapter began with init_lora_weights {start}, which changes the base as well",
            code="E404",
            fix="convert it with PEFT: save_pretrained(folder, path_initial_model_for_weight_conversion=...)",
        )


def refused(key: str, value: Any, plain: Any) -> CapabilityError:
    """Return the error for a setting that would change the numbers."""
    shown = json.dumps(value, default=str)
    return CapabilityError(
        f"the adapter uses {key} ({shown[:80]}), which this version does not load",
        code="E404",
        expected=f"{key}: {json.dumps(plain)}",
    )


def check_mlx(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the `lora_parameters` of an mlx-lm config; raises AdapterError or CapabilityError."""
    kind, settings = config.get("fine_tune_type", "lora"), config.get("lora_parameters")
    if kind not in ("lora", "dora"):
        raise CapabilityError(f"the adapter is of mlx-lm type {kind}", code="E404", expected="lora or dora")
    if isinstance(settings, dict) and "alpha" in settings:
        raise CapabilityError(
            f"{CONFIG_FILE}: lora_parameters has alpha, which old mlx-lm multiplied with scale and today's ignores",
            code="E404",
            fix="write the final multiplier as scale and take alpha out",
        )
    if not isinstance(settings, dict) or "scale" not in settings or "rank" not in settings:
        raise AdapterError(
            f"{CONFIG_FILE} has no lora_parameters with rank and scale", code="E311", fix="is this mlx-lm's file?"
        )
    for key, value in settings.items():
        if value and key not in MLX_PARAMETERS:
            raise refused(f"lora_parameters.{key}", value, None)
    for key in ("use_rslora", "use_dora", "modules_to_save", *PLAIN) if "peft_type" not in config else ():
        if config.get(key) and config[key] != PLAIN.get(key):
            raise refused(key, config[key], PLAIN.get(key, False))
    return settings


def read_number(config: Mapping[str, Any], key: str, default: float) -> float:
    """Return a number of an adapter's config, `default` where it is absent or null; raises AdapterError."""
    value = default if config.get(key) is None else config[key]
    number = math.nan
    if isinstance(value, int | float) and not isinstance(value, bool):
        with suppress(OverflowError):  # JSON's whole numbers have no end
            number = float(value)
    if not math.isfinite(number):
        raise AdapterError(f"{CONFIG_FILE}: {key} is {value!r:.80}", code="E311", expected="a finite number")
    return number


def read_rank(config: Mapping[str, Any], key: str, default: int) -> int:
    """Return the rank of an adapter's config; raises AdapterError."""
    value = read_number(config, key, default)
    if value < 1 or value != int(value):
        raise AdapterError(f"{CONFIG_FILE}: {key} is {value:g}", code="E311", expected="a whole number from 1")
    return int(value)


def read_names(config: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """Return a list of names of an adapter's config, empty where it is absent or null; raises AdapterError."""
    found = config.get(key) or ()
    if not isinstance(found, list | tuple) or not all(isinstance(name, str) and name for name in found):
        raise AdapterError(f"{CONFIG_FILE}: {key} is {found!r:.80}", code="E311", expected="a list of names")
    return tuple(found)


def read_pattern(config: Mapping[str, Any], key: str) -> Mapping[str, float]:
    """Return PEFT's rank_pattern or alpha_pattern: expression -> number; raises AdapterError."""
    found = config.get(key) or {}
    if not isinstance(found, dict):
        raise AdapterError(f"{CONFIG_FILE}: {key} is {found!r}", code="E311", expected="an object of names and numbers")
    for name in found:
        try:
            usable = len(name) <= MAX_PATTERN and not NESTED.search(name) and bool(re.compile(name))
        except re.error:
            usable = False
        if not usable:
            raise AdapterError(f'{CONFIG_FILE}: {key} has "{name}"', code="E311", expected="names of modules")
    return {name: read_number(found, name, 0.0) for name in found}


def read_ranks(config: Mapping[str, Any]) -> Mapping[str, int]:
    """Return PEFT's rank_pattern: expression -> rank; raises AdapterError."""
    found = read_pattern(config, "rank_pattern")
    return {name: read_rank(found, name, 1) for name in found}


def match_pattern(pattern: Mapping[str, float], module: str, default: float) -> float:
    """Return the number of the first expression that stands for a module, as PEFT matches them.

    >>> match_pattern({"q_proj": 4, r"layers.1.mlp.*": 2}, "model.layers.1.mlp.up_proj", 8)
    2
    """
    return next((n for name, n in pattern.items() if re.match(rf"(.*\.)?({name})$", module)), default)


def named_base(config: Mapping[str, Any]) -> str | None:
    """Return the model that an adapter's config names, None where it names none."""
    named = config.get("base_model_name_or_path") or config.get("model")
    return named if isinstance(named, str) else None
