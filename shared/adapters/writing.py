"""What PEFT and mlx-lm keep of an adapter: a config and named tensors of each, from one spec.

PEFT says rank and alpha per module where they differ. mlx-lm has one rank and one scale: there smaller ranks are filled
up with zeros, and another scale goes into lora_b.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shared.adapters.fused import Fused, fuse_experts
from shared.adapters.hashes import hashes_of
from shared.adapters.names import MLX_FILE, OWN_FILE, PEFT_FILE, SAVED, mlx_name, peft_name, turned, twin
from shared.adapters.own import is_own
from shared.adapters.schema import CONFIG_FILE
from shared.adapters.spec import LAYER, ends_of, is_embedding, is_saved, layer_of, leaves_of, natural, short_name
from shared.durable import write_json
from shared.experts import is_stack
from shared.hub import split_revision
from shared.tensors import from_float32, save_file, to_float32
from shared.types import AdapterSpec, ModelInfo, Tensor

METADATA = {PEFT_FILE: {"format": "pt"}, MLX_FILE: {"format": "mlx"}}


@dataclass(frozen=True)
class Facts:
    """What is known of the base: how many layers, the names of its modules, its family; None where nobody said."""

    num_layers: int | None = None
    modules: frozenset[str] | None = None
    family: str | None = None


@dataclass(frozen=True)
class Layout:
    """An adapter as one library keeps it."""

    file: str
    config: dict[str, Any]
    tensors: Mapping[str, Tensor]


def write_adapter(
    folder: Path, spec: AdapterSpec, tensors: Mapping[str, Tensor], info: ModelInfo, *, base: str, notes: dict[str, Any]
) -> None:
    """Write the files of an adapter, for both libraries, into an existing folder; base: path or hub id of the model."""
    if is_own(spec.kind):
        save_file(folder / OWN_FILE, tensors.items(), metadata={"format": "mlxlora"})
        own = {**notes, "spec": asdict(spec), "sha256": hashes_of(folder)}
        write_config(folder, {"base_model_name_or_path": base, "mlxlora": own})
        return
    facts = Facts(info.num_layers, frozenset(info.adaptable), info.family)
    layouts = [to_peft(spec, tensors, facts, base=base)]
    if why_not_mlx(spec, tied=info.is_tied) is None:
        layouts.append(to_mlx(spec, tensors, facts))
    for layout in layouts:
        save_file(folder / layout.file, layout.tensors.items(), metadata=METADATA[layout.file])
    config = {key: value for one in layouts for key, value in one.config.items()}
    write_config(folder, {**config, "mlxlora": {**notes, "sha256": hashes_of(folder)}})


def why_not_mlx(spec: AdapterSpec, *, tied: bool) -> str | None:
    """Return why mlx-lm cannot load an adapter, None where it can; tied: the base's head is its embedding."""
    if is_own(spec.kind):
        return f"{spec.kind} computes it, which mlx-lm does not know"
    if spec.saved:
        return f'mlx-lm has no place for modules that are trained whole ("{spec.saved[0]}", modules_to_save)'
    ends = ends_of(spec.modules)
    if ends and tied and not spec.tied:
        return f'mlx-lm adapts embedding and head of this base as the one tensor that they are, here "{ends[0]}" alone'
    return None


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write adapter_config.json."""
    write_json(folder / CONFIG_FILE, config, sort=True)


def to_peft(spec: AdapterSpec, tensors: Mapping[str, Tensor], facts: Facts, *, base: str | None) -> Layout:
    """Return an adapter as PEFT keeps it; base: what its config calls the model."""
    targets, layers = peft_targets([name for name in spec.modules if not is_stack(name)], facts)
    experts = fuse_experts(spec, tensors)
    parameters = peft_parameters(experts, facts)
    ranks = {name: rank for name, rank in spec.ranks.items() if not is_stack(name)}
    alphas = {name: alpha for name, alpha in spec.alphas.items() if not is_stack(name)}
    ranks |= {parameters[name]: rank for name, rank in experts.ranks.items() if rank != spec.rank}
    alphas |= {parameters[name]: alpha for name, alpha in experts.alphas.items() if alpha != spec.alpha}
    name, revision = split_revision(base) if base else (None, None)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        **({"revision": revision} if revision else {}),
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": list(spec.saved) or None,
        **({"ensure_weight_tying": True} if spec.tied else {}),
        "r": spec.rank,
        "lora_alpha": plain_number(spec.alpha),
        "rank_pattern": ranks,
        "alpha_pattern": {name: plain_number(alpha) for name, alpha in alphas.items()},
        "lora_dropout": spec.dropout,
        "target_modules": targets,
        **({"target_parameters": list(dict.fromkeys(parameters.values()))} if parameters else {}),
        "layers_to_transform": layers,
        "use_rslora": spec.kind == "rslora",
        "use_dora": spec.kind == "dora",
        "init_lora_weights": True,
        "inference_mode": True,
    }
    whole = {**tensors, **twins(tensors)} if spec.tied else tensors
    whole = {name: tensor for name, tensor in whole.items() if not is_stack(name.rpartition(".")[0])} | experts.tensors
    return Layout(PEFT_FILE, config, {peft_name(name): tensor for name, tensor in whole.items()})


def peft_parameters(experts: Fused, facts: Facts) -> dict[str, str]:
    """Return what to call adapted parameters of experts: by their ends where that means just these, and all alike."""
    blocks = {name.rpartition(".")[0] for name in facts.modules or () if is_stack(name)}
    shown = {}
    for name, rank in experts.ranks.items():
        leaf, block = short_name(name), name.rpartition(".")[0]
        same = [other for other in experts.ranks if short_name(other) == leaf and experts.ranks[other] == rank]
        whole = {other.rpartition(".")[0] for other in same} == blocks
        whole = whole and len({experts.alphas[other] for other in same}) == 1
        shown[name] = f"{'.'.join(block.split('.')[-2:])}.{leaf}" if whole else name
    return shown


def twins(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the head's tensors that PEFT saves beside those of the embedding that it is tied to."""
    table = next(one for one in (name.rpartition(".")[0].removesuffix(SAVED) for name in tensors) if is_embedding(one))
    leaves = ("lora_A", "lora_B", "modules_to_save.weight")
    found = {f"lm_head.{leaf}": tensors.get(twin(f"lm_head.{leaf}", table)) for leaf in leaves}
    return {name: held if is_saved(name) else turned(held) for name, held in found.items() if held is not None}


