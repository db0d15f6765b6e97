"""A folder becomes a base model: mlx-lm's zoo builds it, its tensors are checked and read, some of them quantized."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx import nn

from mlxlora import generation, objectives
from mlxlora.adapters import find_owner
from mlxlora.attention import PACKABLE, PADDABLE, packing, windowed
from mlxlora.decoders import find_decoder
from mlxlora.experts import QuantizedExperts, check_experts, quantize_experts
from mlxlora.gated import gating
from mlxlora.model import MLXModel, flatten, recomputing
from mlxlora.quantized import QuantizedEmbedding, QuantizedLinear
from mlxlora.rotary import turned_width
from mlxlora.state import mlx_dtype
from mlxlora.whole import find_norms
from shared.adapters.spec import layer_of
from shared.convert.experts import stacks_of
from shared.errors import ModelError
from shared.experts import is_expert, is_router, num_experts
from shared.families import (
    CHECKED,
    GATED,
    KEEPS_SCHEME,
    PROVEN,
    UNVERIFIED,
    check_logits,
    config_fault,
    config_faults,
    head_facts,
    left_out,
    unapplied,
    unapplied_window,
    unknown_layout,
    windows_of,
    with_old_keys,
)
from shared.folder import COMPUTED, ModelFolder, check_tensors, nearest_family, open_folder, renamed
from shared.importing import defer_front, read_constant
from shared.registry import find_quantizer
from shared.types import ModelInfo, Scheme


def load_model(path: Path, *, dtype: str, quantization: Scheme | None, recompute: bool) -> MLXModel:
    """Return the base of a folder, in `dtype`; raises ModelError where anything does not fit."""
    folder = open_folder(path)
    check_experts(folder, dtype)
    zoo = build_empty(folder)
    tied = folder.is_tied
    notes = fill(zoo, folder, dtype=mlx_dtype(dtype), quantization=quantization, tied=tied)
    zoo.eval()
    zoo.freeze()
    if can_pack(zoo, folder):
        for layer in zoo.model.layers:
            layer.self_attn.__class__ = packing(type(layer.self_attn))
            layer.self_attn.turned_width = turned_width(layer.self_attn.rope)
    for layer, window in zip(zoo.model.layers, windows_of(folder.config), strict=True):
        if window is not None:
            layer.self_attn.__class__ = windowed(type(layer.self_attn), window)
    for layer in zoo.model.layers if folder.family in GATED else ():
        layer.mlp.__class__ = gating(type(layer.mlp))
    if recompute:
        for layer in zoo.model.layers:
            layer.__class__ = recomputing(type(layer))
    head = objectives.Head(zoo.model.embed_tokens if tied else zoo.lm_head, head_facts(folder.config))
    notes = notes if folder.family in PROVEN else (*notes, UNVERIFIED.format(family=folder.family))
    model = MLXModel(zoo, head, describe(zoo, folder, notes))
    model.recomputes = bool(recompute)
    if folder.family not in CHECKED:
        check_head(model, folder)
    return model


def build_empty(folder: ModelFolder) -> Any:
    """Return the zoo's model without values (MLX is lazy); raises ModelError for an unknown family."""
    try:
        module = importlib.import_module(f"mlx_lm.models.{module_name(folder.family)}")
        args_class, model_class = module.ModelArgs, module.Model
    except SystemExit:  # olmo.py leaves where a package of its own is missing
        raise ModelError(
            f'mlx-lm\'s "{folder.family}" needs a package that is not installed',
            code="E303",
            fix="use the torch backend",
        ) from None
    except (ImportError, AttributeError):
        raise ModelError(
            f'unknown architecture "{folder.family}" in {folder.path.name}',
            code="E303",
            fix=nearest_family(folder.family, known_families()),
        ) from None
    config = with_old_keys(folder.config)
    config["tie_word_embeddings"] = folder.is_tied
    try:
        zoo = model_class(args_class.from_dict(config))
    except config_faults() as error:
        raise config_fault(folder.path, error) from None
    if not all(hasattr(getattr(zoo, "model", None), part) for part in ("embed_tokens", "layers")):
        raise unknown_layout(folder.family)
    check_applied(zoo, config)
    return zoo


