"""Mixtures of experts: where a folder stores the experts of a layer, and what both zoos make of them.

On disk every expert has matrices of its own. transformers 5 stacks them as `experts.gate_up_proj` (E, 2 I, D), gate
above up, and `experts.down_proj` (E, D, I); mlx-lm as three stacks under `switch_mlp`. An adapter knows three stacks as
well, by transformers' block: `mlp.experts.gate_proj`, `up_proj` and `down_proj`.
Legend: E experts, I width of an expert, D model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.errors import CapabilityError

# Family -> the block that holds the experts on disk, and the names of gate, up and down in each of them.
MIXTURES: Mapping[str, tuple[str, tuple[str, str, str]]] = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    "qwen2_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}
COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
ROUTERS = (".block_sparse_moe.gate", ".mlp.gate", ".mlp.shared_expert_gate")
BLOCK = "mlp"  # of transformers 5, in every family
STACKED = ("gate_proj", "up_proj", "down_proj")
STACK = ".switch_mlp."  # mlx-lm's, under the same block
EXPERT = re.compile(r"\.(experts|switch_mlp)\.")
ADAPTED = re.compile(rf"\.experts\.({'|'.join(STACKED)})$")
IN_MLX_LM = re.compile(rf"\.\w+\.switch_mlp\.(?=({'|'.join(STACKED)})(\.|$))")
FLOAT_EXPERTS = "not quantized: the experts of the {family} model; a float copy of all of them stays in memory"


def num_experts(config: Mapping[str, Any]) -> int:
    """Return how many experts a layer has; 1 for a dense model."""
    return max((config[key] for key in COUNTS if isinstance(config.get(key), int)), default=1)


def check_mixture(path: Path, config: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuse experts whose layout, in the family or in this folder, is not known."""
    family, number = str(config.get("model_type")), num_experts(config)
    if number > 1 and family not in MIXTURES:
        raise CapabilityError(
            f'"{family}" is a Mixture-of-Experts model ({number} experts) of a family that this version does not know',
            expected=", ".join(sorted(MIXTURES)), fix="use a dense model, or one of these families",
        )  # fmt: skip
    held = {name.rpartition(".")[0] for name in names if name.endswith(".scales")}
    stacks = (name for name in names if STACK in name or ".experts.gate_up_proj" in name)
    stacked = next((name for name in stacks if name.rpartition(".")[0] not in held), None)
    if number > 1 and stacked:
        raise CapabilityError(
            f'{path}: the experts are stacked in float ("{stacked}"), which this version does not read',
            expected="one tensor per expert, as on the hub, or stacks that mlx-lm quantized",
            fix="use the original folder",
        )  # fmt: skip


def is_router(family: str, module: str) -> bool:
    """Return whether a module only chooses or weighs experts; it stays as it is.

    >>> is_router("qwen2_moe", "model.layers.0.mlp.shared_expert_gate"), is_router("llama", "model.layers.0.mlp.gate")
    (True, False)
    """
    return family in MIXTURES and module.endswith(ROUTERS)


def is_expert(module: str) -> bool:
    """Return whether a stored module is one of many experts.

    >>> is_expert("model.layers.0.mlp.experts.7.up_proj"), is_expert("model.layers.0.mlp.shared_expert.up_proj")
    (True, False)
    """
    return EXPERT.search(module + ".") is not None


def is_stack(module: str) -> bool:
    """Return whether a module is all experts' matrices of one kind, by the name that adapters give it.

    >>> is_stack("model.layers.0.mlp.experts.up_proj"), is_stack("model.layers.0.mlp.experts.7.up_proj")
    (True, False)
    """
    return ADAPTED.search(module) is not None


def own_stack(name: str) -> str:
    """Return a tensor's name with the stack's name that adapters give it, of mlx-lm's; any other stays as it is.

    >>> own_stack("model.layers.0.block_sparse_moe.switch_mlp.up_proj.lora_a")
    'model.layers.0.mlp.experts.up_proj.lora_a'
    """
    return IN_MLX_LM.sub(f".{BLOCK}.experts.", name)


