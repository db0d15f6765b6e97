"""A folder becomes a base model: transformers' zoo builds it, its tensors are checked and read, some quantized."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shared.adapters.spec import layer_of
from shared.convert.experts import stacks_of
from shared.errors import ModelError
from shared.experts import in_block, is_expert, is_router, num_experts, stacked_shapes, stored_names
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
    unknown_layout,
)
from shared.folder import ModelFolder, check_tensors, nearest_family, open_folder
from shared.importing import collector_paused
from shared.registry import find_quantizer
from shared.types import ModelInfo, Recompute, Scheme
from torch_backend import attention, generation, objectives
from torch_backend.decoders import PLAIN_DECODE, find_decoder, has_triton
from torch_backend.experts import QuantizedExperts, quantize_experts
from torch_backend.gated import gating, is_gated
from torch_backend.model import TorchModel, set_recompute
from torch_backend.norms import NORMED, replace_norms
from torch_backend.quantized import QuantizedEmbedding, QuantizedLinear, decode_packed
from torch_backend.state import to_torch, torch_dtype
from torch_backend.whole import find_norms


def load_model(path: Path, *, dtype: str, quantization: Scheme | None, recompute: Recompute, device: str) -> TorchModel:
    """Return the base of a folder, in `dtype`, on `device`; raises ModelError where anything does not fit."""
    folder = open_folder(path)
    zoo = build_empty(folder, torch_dtype(dtype))
    tied = folder.is_tied
    notes = fill(zoo, folder, dtype=torch_dtype(dtype), quantization=quantization, tied=tied)
    zoo.eval().requires_grad_(False).to(device)
    if tied:
        tie_head(zoo)
    layers: Any = zoo.get_decoder().layers
    for layer in layers if folder.family in GATED else ():
        if is_gated(layer.mlp):
            layer.mlp.__class__ = gating(type(layer.mlp))
    if folder.family in NORMED:
        replace_norms(zoo)
    set_recompute(layers, recompute, device=torch.device(device))
    if device == "cuda" and any(schemes_of(zoo)) and not has_triton():
        notes = (*notes, PLAIN_DECODE)
    head = objectives.Head(zoo.get_output_embeddings(), head_facts(folder.config))
    notes = notes if folder.family in PROVEN else (*notes, UNVERIFIED.format(family=folder.family))
    model = TorchModel(zoo, head, describe(zoo, folder, notes), device=torch.device(device))
    model.recompute = recompute
    if folder.family not in CHECKED:
        check_head(model, folder)
    return model


def build_empty(folder: ModelFolder, dtype: torch.dtype) -> Any:
    """Return the zoo's model without values (buffers are real); raises ModelError for an unknown family."""
    with collector_paused():
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING as ZOO
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    if folder.family not in KNOWN:
        raise ModelError(
            f'unknown architecture "{folder.family}" in {folder.path.name}',
            code="E303",
            fix=nearest_family(folder.family, KNOWN),
        )
    stripped = {
        key: value for key, value in folder.config.items() if key not in ("quantization", "quantization_config")
    }
    try:
        config = CONFIG_MAPPING[folder.family].from_dict(stripped)
        with collector_paused():
            _ = ZOO[type(config)]  # imports the model's module
        with init_empty_weights(include_buffers=False):
            own = attention.register() if folder.family in attention.PACKABLE else None
            zoo = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=own)
    except config_faults() as error:
        raise config_fault(folder.path, error) from None
    if not hasattr(zoo.get_decoder(), "layers") or zoo.get_output_embeddings() is None:
        raise unknown_layout(folder.family)
    return zoo