def check_applied(zoo: Any, config: Mapping[str, Any]) -> None:
    """Raise CapabilityError for settings of a config that mlx-lm's model silently leaves out."""
    ropes = [module for name, module in zoo.named_modules() if name.endswith(("rope", "rotary_emb"))]
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default" and any(type(rope) is nn.RoPE and rope.scale == 1 for rope in ropes):
        raise unapplied(config, f"rope scaling of type {kind}")
    share = config.get("partial_rotary_factor") or (0.5 if config["model_type"] == "glm" else 1.0)
    width = config.get("head_dim") or config.get("hidden_size", 0) // config.get("num_attention_heads", 1)
    if share < 1 and any(type(rope) is nn.RoPE and rope.dims == width for rope in ropes):
        raise unapplied(config, f"partial_rotary_factor {share}")
    if config["model_type"] == "qwen2_moe" and config.get("norm_topk_prob"):
        raise unapplied(config, "norm_topk_prob")


def module_name(family: str) -> str:
    """Return the name of mlx-lm's module for a model type, e.g. "llama" for "mistral"."""
    defer_front("mlx_lm")
    try:
        return read_constant("mlx_lm.utils", "MODEL_REMAPPING").get(family, family)
    except LookupError:
        from mlx_lm.utils import MODEL_REMAPPING

        return MODEL_REMAPPING.get(family, family)


def known_families() -> list[str]:
    """Return the model types that mlx-lm has."""
    import mlx_lm.models

    return sorted(file.stem for file in Path(mlx_lm.models.__path__[0]).glob("*.py") if file.stem != "__init__")


def fill(zoo: Any, folder: ModelFolder, *, dtype: mx.Dtype, quantization: Scheme | None, tied: bool) -> tuple[str, ...]:
    """Load every tensor of the folder, quantized where asked; return notes on what was left out."""
    put_quantized(zoo, folder, dtype)
    values: dict[str, mx.array] = {}
    for file in folder.files:
        values.update(cast(dict[str, mx.array], mx.load(str(file))))
    skipped = folder.packed_names
    values = {name if name in folder.entries else renamed(name): value for name, value in values.items()}
    values = {name: value for name, value in values.items() if name not in skipped and not COMPUTED.search(name)}
    if tied:
        values.pop("lm_head.weight", None)
    try:
        values = zoo.sanitize(values) if hasattr(zoo, "sanitize") else values
    except KeyError as error:  # one expert of many
        raise ModelError(f"{folder.path}: tensor {error} is missing", fix="download the model again") from None
    held = packed_keys(zoo)
    expected = {name: tuple(value.shape) for name, value in flatten(zoo.parameters()) if name not in held}
    check_tensors(folder.path, expected=expected, found={name: tuple(value.shape) for name, value in values.items()})
    notes: tuple[str, ...] = ()
    if quantization is not None:
        notes = KEEPS_SCHEME if folder.schemes else quantize_layers(zoo, folder, quantization)
    held = packed_keys(zoo)
    floats = [(name, check_value(folder, name, values.pop(name), dtype)) for name in list(values) if name not in held]
    zoo.load_weights(floats, strict=False)
    mx.eval(zoo.parameters())
    return notes


def check_value(folder: ModelFolder, name: str, value: mx.array, dtype: mx.Dtype) -> mx.array:
    """Return one float tensor in `dtype`, read now (mx.load is lazy); raises ModelError where it is not finite."""
    finite = mx.isfinite(value.max()) & mx.isfinite(value.min()) & ~mx.isnan(value.sum())  # without a copy
    if not finite.item():
        raise ModelError(
            f'{folder.path}: tensor "{name}" holds NaN or infinity', code="E305", fix="download the model again"
        )
    value = value.astype(dtype)
    mx.eval(value)
    return value


def put_quantized(zoo: nn.Module, folder: ModelFolder, dtype: mx.Dtype) -> None:
    """Replace the modules that the folder stores quantized, packed bytes taken as they are."""
    for name in folder.places:
        try:
            owner, leaf = find_owner(zoo, name)
            module = getattr(owner, leaf)
        except (AttributeError, IndexError):
            raise ModelError(
                f'{folder.path}: quantized module "{name}" has no place in the model', code="E308"
            ) from None
        *rows, width = module.weight.shape
        packed = folder.packed(name, shape=(math.prod(rows), width))
        if is_expert(name):
            setattr(owner, leaf, QuantizedExperts(packed, rows[0]))
        elif isinstance(module, nn.Embedding):
            setattr(owner, leaf, QuantizedEmbedding(packed, dtype))
        else:
            setattr(owner, leaf, QuantizedLinear(packed, module.get("bias")))


