"""The adapter folder, read: ours, which PEFT and mlx-lm both load as it is, and those that they write.

PEFT: adapter_model.safetensors, A (r, in) and B (out, r). mlx-lm: adapters.safetensors, lora_a (in, r) and
lora_b (r, out). adapter_config.json carries the keys of both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shared.adapters.fused import is_fused, is_one_of_many, stack_experts, unfuse_experts
from shared.adapters.hashes import check_hashes
from shared.adapters.names import (
    COPY,
    MLX_FILE,
    OWN_FILE,
    OWN_LEAVES,
    PEFT_FILE,
    SAVED,
    TENSOR_FILES,
    own_name_of_mlx,
    own_names,
    turned,
    twin,
)
from shared.adapters.own import check_named, is_own, own_values
from shared.adapters.schema import (
    CONFIG_FILE,
    check_mlx,
    check_peft,
    match_pattern,
    named_base,
    read_names,
    read_number,
    read_pattern,
    read_rank,
    read_ranks,
)
from shared.adapters.spec import (
    ADAPTER_LEAVES,
    OF_EXPERTS,
    ends_of,
    factor_shapes,
    is_embedding,
    is_saved,
    leaves_of,
    natural,
)
from shared.errors import AdapterError, CapabilityError, ModelError
from shared.experts import is_stack, own_stack
from shared.folder import ModelFolder, read_json
from shared.registry import find_quantizer
from shared.strict import check_adapter
from shared.tensors import from_float32, is_finite, load_file, to_float32
from shared.types import AdapterSpec, ModelInfo, Tensor


@dataclass(frozen=True)
class Adapter:
    """An adapter read from a folder: what it is, its tensors under canonical names, and our own notes."""

    spec: AdapterSpec
    tensors: Mapping[str, Tensor]
    notes: Mapping[str, Any]  # what mlxlora wrote about the training, empty for foreign folders
    copies: Mapping[str, Tensor] = field(
        default_factory=dict[str, Tensor]
    )  # weights of the base by their names, (V, D)
    source: str = ""  # the folder it was read from
    trained_on: str | None = None  # the base, as the folder names it


def read_adapter(folder: Path) -> Adapter:
    """Return the adapter of a folder written by us, PEFT or mlx-lm; raises AdapterError or CapabilityError."""
    if not folder.is_dir():
        raise AdapterError(f"no adapter folder at {folder}", code="E310", expected=f"a folder with {CONFIG_FILE}")
    if not (folder / CONFIG_FILE).is_file():
        raise no_adapter(folder)
    file = next((name for name in TENSOR_FILES if (folder / name).is_file()), None)
    if file is None:
        raise no_tensors(folder)
    return read_as(folder, file)


def read_as(folder: Path, file: str) -> Adapter:
    """Return the adapter that one library keeps in a folder: PEFT_FILE or MLX_FILE."""
    try:
        config, stored = read_json(folder / CONFIG_FILE), load_file(folder / file)
    except ModelError as error:
        raise AdapterError(
            error.what, code=error.code, expected=error.expected, fix="copy or train the adapter again"
        ) from None
    check_hashes(folder, config.get("mlxlora"))
    readers = {PEFT_FILE: from_peft, MLX_FILE: from_mlx_lm, OWN_FILE: from_own}
    spec, tensors = readers[file](config, stored)
    notes = config.get("mlxlora")
    return Adapter(
        spec, tensors, notes if isinstance(notes, dict) else {}, copies_of(config, stored),
        source=str(folder), trained_on=named_base(config),
    )  # fmt: skip


def copies_of(config: Mapping[str, Any], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the base's weights that PEFT saves beside the matrices of embeddings and heads, by the base's names."""
    names = own_names(stored, saved_names(config)) if config.get("peft_type") else {}
    return {f"{own.removesuffix(COPY)}.weight": stored[name] for name, own in names.items() if is_copy(own)}