def fill(
    zoo: Any, folder: ModelFolder, *, dtype: torch.dtype, quantization: Scheme | None, tied: bool
) -> tuple[str, ...]:
    """Load every tensor of the folder, quantized where asked; return notes on what was left out."""
    put_experts(zoo, folder)
    routers = put_quantized(zoo, folder, dtype)
    held, skipped = packed_keys(zoo) | routers, folder.packed_names
    expected = {name: tuple(value.shape) for name, value in zoo.state_dict().items() if name not in held}
    found = {name: entry.shape for name, entry in folder.entries.items() if name not in skipped}
    sources = {name: found_as for name in expected if (found_as := stored_names(folder.config, name)) is not None}
    found = stacked_shapes(found, sources)
    check_tensors(folder.path, expected=expected, found=found, tied=("lm_head.weight",) if tied else ())
    notes: tuple[str, ...] = ()
    if quantization is not None:
        notes = KEEPS_SCHEME if folder.schemes else quantize_layers(zoo, folder, quantization)
    if tied:
        zoo.set_output_embeddings(nn.Identity())  # made anew by `tie_head` when the embedding is on its device
    held = packed_keys(zoo) | routers
    names = [name for name in zoo.state_dict() if name not in held and name in found]
    values = {name: read_value(folder, name, sources.get(name), shape=found[name], dtype=dtype) for name in names}
    zoo.load_state_dict(values, strict=False, assign=True)
    return notes