def mlx_stack(family: str, name: str) -> str:
    """Return mlx-lm's name of a stack, or of a tensor of it, in a model of a family.

    >>> mlx_stack("mixtral", "model.layers.0.mlp.experts.up_proj")
    'model.layers.0.block_sparse_moe.switch_mlp.up_proj'
    """
    block = MIXTURES[family][0] if family in MIXTURES else BLOCK
    return name.replace(f".{BLOCK}.experts.", f".{block}{STACK}")


def stack_shapes(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int, int]]:
    """Return the shapes (E, O, I) of the experts' stacks by the names that adapters give them.

    shapes: (O, I) of stored modules, one by one or the quantized stacks of mlx-lm, whose rows stand below each other.
    """
    number = num_experts(config)
    if config.get("model_type") not in MIXTURES or number == 1:
        return {}
    block, leaves = MIXTURES[config["model_type"]]
    own, found = dict(zip(leaves, STACKED, strict=True)), {}
    for module, (out, width) in ((name, shape) for name, shape in shapes.items() if len(shape) == 2):
        layer, inside, leaf = module.partition(f".{block}.experts.0.")
        stacked = own_stack(module)
        if inside:
            found[f"{layer}.{BLOCK}.experts.{own[leaf]}"] = (number, out, width)
        elif stacked != module:
            found[stacked] = (number, out // number, width)
    return found


def in_block(config: Mapping[str, Any], module: str) -> str:
    """Return transformers' name of a module that mlx-lm stores.

    >>> in_block({"model_type": "mixtral"}, "model.layers.0.block_sparse_moe.gate")
    'model.layers.0.mlp.gate'
    """
    block = MIXTURES[config["model_type"]][0] if config.get("model_type") in MIXTURES else BLOCK
    return module.replace(f".{block}.", f".{BLOCK}.")


def stored_names(config: Mapping[str, Any], name: str) -> list[list[str]] | None:
    """Return which stored tensors make up transformers' tensor `name`, where they have other names; else None.

    A list per expert, whose tensors stand one above the other; a router is a list of one.

    >>> config = {"model_type": "mixtral", "num_local_experts": 2}
    >>> stored_names(config, "model.layers.0.mlp.experts.down_proj")
    [['model.layers.0.block_sparse_moe.experts.0.w2.weight'], ['model.layers.0.block_sparse_moe.experts.1.w2.weight']]
    """
    if config.get("model_type") not in MIXTURES:
        return None
    block, (gate, up, down) = MIXTURES[config["model_type"]]
    layer, _, part = name.partition(f".{BLOCK}.")
    parts = {"experts.gate_up_proj": (gate, up), "experts.down_proj": (down,)}.get(part)
    if parts is None:
        return [[f"{layer}.{block}.{part}"]] if block != BLOCK and part else None
    prefix = f"{layer}.{block}.experts"
    return [[f"{prefix}.{number}.{leaf}.weight" for leaf in parts] for number in range(num_experts(config))]


def expert_names(config: Mapping[str, Any], layer: str, leaf: str) -> list[str]:
    """Return the stored tensors, by expert, of one of the matrices `STACKED` of a layer."""
    block, leaves = MIXTURES[config["model_type"]]
    stored = leaves[STACKED.index(leaf)]
    return [f"{layer}.{block}.experts.{number}.{stored}.weight" for number in range(num_experts(config))]


def stacked_shapes(
    found: Mapping[str, tuple[int, ...]], sources: Mapping[str, list[list[str]]]
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a folder's tensors by transformers' names; sources: `stored_names` of those that differ.

    An incomplete stack is left as it is stored, so that the check of names tells what is missing.
    """
    shapes = dict(found)
    for name, experts in sources.items():
        parts = [stored for expert in experts for stored in expert]
        sizes = {tuple(found[stored] for stored in expert if stored in found) for expert in experts}
        if not all(stored in found for stored in parts) or len(sizes) != 1:
            continue
        (size,) = sizes
        rows = (sum(shape[0] for shape in size), *size[0][1:])
        shapes[name] = (len(experts), *rows) if name.rpartition(".")[0].endswith(".experts") else rows
        for stored in parts:
            del shapes[stored]
    return shapes
