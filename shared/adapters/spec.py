"""Which modules an adapter config means, and the values it starts from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from shared.adapters.own import OWN, find_own, is_own, own_values
from shared.errors import CapabilityError, ConfigError, did_you_mean
from shared.experts import STACKED, is_stack
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
OF_EXPERTS = "PEFT and mlx-lm know plain LoRA of experts only"
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
    stacks = [] if config.targets == "all-linear" else sorted(info.experts, key=natural)
    tied = config.ensure_weight_tying and info.is_tied
    open_to = [*inside, *(name for name in stacks if layer_of(name) in layers)]
    open_to = sorted(open_to, key=natural)
    found = match_targets(config.targets, [*open_to, *ends], every=[*every, *stacks, *ends])
    modules = one_of_tied(found, info, tied=tied)
    saved = one_of_tied(match_saved(config.modules_to_save, info), info, tied=tied)
    check_saved(saved, modules)
    tied = tied and any(name in info.ends for name in (*modules, *saved))
    check_ends([name for name in modules if name in ends], config, tied=tied)
    ranks = by_pattern(config.rank_pattern, modules, key="rank_pattern", usual=config.rank)
    alphas = by_pattern(config.alpha_pattern, modules, key="alpha_pattern", usual=config.alpha)
    spec = AdapterSpec(
        config.type, rank=config.rank, alpha=float(config.alpha), dropout=config.dropout, modules=tuple(modules),
        ranks={name: int(rank) for name, rank in ranks.items()},
        alphas={name: float(alpha) for name, alpha in alphas.items()}, saved=tuple(saved), tied=tied,
    )  # fmt: skip
    check_stacks(spec)
    return spec


def one_of_tied(modules: Sequence[str], info: ModelInfo, *, tied: bool) -> list[str]:
    """Return modules with the embedding in place of the head that is tied to it."""
    table = next((name for name in info.ends if is_embedding(name)), None)
    renamed = [table if tied and table and name in info.ends else name for name in modules]
    return list(dict.fromkeys(renamed))


def match_saved(names: Sequence[str], info: ModelInfo) -> list[str]:
    """Return the modules that `modules_to_save` names, in model order; each name must match at least one."""
    every = sorted({*info.linears, *info.ends, *info.norms}, key=natural)
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


def check_stacks(spec: AdapterSpec) -> None:
    """Refuse adapters of experts that PEFT, which fuses gate and up, or mlx-lm could not compute."""
    stacks = [name for name in spec.modules if is_stack(name)]
    if not stacks:
        return
    if is_own(spec.kind) or spec.kind == "dora":
        raise ConfigError(
            f"adapter.type: {spec.kind} of experts (\"{stacks[0]}\"): {OF_EXPERTS}", code="E204",
            expected="lora or rslora", fix='take "experts" out of adapter.targets',
        )  # fmt: skip
    if spec.dropout:
        raise ConfigError(
            "adapter.dropout with experts among adapter.targets, which PEFT refuses to load", code="E204",
            fix="set adapter.dropout: 0",
        )  # fmt: skip
    for gate in (name.replace(".up_proj", ".gate_proj") for name in stacks if short_name(name) != "down_proj"):
        pair = (gate, gate.replace(".gate_proj", ".up_proj"))
        if not set(pair) <= set(stacks) or len({(spec.rank_of(name), spec.scale_of(name)) for name in pair}) > 1:
            raise ConfigError(
                f'adapter: "{gate}" and its up_proj are one tensor in transformers and PEFT', code="E204",
                expected="both among adapter.targets, with one rank and one alpha",
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
    kinds = sorted({"experts" if is_stack(name) else short_name(name) for name in every})
    for target in wanted:
        if target != "all-linear" and not any(is_match(target, name) for name in every):
            raise ConfigError(
                f'adapter.targets: "{target}" matches no linear module', code="E206",
                expected=f"all-linear or {', '.join(kinds)}",
                fix=of_experts(target, kinds) or (hint if "mean" in (hint := did_you_mean(target, kinds)) else None),
            )  # fmt: skip
    linear = {name for name in inside if not (ends_of([name]) or is_stack(name))} if "all-linear" in wanted else set()
    found = [name for name in inside if name in linear or any(is_match(target, name) for target in wanted)]
    if not found:
        raise ConfigError(
            "adapter.targets matches no module in the chosen layers", code="E206", fix="change adapter.layers"
        )
    return found


def of_experts(target: str, kinds: Sequence[str]) -> str | None:
    """Return what to write for a projection that only the experts have, None for anything else."""
    return f"experts.{target} means that of the experts" if target in STACKED and "experts" in kinds else None


def is_match(target: str, name: str) -> bool:
    """Return whether a target names a module: the whole path or its last parts; experts only where it says so.

    >>> is_match("q_proj", "model.layers.0.self_attn.q_proj"), is_match("proj", "model.layers.0.self_attn.q_proj")
    (True, False)
    >>> [is_match(target, "a.0.mlp.experts.up_proj") for target in ("experts", "experts.up_proj", "up_proj")]
    [True, True, False]
    """
    if is_stack(name):
        block = f".{name.rpartition('.')[0]}"
        return block.endswith("." + target) or ("experts." in target and f".{name}".endswith("." + target))
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


def initial_adapter(spec: AdapterSpec, linears: Mapping[str, tuple[int, ...]], *, seed: int) -> dict[str, Tensor]:
    """Return A (r, in) from U(-1/sqrt(in), 1/sqrt(in)) and B (out, r) zero, float32, for every module; of each expert.

    Of an embedding A (r, V) is zero and B (D, r) from N(0, 1), so that only tokens that occur are changed.
    Source: Hu et al. 2021 with PEFT's kaiming_uniform(a=sqrt(5)), which is this bound, and PEFT's embeddings.
    """
    if is_own(spec.kind):
        return own_values(spec, linears, seed=seed)
    tensors: dict[str, Tensor] = {}
    for name in spec.modules:
        sizes = factor_shapes(name, linears[name], rank=spec.rank_of(name))
        (first, A), (second, B) = sizes.items()
        start_A, start_B = np.zeros(A, dtype=np.float32), np.zeros(B, dtype=np.float32)
        if is_embedding(name):
            start_B = normal(seed=seed, name=name, shape=B)
        else:
            start_A = uniform(seed=seed, name=name, shape=A, bound=A[-1] ** -0.5)
        tensors[first], tensors[second] = Tensor("F32", start_A), Tensor("F32", start_B)
    return tensors


def factor_shapes(module: str, shape: tuple[int, ...], *, rank: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a module's two matrices by name; shape: (out, in), or (E, out, in) of a stack of experts.

    >>> factor_shapes("mlp.experts.up_proj", (4, 32, 16), rank=2)
    {'mlp.experts.up_proj.lora_A': (4, 2, 16), 'mlp.experts.up_proj.lora_B': (4, 32, 2)}
    """
    *stack, out, width = shape
    A, B = leaves_of(module)
    return {f"{module}.{A}": (*stack, rank, width), f"{module}.{B}": (*stack, out, rank)}


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
