"""Which modules an adapter config means, and the values it starts from."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from shared.errors import ConfigError, did_you_mean
from shared.seeds import uniform
from shared.tensors import to_float32
from shared.types import AdapterSpec, ModelInfo, Tensor

if TYPE_CHECKING:
    from shared.config import AdapterConfig
    from shared.protocols import Model

ADAPTER_LEAVES = (
    ".lora_A",
    ".lora_B",
    ".lora_magnitude_vector",
    ".lora_embedding_A",
    ".lora_embedding_B",
)  # how names of adapter tensors end
SHARED_INPUT = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})  # siblings that read one tensor
SQUARED_ELEMENTS = 2**22  # widened to float64 at a time: 32 MiB
LAYER = re.compile(r"\.(\d+)\.")


def resolve(config: AdapterConfig, info: ModelInfo) -> AdapterSpec:
    """Return the spec of a config for a model; raises ConfigError where a target or layer matches nothing."""
    if config.type == "none":
        return AdapterSpec("none", rank=1, alpha=1.0, dropout=0.0, modules=())
    layers = chosen_layers(config, info)
    every = sorted(info.linears, key=natural)
    inside = [name for name in every if layer_of(name) in layers]
    modules = match_targets(config.targets, inside, every=every)
    return AdapterSpec(
        config.type, rank=config.rank, alpha=float(config.alpha), dropout=config.dropout, modules=tuple(modules)
    )


def chosen_layers(config: AdapterConfig, info: ModelInfo) -> set[int]:
    """Return the numbers of the layers to adapt: all, the last N, or those listed."""
    total = info.num_layers
    if config.layers == "all":
        return set(range(total))
    wanted = list(range(total - config.layers, total)) if isinstance(config.layers, int) else list(config.layers)
    outside = [n for n in wanted if not 0 <= n < total]
    if outside:
        asked = f"the last {config.layers}" if isinstance(config.layers, int) else f"layer {outside[0]}"
        raise ConfigError(f"adapter.layers asks for {asked}, the model has {total}", expected=f"0 to {total - 1}")
    return set(wanted)


def match_targets(targets: str | Sequence[str], inside: Sequence[str], *, every: Sequence[str]) -> list[str]:
    """Return the modules that the targets name, in model order; each target must match at least one."""
    if targets == "all-linear":
        return list(inside)
    wanted = [targets] if isinstance(targets, str) else list(targets)
    kinds = sorted({short_name(name) for name in every})
    for target in wanted:
        if not any(is_match(target, name) for name in every):
            raise ConfigError(
                f'adapter.targets: "{target}" matches no linear module', expected=f"all-linear or {', '.join(kinds)}",
                fix=hint if "mean" in (hint := did_you_mean(target, kinds)) else None,
            )  # fmt: skip
    found = [name for name in inside if any(is_match(target, name) for target in wanted)]
    if not found:
        raise ConfigError("adapter.targets matches no module in the chosen layers", fix="change adapter.layers")
    return found


def is_match(target: str, name: str) -> bool:
    """Return whether a target names a module: the whole path or its last parts.

    >>> is_match("q_proj", "model.layers.0.self_attn.q_proj"), is_match("proj", "model.layers.0.self_attn.q_proj")
    (True, False)
    """
    return name == target or name.endswith("." + target)


def shared_inputs(spec: AdapterSpec) -> list[tuple[str, ...]]:
    """Return groups of modules that read the same input and have one scale, as far as the spec adapts them.

    >>> shared_inputs(AdapterSpec("lora", 8, 16.0, 0.0, ("a.0.k_proj", "a.0.o_proj", "a.0.q_proj")))
    [('a.0.k_proj', 'a.0.q_proj')]
    """
    groups: dict[tuple[str, int, float], list[str]] = {}
    for name in spec.modules:
        parent, _, leaf = name.rpartition(".")
        for number, leaves in enumerate(SHARED_INPUT):
            if leaf in leaves:
                groups.setdefault((parent, number, spec.scale_of(name)), []).append(name)
    return [tuple(names) for names in groups.values() if len(names) > 1]


def layer_of(name: str) -> int | None:
    """Return the layer number in a canonical name.

    >>> layer_of("model.layers.12.mlp.up_proj")
    12
    """
    match = LAYER.search(name)
    return int(match[1]) if match else None


def natural(name: str) -> list[tuple[int, str]]:
    """Return a sort key that puts layer 2 before layer 10, the same order on every backend."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def short_name(name: str) -> str:
    """Return a module's own name, without its path."""
    return name.rsplit(".", 1)[-1]


def initial_adapter(spec: AdapterSpec, linears: Mapping[str, tuple[int, int]], *, seed: int) -> dict[str, Tensor]:
    """Return A (r, in) from U(-1/sqrt(in), 1/sqrt(in)) and B (out, r) zero, float32, for every module.

    Source: Hu et al. 2021 with PEFT's kaiming_uniform(a=sqrt(5)), which is this bound.
    """
    tensors: dict[str, Tensor] = {}
    for name in spec.modules:
        out, width = linears[name]
        rank = spec.rank_of(name)
        values = uniform(seed=seed, name=name, shape=(rank, width), bound=width**-0.5)
        tensors[f"{name}.lora_A"] = Tensor("F32", values)
        tensors[f"{name}.lora_B"] = Tensor("F32", np.zeros((out, rank), dtype=np.float32))
    return tensors


def first_values(spec: AdapterSpec, model: Model, *, seed: int) -> dict[str, Tensor]:
    """Return what an adapter starts from: A and B of the seed, and DoRA's magnitudes of the base's weights."""
    return {**initial_adapter(spec, model.info.linears, seed=seed), **model.magnitudes()}


def row_squares(weight: Tensor) -> np.ndarray:
    """Return (O,) float32: the sum of squares of each row, added in float64 and so the same on every backend.

    >>> row_squares(Tensor("F32", np.float32([[3, 4], [0, 2]]))).tolist()
    [25.0, 4.0]
    """
    rows = max(SQUARED_ELEMENTS // weight.shape[1], 1)
    parts = (Tensor(weight.dtype, weight.data[n : n + rows]) for n in range(0, weight.shape[0], rows))
    wide = (to_float32(part).astype(np.float64) for part in parts)
    return np.concatenate([np.einsum("od,od->o", part, part) for part in wide]).astype(np.float32)