def saved_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return PEFT's modules_to_save, with the head where it follows an embedding among them."""
    names = read_names(config, "modules_to_save")
    follows = bool(config.get("ensure_weight_tying")) and any(map(is_embedding, names))
    return (*names, "lm_head") if follows else names


def is_copy(own: str) -> bool:
    """Return whether a tensor is a weight of the base: that of an adapted end, or a whole end that is not trained."""
    return own.endswith(COPY) or bool(ends_of([own]))


def check_copies(adapter: Adapter, base: ModelFolder) -> None:
    """Raise CapabilityError unless weights that came along with an adapter are the base's own."""
    for name, copy in adapter.copies.items():
        if not is_base_s(name, copy, base):
            raise CapabilityError(
                f'the adapter brings its own "{name}", another than the base\'s (PEFT: save_embedding_layers)',
                code="E404",
                expected="an adapter that leaves the base as it is",
                fix="load it with PEFT, merge it into the base, and use that model",
            )


def is_base_s(name: str, copy: Tensor, base: ModelFolder) -> bool:
    """Return whether a weight is the base's, or where that is stored quantized, one that gives the same codes."""
    if name == "lm_head.weight" and base.is_tied:
        name = next((f"{one}.weight" for one in map(owner, base.entries) if is_embedding(one)), name)
    place = base.places.get(name.removesuffix(".weight"))
    if place is None:
        own = base.value(name) if name in base.entries else None
        return own is not None and own.shape == copy.shape and same_values(own, copy)
    if place.stored.shape != copy.shape or not is_finite(copy):
        return False
    quantizer = find_quantizer(place.stored.scheme)
    held = quantizer.dequantize(base.packed(name.removesuffix(".weight"), shape=copy.shape))
    if same_values(held, copy):
        return True
    return same_values(quantizer.dequantize(quantizer.quantize(from_float32(to_float32(copy), held.dtype))), held)