def plain_number(value: float) -> int | float:
    """Return a whole number as int, as PEFT writes alpha."""
    return int(value) if value == int(value) else value


def peft_targets(modules: Sequence[str], facts: Facts) -> tuple[list[str], list[int] | None]:
    """Return target_modules and layers_to_transform: short names where they mean just these modules, else paths."""
    kinds = sorted({short_name(name) for name in modules})
    if facts.modules is not None:
        same = {one for one in facts.modules if short_name(one) in kinds and not is_stack(one)} == set(modules)
        return (kinds if same else list(modules)), None
    by_layer = parts_by_layer(modules)
    if None in by_layer or len(set(map(frozenset, by_layer.values()))) != 1:
        return list(modules), None
    layers = sorted(layer for layer in by_layer if layer is not None)
    return kinds, None if facts.num_layers == len(layers) else layers


def parts_by_layer(modules: Sequence[str]) -> dict[int | None, set[str]]:
    """Return the adapted paths inside each layer; those outside of all layers under None."""
    found: dict[int | None, set[str]] = {}
    for name in modules:
        found.setdefault(layer_of(name), set()).add(LAYER.split(name, maxsplit=1)[-1])
    return found


def to_mlx(spec: AdapterSpec, tensors: Mapping[str, Tensor], facts: Facts) -> Layout:
    """Return an adapter as mlx-lm keeps it."""
    family = facts.family or ""
    places = [mlx_name(f"{name}.lora_A", family=family).removesuffix(".lora_a") for name in spec.modules]
    num_layers, keys = mlx_keys(places, facts)
    scale, rank = common_scale(spec), max(spec.rank_of(name) for name in spec.modules)
    config = {
        "fine_tune_type": "dora" if spec.kind == "dora" else "lora",
        "num_layers": num_layers,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": spec.dropout, "keys": keys},
    }
    even = dict(tensors)
    for module in spec.modules:
        A, B = (f"{module}.{leaf}" for leaf in leaves_of(module))
        even[A] = with_zeros(tensors[A], rank, axis=-2)
        even[B] = folded(with_zeros(tensors[B], rank, axis=-1), spec.scale_of(module) / scale)
    return Layout(MLX_FILE, config, {mlx_name(name, family=family): turned(tensor) for name, tensor in even.items()})


def mlx_keys(modules: Sequence[str], facts: Facts) -> tuple[int, list[str]]:
    """Return num_layers and keys. mlx-lm adapts the last N blocks by paths inside them, and whole paths anywhere."""
    by_layer = parts_by_layer(modules)
    outside = by_layer.pop(None, set())
    layers = sorted(layer for layer in by_layer if layer is not None)
    total = facts.num_layers
    if layers and len(set(map(frozenset, by_layer.values()))) == 1:
        inside = next(iter(by_layer.values()))
        if total is None and layers == list(range(len(layers))):
            return -1, sorted(inside | outside)  # all blocks; those without tensors stay as they are
        if total is not None and layers == list(range(layers[0], total)):
            return len(layers), sorted(inside | outside)
    return total or -1, sorted(modules, key=natural)


def common_scale(spec: AdapterSpec) -> float:
    """Return the scale that most modules have."""
    return Counter(spec.scale_of(name) for name in spec.modules).most_common(1)[0][0]


def with_zeros(matrix: Tensor, rank: int, *, axis: int) -> Tensor:
    """Return A or B filled up with zeros to a rank, which is their length along an axis counted from the end."""
    missing = rank - matrix.shape[axis]
    if missing == 0:
        return matrix
    widths = [(0, missing if n == axis else 0) for n in range(-len(matrix.shape), 0)]
    return Tensor(matrix.dtype, np.pad(matrix.data, widths))


def folded(matrix: Tensor, ratio: float) -> Tensor:
    """Return B times a ratio: in its own dtype where that is exact, else in float32."""
    if ratio == 1.0:
        return matrix
    dtype = matrix.dtype if math.frexp(ratio)[0] == 0.5 else "F32"
    return from_float32((to_float32(matrix).astype(np.float64) * ratio).astype(np.float32), dtype)


def unfolded(matrix: Tensor, ratio: float, *, dtype: str) -> Tensor:
    """Return B of what `folded` made of it, up to a rounding of float32."""
    if ratio == 1.0:
        return matrix
    return from_float32((to_float32(matrix).astype(np.float64) / ratio).astype(np.float32), dtype)
