"""Which modules an adapter config means, and the values it starts from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from shared.adapters.own import OWN, find_own, is_own, own_values
from shared.errors import CapabilityError, ConfigError, did_you_mean
from shared.families import EMBEDDINGS
from shared.seeds import normal, uniform
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
    ".modules_to_save.weight",
    ".modules_to_save.bias",
)  # how names of adapter tensors end
SHARED_INPUT = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})  # siblings that read one tensor
SQUARED_ELEMENTS = 2**22  # widened to float64 at a time: 32 MiB
LAYER = re.compile(r"\.(\d+)\.")


def resolve(config: AdapterConfig, info: ModelInfo) -> AdapterSpec:
    """Return the spec of a config for a model; raises ConfigError where a target or layer matches nothing."""
    if config.type == "none":
        if info.num_experts > 1:
            raise CapabilityError(
                f"adapter.type: none of a {info.family} model: the zoos keep its {info.num_experts} experts as "
                "different tensors, a checkpoint would fit one backend only",
                expected="adapter.type: lora, rslora or dora",
            )
        if config.modules_to_save:
            raise ConfigError(
                "adapter.modules_to_save with adapter.type: none, which trains every module", code="E204",
                fix="leave one of them out",
            )  # fmt: skip
        return AdapterSpec("none", rank=1, alpha=1.0, dropout=0.0, modules=())
    if is_own(config.type):
        find_own(config.type)
    layers = chosen_layers(config, info)
    every = sorted(info.linears, key=natural)
    inside = [name for name in every if layer_of(name) in layers]
    ends = [] if config.targets == "all-linear" else sorted(info.ends, key=natural)
    tied = config.ensure_weight_tying and info.is_tied
    modules = one_of_tied(match_targets(config.targets, [*inside, *ends], every=[*every, *ends]), info, tied=tied)
    saved = one_of_tied(match_saved(config.modules_to_save, info), info, tied=tied)
    check_saved(saved, modules)
    tied = tied and any(name in info.ends for name in (*modules, *saved))
    check_ends([name for name in modules if name in ends], config, tied=tied)
    ranks = by_pattern(config.rank_pattern, modules, key="rank_pattern", usual=config.rank)
    alphas = by_pattern(config.alpha_pattern, modules, key="alpha_pattern", usual=config.alpha)
    return AdapterSpec(
        config.type, rank=config.rank, alpha=float(config.alpha), dropout=config.dropout, modules=tuple(modules),
        ranks={name: int(rank) for name, rank in ranks.items()},
        alphas={name: float(alpha) for name, alpha in alphas.items()}, saved=tuple(saved), tied=tied,
    )  # fmt: skip


def one_of_tied(modules: Sequence[str], info: ModelInfo, *, tied: bool) -> list[str]:
    """Return modules with the embedding in place of the head that is tied to it."""
    table = next((name for name in info.ends if is_embedding(name)), None)
    renamed = [table if tied and table and name in info.ends else name for name in modules]
    return list(dict.fromkeys(renamed))


def match_saved(names: Sequence[str], info: ModelInfo) -> list[str]:
    """Return the modules that `modules_to_save` names, in model order; each name must match at least one."""
    every = sorted({*info.adaptable, *info.norms}, key=natural)
    for target in names:
        if not any(is_match(target, name) for name in every):
            kinds = sorted({short_name(name) for name in every})
            raise ConfigError(
                f'adapter.modules_to_save: "{target}" matches no module', code="E206", expected=", ".join(kinds),
                fix=hint if "mean" in (hint := did_you_mean(target, kinds)) else None,
            )  # fmt: skip
    return [name for name in every if any(is_match(target, name) for target in names)]


def check_saved(saved: Sequence[str], modules: Sequence[str]) -> None:
    """Raise ConfigError for a module that would be trained whole and have an adapter too."""
    both = [name for name in saved if name in modules]
    if both:
        raise ConfigError(
            f'adapter: "{both[0]}" is in targets and in modules_to_save', code="E204",
            expected="an adapter, or the whole module", fix="take it out of one of them",
        )  # fmt: skip


def by_pattern(pattern: Mapping[str, float], modules: Sequence[str], *, key: str, usual: float) -> dict[str, float]:
    """Return the numbers of modules that have one of their own; raises ConfigError where a name matches none."""
    for target in pattern:
        if not any(is_match(target, name) for name in modules):
            raise ConfigError(
                f'adapter.{key}: "{target}" matches no adapted module', code="E206", expected="names as in targets"
            )
    own = {name: next((n for t, n in pattern.items() if is_match(t, name)), usual) for name in modules}
    return {name: number for name, number in own.items() if number != usual}


def check_ends(ends: Sequence[str], config: AdapterConfig, *, tied: bool) -> None:
    """Refuse embeddings and heads that the libraries would compute differently."""
    if ends and is_own(config.type):
        raise ConfigError(
            f'adapter.targets: "{ends[0]}" with an adapter of your own, which knows linear layers inside the decoder',
            code="E204", fix="take it out of adapter.targets, or put it in adapter.modules_to_save",
        )  # fmt: skip
    if config.type == "dora" and any(is_embedding(name) for name in ends):
        raise ConfigError(
            "adapter.targets: DoRA on an embedding: PEFT's magnitude has a number per dimension, mlx-lm's one per "
            "token",
            code="E204",
            fix="take the embedding out of adapter.targets, or adapter.type: lora",
        )
    if config.dropout and any(tied or not is_embedding(name) for name in ends):
        raise ConfigError(
            "adapter.dropout with a head among adapter.targets: the head is computed at supervised positions only, "
            "which the masks do not know", code="E204",
            fix="set adapter.dropout: 0, or take the head out of adapter.targets",
        )  # fmt: skip


def is_embedding(module: str) -> bool:
    """Return whether a module is an embedding, by its name.

    >>> is_embedding("model.embed_tokens"), is_embedding("lm_head")
    (True, False)
    """
    return short_name(module) in EMBEDDINGS


def ends_of(modules: Iterable[str]) -> list[str]:
    """Return the embeddings and heads among modules, by their names.

    >>> ends_of(["model.layers.0.mlp.up_proj", "lm_head"])
    ['lm_head']
    """
    return [name for name in modules if is_embedding(name) or name == "lm_head"]


def leaves_of(module: str) -> tuple[str, str]:
    """Return the names of a module's two matrices."""
    return ("lora_embedding_A", "lora_embedding_B") if is_embedding(module) else ("lora_A", "lora_B")


