"""What llama.cpp knows of each family: metadata, names, and how tensors are turned on the way into a GGUF file.

Facts are those of llama.cpp's loaders (src/models/*.cpp); what they fix in code is checked against the config, and a
model that says otherwise is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from shared.errors import CapabilityError
from shared.families import config_fault, config_faults, with_old_keys
from shared.folder import ModelFolder

SILU, GELU = ("silu", "swish"), ("gelu_pytorch_tanh",)


@dataclass(frozen=True)
class Family:
    """A family as llama.cpp computes it."""

    arch: str
    interleaved: bool = False  # rotary pairs are neighbours: rows of q and k are reordered
    norm_offset: float = 0.0  # added to the weights of norms, which llama.cpp multiplies as they are
    activations: tuple[str, ...] = SILU
    window_period: int = 0  # of each so many layers the last sees everything, the others a window; 0: no window


FAMILIES = {
    "llama": Family("llama", interleaved=True),
    "mistral": Family("llama", interleaved=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "phi3": Family("phi3"),
    "gemma2": Family("gemma2", norm_offset=1.0, activations=GELU, window_period=2),
    "gemma3_text": Family("gemma3", norm_offset=1.0, activations=GELU, window_period=6),
}
DEEP_GEMMAS = {"gemma2": 46, "gemma3": 62}  # layers of the 27B models, whose attention llama.cpp scales differently


@dataclass(frozen=True)
class Facts:
    """A model's architecture in llama.cpp's words."""

    family: Family
    config: Mapping[str, Any]  # of transformers, every default filled in
    head_dim: int
    num_heads: int
    num_kv_heads: int
    context: int
    notes: tuple[str, ...]


def read_facts(folder: ModelFolder) -> Facts:
    """Return the facts of a folder; raises CapabilityError for what llama.cpp does not compute as the model does."""
    family = FAMILIES.get(folder.family)
    if family is None:
        raise CapabilityError(
            f'the family "{folder.family}" cannot be exported to GGUF',
            code="E405", expected=f"one of {', '.join(FAMILIES)}",
            fix="export a Hugging Face folder (--to hf) and convert it with llama.cpp's own script",
        )  # fmt: skip
    config = whole_config(folder)
    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    check_computed(family, config, head_dim=head_dim)
    context, notes = int(config["max_position_embeddings"]), ()
    window = config.get("sliding_window")
    if window and not family.window_period and config.get("use_sliding_window") is not False and window < context:
        notes = (f"llama.cpp does not apply the model's window, so the context is cut to it: {window} tokens",)
        context = int(window)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    return Facts(family, config, head_dim, heads, kv_heads, context, notes)


def whole_config(folder: ModelFolder) -> dict[str, Any]:
    """Return the config with transformers' defaults for what it leaves out."""
    from transformers import AutoConfig

    own = {key: value for key, value in folder.config.items() if key not in ("quantization", "quantization_config")}
    try:
        filled = AutoConfig.for_model(**own).to_dict()
    except config_faults() as error:
        raise config_fault(folder.path, error) from None
    return with_old_keys(filled)


def check_computed(family: Family, config: Mapping[str, Any], *, head_dim: int) -> None:
    """Raise CapabilityError where the config differs from what llama.cpp has fixed in code."""
    activation = config.get("hidden_activation") or config.get("hidden_act")
    if activation not in family.activations:
        raise unlike("activation", activation, family.activations[0])
    layers = int(config["num_hidden_layers"])
    if family.window_period:
        kinds = ["full" if (n + 1) % family.window_period == 0 else "sliding" for n in range(layers)]
        if [str(kind).split("_")[0] for kind in config["layer_types"]] != kinds:
            raise unlike("layer_types", config["layer_types"], f"{family.window_period - 1} sliding, one full")
        deep = layers == DEEP_GEMMAS[family.arch]
        wanted = config["hidden_size"] // config["num_attention_heads"] if deep else head_dim
        if config["query_pre_attn_scalar"] != wanted:
            raise unlike("query_pre_attn_scalar", config["query_pre_attn_scalar"], wanted)
    rotary = float(config.get("partial_rotary_factor") or 1.0)
    if rotary != 1.0 and family.arch != "phi3":
        raise unlike("partial_rotary_factor", rotary, 1.0)
    kind = rope_kind(config)
    if kind not in ("default", "linear", "yarn", "llama3", "longrope", "su"):
        raise unlike("rope_type", kind, "default, linear, yarn, llama3 or longrope")