def quantize_layers(zoo: nn.Module, folder: ModelFolder, scheme: Scheme) -> tuple[str, ...]:
    """Quantize the decoder blocks' linear layers from the stored tensors; return a note on those left out.

    Scales take the stored dtype, so that the base does not depend on what the run computes in.
    """
    find_decoder(scheme)
    quantizer = find_quantizer(scheme)
    left: list[str] = []
    for name, module in list(zoo.named_modules()):
        if not isinstance(module, nn.Linear) or layer_of(name) is None or is_router(folder.family, name):
            continue
        if not quantizer.fits((module.weight.shape[0], module.weight.shape[1])):
            left.append(name)
            continue
        owner, leaf = find_owner(zoo, name)
        packed = quantizer.quantize(folder.value(f"{name}.weight"))
        setattr(owner, leaf, QuantizedLinear(packed, module.get("bias")))
    left += quantize_experts(zoo, folder, quantizer)
    return left_out(left, scheme, folder.config)


def describe(zoo: Any, folder: ModelFolder, notes: tuple[str, ...]) -> ModelInfo:
    """Return the facts of a loaded base."""
    table = zoo.model.embed_tokens
    vocabulary, width = table._stored.shape if isinstance(table, QuantizedEmbedding) else table.weight.shape
    linears: dict[str, Any] = {
        name: module._stored.shape if isinstance(module, QuantizedLinear) else tuple(module.weight.shape)
        for name, module in zoo.named_modules()
        if isinstance(module, nn.Linear | QuantizedLinear)
        and layer_of(name) is not None
        and not (is_expert(name) or is_router(folder.family, name))
    }
    return ModelInfo(
        family=folder.family,
        num_layers=len(zoo.model.layers),
        vocab_size=int(folder.config["vocab_size"]),
        max_positions=folder.config.get("max_position_embeddings"),
        max_tokens=unapplied_window(folder.config),
        can_pack=can_pack(zoo, folder),
        linears=linears,
        num_parameters=sum(out * width for out, width in linears.values()),
        quantized={name: str(scheme) for name, scheme in schemes_of(zoo)},
        notes=notes,
        ends={"model.embed_tokens": (width, vocabulary), "lm_head": (vocabulary, width)},
        is_tied=not hasattr(zoo, "lm_head"),
        can_batch=generation.can_batch(zoo, folder.family),
        can_pad_left=folder.family in PADDABLE,
        num_experts=num_experts(folder.config),
        norms=find_norms(zoo),
        experts=stacks_of(folder),
    )


def can_pack(zoo: Any, folder: ModelFolder) -> bool:
    """Return whether our attention is exact in every layer: it has no window."""
    return folder.family in PACKABLE and not any(getattr(layer, "use_sliding", False) for layer in zoo.model.layers)


def schemes_of(zoo: nn.Module) -> Iterator[tuple[str, Scheme]]:
    """Yield every quantized module with its scheme."""
    for name, module in zoo.named_modules():
        if isinstance(module, QuantizedLinear | QuantizedEmbedding):
            yield name, module._stored.scheme


def packed_keys(zoo: nn.Module) -> set[str]:
    """Return the names of the arrays that hold quantized weights."""
    return {
        f"{name}.{key}"
        for name, module in zoo.named_modules()
        if isinstance(module, QuantizedLinear | QuantizedEmbedding)
        for key in module._keys
    }


def check_head(model: MLXModel, folder: ModelFolder) -> None:
    """Refuse a family whose logits are not head(last hidden state) as `shared.families` has it."""
    tokens_BT = mx.arange(4)[None] % model.info.vocab_size
    try:
        theirs, ours = model.zoo(tokens_BT), model.head.logits(model.decoder(tokens_BT)[0])
    except (TypeError, AttributeError, ValueError, IndexError):
        raise unknown_layout(folder.family) from None
    gap = float(mx.abs(theirs[0].astype(mx.float32) - ours).max() / mx.abs(theirs).max())
    check_logits(folder.family, gap=gap, exact=theirs.dtype == mx.float32)