def chosen_layers(config: AdapterConfig, info: ModelInfo) -> set[int]:
    """Return the numbers of the layers to adapt: all, the last N, or those listed."""
    total = info.num_layers
    if config.layers == "all":
        return set(range(total))
    wanted = list(range(total - config.layers, total)) if isinstance(config.layers, int) else list(config.layers)
    outside = [n for n in wanted if not 0 <= n < total]
    if outside:
        asked = f"the last {config.layers}" if isinstance(config.layers, int) else f"layer {outside[0]}"
        raise ConfigError(
            f"adapter.layers asks for {asked}, the model has {total}", code="E206", expected=f"0 to {total - 1}"
        )
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
                f'adapter.targets: "{target}" matches no linear module', code="E206",
                expected=f"all-linear or {', '.join(kinds)}",
                fix=hint if "mean" in (hint := did_you_mean(target, kinds)) else None,
            )  # fmt: skip
    found = [name for name in inside if any(is_match(target, name) for target in wanted)]
    if not found:
        raise ConfigError(
            "adapter.targets matches no module in the chosen layers", code="E206", fix="change adapter.layers"
        )
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

    Of an embedding A (r, V) is zero and B (D, r) from N(0, 1), so that only tokens that occur are changed.
    Source: Hu et al. 2021 with PEFT's kaiming_uniform(a=sqrt(5)), which is this bound, and PEFT's embeddings.
    """
    if is_own(spec.kind):
        return own_values(spec, linears, seed=seed)
    tensors: dict[str, Tensor] = {}
    for name in spec.modules:
        out, width = linears[name]
        rank = spec.rank_of(name)
        if is_embedding(name):
            tensors[f"{name}.lora_embedding_A"] = Tensor("F32", np.zeros((rank, width), dtype=np.float32))
            tensors[f"{name}.lora_embedding_B"] = Tensor("F32", normal(seed=seed, name=name, shape=(out, rank)))
            continue
        values = uniform(seed=seed, name=name, shape=(rank, width), bound=width**-0.5)
        tensors[f"{name}.lora_A"] = Tensor("F32", values)
        tensors[f"{name}.lora_B"] = Tensor("F32", np.zeros((out, rank), dtype=np.float32))
    return tensors


def within_layers(spec: AdapterSpec, info: ModelInfo) -> AdapterSpec:
    """Return the part of a spec that is about the decoder's layers."""
    return replace(spec, modules=tuple(name for name in spec.modules if name in info.linears))


def first_values(spec: AdapterSpec, model: Model, *, seed: int) -> dict[str, Tensor]:
    """Return what an adapter starts from: A and B of the seed, of the base DoRA's magnitudes and whole modules."""
    whole = {name: tensor for name, tensor in model.tensors("adapter") if is_saved(name)} if spec.saved else {}
    return {**initial_adapter(spec, model.info.adaptable, seed=seed), **model.magnitudes(), **whole}


def is_trained(name: str) -> bool:
    """Return whether a tensor is an adapter's, not the base's."""
    return name.endswith(ADAPTER_LEAVES) or OWN in name


def is_saved(name: str) -> bool:
    """Return whether a tensor is of a module that is trained whole."""
    return name.endswith((".modules_to_save.weight", ".modules_to_save.bias"))


def row_squares(weight: Tensor) -> np.ndarray:
    """Return (O,) float32: the sum of squares of each row, added in float64 and so the same on every backend.

    >>> row_squares(Tensor("F32", np.float32([[3, 4], [0, 2]]))).tolist()
    [25.0, 4.0]
    """
    rows = max(SQUARED_ELEMENTS // weight.shape[1], 1)
    parts = (Tensor(weight.dtype, weight.data[n : n + rows]) for n in range(0, weight.shape[0], rows))
    wide = (to_float32(part).astype(np.float64) for part in parts)
    return np.concatenate([np.einsum("od,od->o", part, part) for part in wide]).astype(np.float32)