def unlike(key: str, found: Any, expected: Any) -> CapabilityError:
    """Return the error for a model that llama.cpp would compute otherwise."""
    return CapabilityError(
        f"llama.cpp computes this family with another {key} than this model's ({found})", code="E405",
        expected=str(expected),
        fix="use the model with transformers or mlx-lm: --to hf, --to mlx",
    )  # fmt: skip


def rope_kind(config: Mapping[str, Any]) -> str:
    """Return how rotary frequencies are scaled, "default" for not at all."""
    scaling = config.get("rope_scaling") or {}
    return str(scaling.get("rope_type") or scaling.get("type") or "default")


def row_order(facts: Facts, name: str) -> np.ndarray | None:
    """Return which row of the source each row of q or k comes from, None for tensors that stay.

    Hugging Face pairs channel i with i + d/2 in the rotation, llama.cpp's llama i with i + 1.
    """
    leaf = name.split(".")[-2]
    if not facts.family.interleaved or leaf not in ("q_proj", "k_proj"):
        return None
    heads = facts.num_heads if leaf == "q_proj" else facts.num_kv_heads
    order = np.arange(heads * facts.head_dim).reshape(heads, 2, facts.head_dim // 2)
    return order.swapaxes(1, 2).reshape(-1)


def rope_tensors(facts: Facts) -> dict[str, np.ndarray]:
    """Return the tensors that scale rotary frequencies, (head_dim / 2,) float32: Llama 3's and Phi-3's long rope."""
    config, kind = facts.config, rope_kind(facts.config)
    scaling = config.get("rope_scaling") or {}
    if kind in ("longrope", "su"):
        return {
            f"rope_factors_{name}.weight": np.array(scaling[f"{name}_factor"], dtype=np.float32)
            for name in ("long", "short")
        }
    if kind != "llama3":
        return {}
    exponents = np.arange(0, facts.head_dim, 2, dtype=np.float64) / facts.head_dim
    wavelengths = 2 * math.pi * float(config["rope_theta"]) ** exponents
    low, high, factor = (float(scaling[key]) for key in ("low_freq_factor", "high_freq_factor", "factor"))
    original = float(scaling["original_max_position_embeddings"])
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    return {"rope_freqs.weight": (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)}


def add_architecture(writer: Any, facts: Facts) -> None:
    """Add a model's sizes and settings to a GGUF writer."""
    config = facts.config
    for add, key in (
        (writer.add_embedding_length, "hidden_size"), (writer.add_block_count, "num_hidden_layers"),
        (writer.add_feed_forward_length, "intermediate_size"), (writer.add_vocab_size, "vocab_size"),
    ):  # fmt: skip
        add(int(config[key]))
    writer.add_context_length(facts.context)
    writer.add_head_count(facts.num_heads)
    writer.add_head_count_kv(facts.num_kv_heads)
    writer.add_key_length(facts.head_dim)
    writer.add_value_length(facts.head_dim)
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_rope_dimension_count(int(facts.head_dim * float(config.get("partial_rotary_factor") or 1.0)))
    writer.add_rope_freq_base(float(config["rope_theta"]))
    add_rope_scaling(writer, config)
    if facts.family.window_period:
        writer.add_sliding_window(int(config["sliding_window"]))
        add_optional(writer.add_attn_logit_softcapping, config.get("attn_logit_softcapping"))
        add_optional(writer.add_final_logit_softcapping, config.get("final_logit_softcapping"))
        add_optional(writer.add_rope_freq_base_swa, config.get("rope_local_base_freq"))


def add_rope_scaling(writer: Any, config: Mapping[str, Any]) -> None:
    """Add how rotary frequencies are scaled; Llama 3's scaling is a tensor instead."""
    from gguf import RopeScalingType

    scaling, kind = config.get("rope_scaling") or {}, rope_kind(config)
    key, longest = "original_max_position_embeddings", int(config["max_position_embeddings"])
    original = int(scaling.get(key) or config.get(key) or longest)
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType.LINEAR if kind == "linear" else RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(scaling["factor"]))
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(original)
        add_optional(writer.add_rope_scaling_yarn_beta_fast, scaling.get("beta_fast"))
        add_optional(writer.add_rope_scaling_yarn_beta_slow, scaling.get("beta_slow"))
    if kind in ("longrope", "su"):
        stretched = math.sqrt(1 + math.log(longest / original) / math.log(original))
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(float(scaling.get("attention_factor") or stretched))


def add_optional(add: Callable[[float], None], value: Any) -> None:
    """Add a number that a model may not have."""
    if value is not None:
        add(float(value))