def same_values(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal, the one rounded to the other's dtype."""
    return bool(np.array_equal(from_float32(to_float32(one), other.dtype).data, other.data))


def no_adapter(folder: Path) -> AdapterError:
    """Return the error for a folder that holds something else."""
    if (folder / "adapter" / CONFIG_FILE).is_file():
        return AdapterError(f"{folder} is a run folder", code="E310", fix=f"use {folder / 'adapter'}")
    if (folder / "model" / "config.json").is_file():
        return AdapterError(
            f"{folder} is a run folder with a whole model", code="E310",
            fix=f"use {folder / 'model'} as the model, without --adapter",
        )  # fmt: skip
    if (folder / "config.json").is_file():
        return AdapterError(
            f"{folder} is a whole model, not an adapter",
            code="E310",
            fix=f"name a folder with {CONFIG_FILE}; a model alone goes without --adapter",
        )
    return AdapterError(f"{folder} has no {CONFIG_FILE}", code="E310", fix="is this an adapter folder?")


def no_tensors(folder: Path) -> AdapterError:
    """Return the error for a folder without safetensors."""
    if (folder / "adapter_model.bin").is_file():
        return AdapterError(
            f"{folder} holds its adapter as pickle (adapter_model.bin), which can run code and is never loaded",
            code="E306",
            fix="save it again with PEFT: model.save_pretrained(folder, safe_serialization=True)",
        )
    if (folder / "adapters.npz").is_file():
        return AdapterError(
            f"{folder} holds its adapter as adapters.npz, which old mlx-lm wrote and this version does not load",
            code="E310",
            fix=f"write it again: mx.save_safetensors('{MLX_FILE}', dict(mx.load('adapters.npz')))",
        )
    return AdapterError(
        f"{folder} has neither {PEFT_FILE} nor {MLX_FILE}", code="E310", fix="is this an adapter folder?"
    )


def from_peft(config: Mapping[str, Any], stored: Mapping[str, Tensor]) -> tuple[AdapterSpec, dict[str, Tensor]]:
    """Return spec and tensors of PEFT's files; what this version cannot compute is refused by name."""
    check_peft(config)
    names = own_names(stored, saved_names(config))
    stored = {name: tensor for name, tensor in stored.items() if not is_copy(names[name])}
    tensors = {names[name]: tensor for name, tensor in stored.items()}
    check_leaves(tensors, stored, expected="lora_A, lora_B")
    for name in read_names(config, "modules_to_save"):
        if not any(one.endswith(name) for one in saved_of(tensors)):
            raise AdapterError(
                f'{CONFIG_FILE}: modules_to_save names "{name}", of which {PEFT_FILE} holds no tensor', code="E311",
                fix="copy config and tensors of one adapter",
            )  # fmt: skip
    tensors, tied = without_twins(tensors, tied=bool(config.get("ensure_weight_tying")))
    rank, alpha = read_rank(config, "r", 8), read_number(config, "lora_alpha", 8)
    ranks, alphas = read_ranks(config), read_pattern(config, "alpha_pattern")
    kind = "rslora" if config.get("use_rslora") else "lora"
    numbers = {"rank": rank, "alpha": alpha, "ranks": ranks, "alphas": alphas}
    experts = unfuse_experts(tensors, read_names(config, "target_parameters"), kind=kind, **numbers)
    stacks = stack_experts(tensors, **numbers)
    if (experts.tensors or stacks.tensors) and config.get("use_dora"):
        raise CapabilityError(f"the adapter has DoRA of experts: {OF_EXPERTS}", code="E404", expected="LoRA of experts")
    tensors = {name: tensor for name, tensor in tensors.items() if not (is_fused(name) or is_one_of_many(name))}
    tensors |= {**experts.tensors, **stacks.tensors}
    modules = modules_of(tensors)
    own_ranks = {name: int(match_pattern(ranks, name, rank)) for name in modules} | experts.ranks | stacks.ranks
    own_alphas = {name: match_pattern(alphas, name, alpha) for name in modules} | experts.alphas | stacks.alphas
    if config.get("use_dora"):
        if kind == "rslora":
            alpha, own_alphas = alpha * math.sqrt(rank), {n: a * math.sqrt(own_ranks[n]) for n, a in own_alphas.items()}
        kind = "dora"
    spec = AdapterSpec(
        kind, rank=rank, alpha=alpha, dropout=read_number(config, "lora_dropout", 0.0), modules=modules,
        ranks={name: found for name, found in own_ranks.items() if found != rank},
        alphas={name: found for name, found in own_alphas.items() if found != alpha},
        saved=saved_of(tensors), tied=tied,
    )  # fmt: skip
    check_ranks(spec, tensors)
    return spec, tensors


def from_own(config: Mapping[str, Any], stored: Mapping[str, Tensor]) -> tuple[AdapterSpec, dict[str, Tensor]]:
    """Return spec and tensors of an adapter that only a user's own code computes; raises AdapterError."""
    try:
        written = config["mlxlora"]["spec"]
        tuples = {key: tuple(map(str, written[key])) for key in ("modules", "saved")}
        spec = AdapterSpec(**{**written, **tuples})
        known = is_own(spec.kind) and spec.rank >= 1 and math.isfinite(spec.scale)
    except (KeyError, TypeError, ValueError, ArithmeticError):
        known = False
    if not known:
        raise AdapterError(f"{CONFIG_FILE} does not say which adapter it is", code="E311", fix="copy the folder again")
    return spec, dict(stored)


def without_twins(tensors: dict[str, Tensor], *, tied: bool) -> tuple[dict[str, Tensor], bool]:
    """Return what is not a copy of the embedding's for a head tied to it, and whether the two are one.

    PEFT says `ensure_weight_tying` of bases with a head of its own too, where it trains them apart.
    """
    table = next((name for name in map(owner, tensors) if is_embedding(name)), None)
    if not tied or table is None:
        return tensors, False
    heads = {name: twin(name, table) for name in tensors if owner(name) == "lm_head"}
    for name, other in heads.items():
        found = tensors.get(other)
        same = None if found is None else found if is_saved(name) else turned(found)
        if same is None or not np.array_equal(same.data, tensors[name].data):
            return tensors, False
    return {name: tensor for name, tensor in tensors.items() if name not in heads}, True


def from_mlx_lm(config: Mapping[str, Any], stored: Mapping[str, Tensor]) -> tuple[AdapterSpec, dict[str, Tensor]]:
    """Return spec and tensors of mlx-lm's files."""
    settings = check_mlx(config)
    kind = config.get("fine_tune_type", "lora")
    for name, tensor in stored.items():
        module, _, leaf = name.rpartition(".")
        stacked = is_stack(own_stack(module))
        if (".switch_" in name or "experts" in name) and (not stacked or leaf == "m" or len(tensor.shape) != 3):
            raise CapabilityError(
                f'the adapter holds experts in a form that this version does not load ("{name}")', code="E404",
                expected="switch_mlp, lora_a (experts, r, in) and lora_b (experts, out, r), as mlx-lm writes today",
            )  # fmt: skip
        if leaf not in OWN_LEAVES or len(tensor.shape) != (1 if leaf == "m" else 3 if stacked else 2):
            raise CapabilityError(
                f'the adapter holds "{name}", which this version does not load',
                code="E404",
                expected="lora_a, lora_b, m",
            )
    tensors = {own_name_of_mlx(name): turned(tensor) for name, tensor in stored.items()}
    check_leaves(tensors, stored, expected="lora_a, lora_b")
    rank, scale = read_rank(settings, "rank", 8), read_number(settings, "scale", 1.0)
    modules = modules_of(tensors)
    spec = AdapterSpec(
        kind, rank=rank, alpha=scale * rank, dropout=read_number(settings, "dropout", 0.0), modules=modules,
        tied=any(is_embedding(name) for name in modules),
    )  # fmt: skip
    check_ranks(spec, tensors)
    return spec, tensors


def check_leaves(tensors: Mapping[str, Tensor], stored: Mapping[str, Tensor], *, expected: str) -> None:
    """Refuse tensors that are no part of an adapter as we know them, and two that stand for the same."""
    if len(tensors) != len(stored):
        raise AdapterError(
            "the adapter holds a tensor twice, under two names", code="E311", fix="use one adapter of the folder"
        )
    for name, foreign in zip(tensors, stored, strict=True):
        if not name.endswith(ADAPTER_LEAVES):
            raise CapabilityError(
                f'the adapter holds "{foreign}", which this version does not load', code="E404", expected=expected
            )
        if name.endswith(".lora_magnitude_vector") and is_embedding(name.rpartition(".")[0]):
            raise CapabilityError(
                f'the adapter has DoRA on an embedding ("{foreign}"): PEFT\'s magnitude has a number per dimension, '
                "mlx-lm's one per token",
                code="E404",
                expected="DoRA on linear layers",
            )
    if not tensors:
        raise AdapterError("the adapter holds no tensors", code="E311", fix="train it again")


def modules_of(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return the modules that have an adapter, in model order."""
    return tuple(sorted({owner(name) for name in tensors if not is_saved(name)}, key=natural))


def saved_of(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return the modules that are trained whole, in model order."""
    return tuple(sorted({owner(name) for name in tensors if is_saved(name)}, key=natural))


def owner(name: str) -> str:
    """Return the module that a tensor belongs to."""
    return name.rpartition(".")[0].removesuffix(SAVED)


def check_ranks(spec: AdapterSpec, tensors: Mapping[str, Tensor]) -> None:
    """Raise AdapterError where a matrix is missing or its rank is not the stated one."""
    for module in spec.modules:
        magnitude = f"{module}.lora_magnitude_vector"
        if (magnitude in tensors) != (spec.kind == "dora"):
            state = "is missing" if spec.kind == "dora" else f"is there, though {CONFIG_FILE} does not say DoRA"
            raise AdapterError(
                f'adapter tensor "{magnitude}" {state}', code="E311", fix="copy config and tensors of one adapter"
            )
        A, B = leaves_of(module)
        for leaf, axis in ((A, -2), (B, -1)):
            found, rank = tensors.get(f"{module}.{leaf}"), spec.rank_of(module)
            if found is None or len(found.shape) != (3 if is_stack(module) else 2):
                raise AdapterError(
                    f'adapter tensor "{module}.{leaf}" is missing', code="E311", fix="copy the adapter again"
                )
            if found.shape[axis] != rank:
                raise AdapterError(
                    f'adapter tensor "{module}.{leaf}" has rank {found.shape[axis]}',
                    code="E311",
                    expected=f"rank {rank} by {CONFIG_FILE}",
                )


def check_fit(adapter: Adapter, info: ModelInfo, *, own: str = "") -> None:
    """Raise AdapterError unless the model has every adapted module, with the right widths.

    own: the adapter of the user's own that a config names; another that the folder names is refused, not imported.
    """
    adaptable = info.adaptable
    missing = [name for name in adapter.spec.modules if name not in adaptable]
    if missing:
        raise AdapterError(
            f'the adapter does not fit this {info.family} model: it has no linear layer "{missing[0]}" '
            f"({len(missing)} of {len(adapter.spec.modules)} modules are missing)",
            fix="use the base that the adapter was trained on",
        )
    check_saved(adapter, info)
    if is_own(adapter.spec.kind):
        check_named(adapter.spec.kind, own=own)
        wanted = {name: value.shape for name, value in own_values(adapter.spec, adaptable).items()}
        check_adapter({name: adapter.tensors[name] for name in adapter.tensors if not is_saved(name)}, expected=wanted)
        return
    for name in adapter.spec.modules:
        shapes = factor_shapes(name, adaptable[name], rank=adapter.spec.rank_of(name))
        if adapter.spec.kind == "dora":
            shapes[f"{name}.lora_magnitude_vector"] = adaptable[name][:1]
        for tensor, shape in shapes.items():
            check_tensor(adapter, tensor, shape)


def check_saved(adapter: Adapter, info: ModelInfo) -> None:
    """Raise AdapterError unless the model has every module that was trained whole, with the right shape."""
    for name in adapter.spec.saved:
        if (name not in info.norms and name not in info.adaptable) or is_stack(name):
            raise AdapterError(
                f'the adapter does not fit this {info.family} model: it has no module "{name}" (modules_to_save)',
                fix="use the base that the adapter was trained on",
            )
        shape = (info.norms[name],) if name in info.norms else info.adaptable[name]
        shape = shape[::-1] if is_embedding(name) else shape
        check_tensor(adapter, f"{name}{SAVED}.weight", shape, called=f'"{name}.weight" (modules_to_save)')


def check_tensor(adapter: Adapter, name: str, shape: tuple[int, ...], *, called: str = "") -> None:
    """Raise AdapterError unless an adapter has a tensor, of this shape; called: what the message has for its name."""
    found = adapter.tensors.get(name)
    if found is None or tuple(found.shape) != shape:
        what = called or f'"{name}"'
        state = "is missing" if found is None else f"has shape {tuple(found.shape)}"
        raise AdapterError(
            f"adapter tensor {what} {state}", expected=f"{shape} for this base",
            fix="use the base that the adapter was trained on",
        )  # fmt: skip


def is_apart(spec: AdapterSpec, *, tied: bool) -> bool:
    """Return whether an adapter gives embedding and head, which are one tensor in the base, different values."""
    return tied and not spec.tied and bool(ends_of([*spec.modules, *spec.saved]))