def read_value(
    folder: ModelFolder, name: str, source: list[list[str]] | None, *, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """Return a tensor of the folder in `dtype`, or the experts' tensors stacked, one at a time in memory beside it."""
    if source is None:
        return to_torch(folder.value(name)).to(dtype)
    if len(shape) < 3:
        return to_torch(folder.value(source[0][0])).to(dtype)
    stack = torch.empty(shape, dtype=dtype)
    for expert, names in zip(stack, source, strict=True):
        for part, stored in zip(expert.chunk(len(names)), names, strict=True):
            part.copy_(to_torch(folder.value(stored)))
    return stack


def put_experts(zoo: nn.Module, folder: ModelFolder) -> None:
    """Replace the experts of every layer that the folder stores as quantized stacks."""
    blocks = dict.fromkeys(name.rpartition(".")[0] for name in folder.places if is_expert(name))
    for block in blocks:
        owner: Any = zoo.get_submodule(in_block(folder.config, block).rpartition(".")[0])
        number, twice, width = owner.experts.gate_up_proj.shape
        wide, tall = (number * twice // 2, width), (number * width, twice // 2)
        shapes = {"gate_proj": wide, "up_proj": wide, "down_proj": tall}
        missing = next((leaf for leaf in shapes if f"{block}.{leaf}" not in folder.places), None)
        if missing:
            raise ModelError(f'{folder.path}: tensor "{block}.{missing}.weight" is missing', fix="convert it again")
        stacks = {leaf: folder.packed(f"{block}.{leaf}", shape=shape) for leaf, shape in shapes.items()}
        owner.experts = QuantizedExperts(stacks, number=number, activation=owner.experts.act_fn)


def put_quantized(zoo: nn.Module, folder: ModelFolder, dtype: torch.dtype) -> set[str]:
    """Replace the modules that the folder stores quantized, packed bytes taken as they are.

    A router is decoded, as its class computes with a plain weight; return the names of those weights.
    """
    routers: set[str] = set()
    for stored_name in folder.places:
        if is_expert(stored_name):
            continue
        name = in_block(folder.config, stored_name)
        parent, _, leaf = name.rpartition(".")
        try:
            owner = zoo.get_submodule(parent)
            module = getattr(owner, leaf)
        except AttributeError:
            raise ModelError(
                f'{folder.path}: quantized module "{name}" has no place in the model', code="E308"
            ) from None
        packed = folder.packed(stored_name, shape=tuple(module.weight.shape))
        if is_router(folder.family, stored_name) and type(module) is not nn.Linear:
            module.weight = nn.Parameter(to_torch(decode_packed(packed, device="cpu")).to(dtype))
            routers.add(f"{name}.weight")
        elif type(module) is nn.Linear:
            setattr(owner, leaf, QuantizedLinear(packed, module.bias))
        elif type(module) is nn.Embedding or hasattr(module, "embed_scale"):
            scale = float(getattr(module, "embed_scale", 1.0))  # Gemma multiplies what it looks up
            setattr(owner, leaf, QuantizedEmbedding(packed, dtype, scale=scale))
        else:
            raise ModelError(
                f'{folder.path}: "{name}" is quantized, but a {type(module).__name__} cannot be read so',
                code="E309",
                fix="use the unquantized model",
            )
    return routers


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
        if not quantizer.fits((module.out_features, module.in_features)):
            left.append(name)
            continue
        parent, _, leaf = name.rpartition(".")
        packed = quantizer.quantize(folder.value(f"{name}.weight"))
        setattr(zoo.get_submodule(parent), leaf, QuantizedLinear(packed, module.bias))
    left += quantize_experts(zoo, folder, quantizer)
    return left_out(left, scheme, folder.config)


def tie_head(zoo: Any) -> None:
    """Make the output layer use the embedding's values."""
    embedding = zoo.get_input_embeddings()
    if isinstance(embedding, QuantizedEmbedding):
        zoo.set_output_embeddings(QuantizedLinear.over(embedding))
        return
    head = nn.Linear(embedding.embedding_dim, embedding.num_embeddings, bias=False, device="meta")
    head.weight = embedding.weight
    zoo.set_output_embeddings(head)


def describe(zoo: Any, folder: ModelFolder, notes: tuple[str, ...]) -> ModelInfo:
    """Return the facts of a loaded base."""
    names = {module: name for name, module in zoo.named_modules()}
    table, head = zoo.get_input_embeddings(), zoo.get_output_embeddings()
    linears = {
        name: (int(module.out_features), int(module.in_features))
        for name, module in zoo.named_modules()
        if isinstance(module, nn.Linear | QuantizedLinear)
        and layer_of(name) is not None
        and not (is_expert(name) or is_router(folder.family, name))
    }
    return ModelInfo(
        family=folder.family,
        num_layers=len(zoo.get_decoder().layers),
        vocab_size=int(zoo.config.vocab_size),
        max_positions=folder.config.get("max_position_embeddings"),
        max_tokens=None,  # transformers applies its windows
        can_pack=folder.family in attention.PACKABLE,
        linears=linears,
        num_parameters=sum(out * width for out, width in linears.values()),
        quantized={name: str(scheme) for name, scheme in schemes_of(zoo)},
        notes=notes,
        ends={
            names[table]: (int(table.embedding_dim), int(table.num_embeddings)),
            names.get(head, "lm_head"): (int(head.out_features), int(head.in_features)),
        },
        is_tied=folder.is_tied,
        can_batch=generation.can_batch(zoo),
        can_pad_left=folder.family in attention.PADDABLE,
        num_experts=num_experts(folder.config),
        norms=find_norms(zoo),
        experts=stacks_of(folder),
    )


def schemes_of(zoo: nn.Module) -> Iterator[tuple[str, Scheme]]:
    """Yield every quantized module with its scheme."""
    for name, module in zoo.named_modules():
        if isinstance(module, QuantizedLinear | QuantizedEmbedding):
            yield name, module.stored.scheme


def packed_keys(zoo: nn.Module) -> set[str]:
    """Return the names of the arrays that hold quantized weights."""
    return {
        f"{name}.{key}"
        for name, module in zoo.named_modules()
        if isinstance(module, QuantizedLinear | QuantizedEmbedding)
        for key in module.keys
    }


@torch.no_grad()
def check_head(model: TorchModel, folder: ModelFolder) -> None:
    """Refuse a family whose logits are not head(last hidden state) as `shared.families` has it."""
    tokens_BT = torch.arange(4, device=model.device)[None] % model.info.vocab_size
    theirs = model.zoo(input_ids=tokens_BT, use_cache=False).logits.float()
    ours = model.head.logits(model.decoder(input_ids=tokens_BT, use_cache=False).last_hidden_state[0])
    gap = float((theirs[0] - ours).abs().max() / theirs.abs().max())
    check_logits(folder.family, gap=gap, exact=model.zoo.dtype == torch.float32)
