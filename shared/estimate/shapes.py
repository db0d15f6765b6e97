"""The sizes of a model, from its config and the headers of its weights: no tensor is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shared.adapters.spec import is_embedding, layer_of, natural, short_name
from shared.experts import is_expert, is_router, num_experts, stack_shapes
from shared.folder import COMPUTED, ModelFolder
from shared.types import ModelInfo, Scheme

WORD = 4  # bytes of a float32
STORED = {"F64": 8, "F32": WORD, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class Shape:
    """The sizes of a model, as its headers and config give them."""

    info: ModelInfo
    width: int  # D
    attention: int  # heads * head size
    keys: int  # key heads * head size, once
    mlp: int
    heads: int
    floats: Mapping[str, tuple[int, int]]  # tensors that are not packed -> (elements, bytes of each as stored)
    packed: Mapping[str, int]  # packed arrays -> bytes
    schemes: Mapping[str, Scheme]  # of modules stored quantized
    experts: Mapping[str, tuple[int, int]]  # stored in float, one by one
    tied: bool
    chosen: int = 0  # experts that a token gets

    @property
    def unit(self) -> int:
        """Return the widths of all units that a token's experts compute."""
        return self.chosen * max((out for _, out, wide in self.info.experts.values() if wide == self.width), default=0)

    @property
    def scale_bytes(self) -> int:
        """Return the bytes of a scale: it has the dtype the folder stores."""
        return max((size for _, size in self.floats.values()), default=WORD)


def read_shape(folder: ModelFolder) -> Shape:
    """Return a model's sizes from its headers; no tensor is read."""
    config = folder.config.get("text_config", folder.config) if "hidden_size" not in folder.config else folder.config
    tied = folder.is_tied
    floats, packed, packed_names = {}, {}, folder.packed_names
    for name, entry in folder.entries.items():
        module = name.rpartition(".")[0]
        if COMPUTED.search(name) or (tied and module == "lm_head"):
            continue
        if name in packed_names:
            packed[name] = entry.end - entry.start
        else:
            floats[name] = (math.prod(entry.shape), STORED.get(entry.dtype, WORD))
    info = describe(folder, config)
    heads = int(config.get("num_attention_heads") or 1)
    width = int(config.get("hidden_size") or max((shape[1] for shape in info.linears.values()), default=1))
    head_size = int(config.get("head_dim") or width // heads)
    return Shape(
        info=info, width=width, attention=heads * head_size, heads=heads,
        keys=int(config.get("num_key_value_heads") or heads) * head_size,
        mlp=mlp_width(config, info, width), chosen=int(config.get("num_experts_per_tok") or 1) if info.experts else 0,
        floats=floats, packed=packed, schemes=folder.schemes, experts=float_experts(folder), tied=tied,
    )  # fmt: skip


def mlp_width(config: Mapping[str, Any], info: ModelInfo, width: int) -> int:
    """Return the width of a layer's unit, but for that of experts: of a mixture, that of the expert that all share."""
    if info.experts:
        return max((info.linears[name][0] for name in info.linears if short_name(name) == "gate_proj"), default=0)
    return int(config.get("intermediate_size") or 4 * width)


def float_experts(folder: ModelFolder) -> dict[str, tuple[int, int]]:
    """Return the shapes (out, in) of experts that are not stored quantized, by module."""
    entries = {
        name.removesuffix(".weight"): entry for name, entry in folder.entries.items() if name.endswith(".weight")
    }
    return {
        module: (entry.shape[0], entry.shape[1])
        for module, entry in entries.items()
        if is_expert(module) and len(entry.shape) == 2
    }


def describe(folder: ModelFolder, config: Mapping[str, Any]) -> ModelInfo:
    """Return a model's facts from its headers: matrices inside the decoder layers are its linear modules."""
    floats = {name for name in folder.entries if name.endswith(".weight")} - folder.packed_names
    shapes: dict[str, tuple[int, ...]] = {name.removesuffix(".weight"): folder.entries[name].shape for name in floats}
    shapes |= {module: place.stored.shape for module, place in folder.places.items()}
    linears = {
        module: (shapes[module][0], shapes[module][1])
        for module in sorted(shapes, key=natural)
        if len(shapes[module]) == 2
        and layer_of(module) is not None
        and not (is_expert(module) or is_router(folder.family, module))
    }
    tables = {module: shape for module, shape in shapes.items() if is_embedding(module) and layer_of(module) is None}
    ends = {module: (shape[1], shape[0]) for module, shape in tables.items()}
    if ends:
        width, vocabulary = next(iter(ends.values()))
        ends["lm_head"] = (vocabulary, width)
    return ModelInfo(
        family=folder.family,
        num_layers=len({layer_of(name) for name in linears}),
        vocab_size=int(config.get("vocab_size") or 1),
        max_positions=config.get("max_position_embeddings"),
        max_tokens=None,
        can_pack=True,
        linears=linears,
        num_parameters=sum(out * wide for out, wide in linears.values()),
        quantized={name: str(scheme) for name, scheme in folder.schemes.items()},
        notes=(),
        ends=ends,
        is_tied=folder.is_tied,
        norms={module: shape[0] for module, shape in shapes.items() if len(shape) == 1},
        num_experts=num_experts(folder.config),
        experts=stack_shapes(folder.config, shapes),
    )
