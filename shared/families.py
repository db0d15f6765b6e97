"""What the zoos do after the last hidden state, per family: one table, so that our loss does the same."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import CapabilityError, ModelError
from shared.experts import FLOAT_EXPERTS, is_expert
from shared.types import Scheme

EMBEDDINGS = frozenset(("embed_tokens", "wte", "word_embeddings", "embeddings", "tok_embeddings", "embed_in"))
# Families whose logits are those of `head_facts`, checked by the parity tests. Any other family is
# compared with the zoo's own logits when it is loaded, and refused where they differ.
CHECKED = frozenset({"llama", "mistral", "qwen2"})

# Families whose feed-forward layers are down(silu(gate) * up) in both zoos.
GATED = CHECKED | {"cohere", "granite", "olmo2", "qwen3", "smollm3"}

# Families of the table in docs/architectures.md, every cell of which a test tries.
PROVEN = CHECKED | {
    "cohere", "cohere2", "gemma2", "gemma3_text", "granite", "mixtral", "olmo2", "olmo3", "phi3", "qwen2_moe", "qwen3",
    "qwen3_moe", "smollm3",
}  # fmt: skip

WINDOWS_APPLIED = frozenset({"cohere2", "gemma3", "gemma3_text", "olmo3"})  # by mlx-lm 0.32, compared with transformers
UNIFORM = frozenset({"mistral", "mixtral", "phi3", "qwen3_moe", "starcoder2"})  # every layer has the config's window
WINDOWED = UNIFORM | {"gemma2", "qwen2", "qwen2_moe", "qwen3"}  # by us on MLX, where mlx-lm applies none
UNVERIFIED = "{family} is not among the families proven by tests; `mlxlora parity` compares both backends on your data"
KEEPS_SCHEME = ("the folder is quantized already; its own scheme is kept",)
CONFIG_FAULTS = (
    TypeError, ValueError, LookupError, AttributeError, AssertionError, RuntimeError, ArithmeticError,
)  # fmt: skip
LOGIT_GAP = 1e-3  # a wrong head is off by the order of its logits


def config_faults() -> tuple[type[Exception], ...]:
    """Return what the zoos raise where they cannot build a model of a config."""
    from huggingface_hub.errors import StrictDataclassError  # of transformers 5's typed configs

    return (*CONFIG_FAULTS, StrictDataclassError)


def config_fault(path: Path, error: Exception) -> ModelError:
    """Return the error for a folder whose config a zoo cannot build a model of, on one line.

    mlx-lm's `ModelArgs` take fewer defaults than transformers' configs, which need not state theirs.
    """
    text = " ".join(str(error).split())
    if lacking := re.match(r"ModelArgs\.__init__\(\) missing \d+ required positional arguments?: (.*)", text):
        keys = ", ".join(re.findall(r"'(\w+)'", lacking[1]))
        return ModelError(
            f"{path / 'config.json'} lacks {keys}, which mlx-lm's model of this family needs",
            code="E302",
            fix="add what is missing, or use the torch backend, where the family may have a default",
        )
    return ModelError(
        f"{path / 'config.json'}: {text}",
        code="E302",
        fix="config.json does not describe a model",
    )


@dataclass(frozen=True)
class HeadFacts:
    """logits = softcap * tanh(z / softcap) with z = (h W.T + b) * scale; no soft-cap where None."""

    scale: float = 1.0
    softcap: float | None = None


def head_facts(config: Mapping[str, Any]) -> HeadFacts:
    """Return the facts a config states: Gemma's soft-cap, Cohere's and Granite's logit scales."""
    scale = 1.0
    if config.get("logit_scale") is not None:
        scale = float(config["logit_scale"])
    elif config.get("logits_scaling"):
        scale = 1.0 / float(config["logits_scaling"])
    cap = config.get("final_logit_softcapping")
    return HeadFacts(scale=scale, softcap=float(cap) if cap else None)


def with_old_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config whose rope settings, experts and pattern of windows also stand under the older keys.

    transformers 5 saves rope as `rope_parameters`, by kind of layer where there are two; mlx-lm 0.32 reads only the
    older keys for many families, and silently takes its own default base instead.

    >>> with_old_keys({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})["rope_theta"]
    500000.0
    """
    result, found = dict(config), config.get("rope_parameters")
    if config.get("num_local_experts") is not None:
        result.setdefault("num_experts", config["num_local_experts"])
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and "full_attention" in kinds:
        result.setdefault("sliding_window_pattern", kinds.index("full_attention") + 1)
    if not isinstance(found, Mapping):
        return result
    local = found.get("sliding_attention")
    if isinstance(local, Mapping):
        result.setdefault("rope_local_base_freq", local.get("rope_theta"))
        found = found.get("full_attention", {})
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in found:
            result.setdefault(key, found[key])
    if found.get("rope_type", "default") != "default":
        plain = {key: value for key, value in found.items() if key not in ("rope_theta", "partial_rotary_factor")}
        result["rope_scaling"] = result.get("rope_scaling") or plain
    return result


def unapplied(config: Mapping[str, Any], what: str) -> CapabilityError:
    """Return the error for a setting that changes the numbers and that mlx-lm's model does not know."""
    return CapabilityError(
        f"config.json: {what}, which mlx-lm's {config['model_type']} model does not apply",
        fix="use the torch backend",
    )


def windows_of(config: Mapping[str, Any]) -> list[int | None]:
    """Return the sliding window of every layer, None where it has none, in families where mlx-lm applies none.

    Source: transformers 5, whose configs list the kinds of layers; older ones leave them to each family's rule.

    >>> windows_of({"model_type": "mistral", "sliding_window": 4096, "num_hidden_layers": 2})
    [4096, 4096]
    >>> windows_of({"model_type": "gemma2", "sliding_window": 4096, "num_hidden_layers": 2})
    [4096, None]
    """
    family, window, layers = str(config.get("model_type")), config.get("sliding_window"), config["num_hidden_layers"]
    optional = family.startswith(("qwen", "smollm"))
    if family not in WINDOWED or not isinstance(window, int) or not config.get("use_sliding_window", not optional):
        return [None] * layers
    kinds = config.get("layer_types")
    if family in UNIFORM or not isinstance(kinds, list):
        first = config.get("max_window_layers", 28) if family in ("qwen2", "qwen3") else 0
        last = config.get("max_window_layers", 28) if family == "qwen2_moe" else layers
        every = 2 if family in ("gemma2", "qwen2_moe") else 1
        return [window if first <= number < last and number % every == 0 else None for number in range(layers)]
    return [window if kind == "sliding_attention" else None for kind in kinds]


def unapplied_window(config: Mapping[str, Any]) -> int | None:
    """Return the sliding window of a config that neither mlx-lm's model nor we apply on MLX, None where there is none.

    Up to that many tokens a window changes nothing, so shorter rows are exact.

    >>> unapplied_window({"model_type": "phimoe", "sliding_window": 4096})
    4096
    >>> unapplied_window({"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False})
    """
    window, kinds = config.get("sliding_window"), config.get("layer_types")
    family = str(config.get("model_type"))
    if not isinstance(window, int) or family in WINDOWS_APPLIED or family in WINDOWED:
        return None
    if not config.get("use_sliding_window", not family.startswith("qwen")):
        return None
    if isinstance(kinds, list) and "sliding_attention" not in kinds:
        return None
    mixed = isinstance(kinds, list) and len(set(kinds)) > 1
    return None if mixed and family == "llama" else window


def check_logits(family: str, *, gap: float, exact: bool) -> None:
    """Refuse a family whose logits are not head(last hidden state) as this table has it.

    gap: largest difference to the zoo's own logits, relative to the largest. exact: computed in float32.
    """
    if not gap <= (LOGIT_GAP if exact else 10 * LOGIT_GAP):
        raise ModelError(
            f'the family "{family}" computes its logits in a way this version does not know (gap {gap:.1e})',
            code="E303",
            fix=f"report it; {', '.join(sorted(CHECKED))} are known to be right",
        )


def unknown_layout(family: str) -> ModelError:
    """Return the error for a family whose modules are not where we look for them."""
    return ModelError(
        f'the family "{family}" is laid out in a way this version does not know',
        code="E303",
        fix=f"use a model of a family such as {', '.join(sorted(CHECKED))}",
    )


def left_out(names: Sequence[str], scheme: Scheme, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return notes on what stays float: layers whose width does not divide into groups, and experts, if any."""
    notes, linears = [], [name for name in names if not is_expert(name)]
    if linears:
        more = f" (and {len(linears) - 1} more)" if len(linears) > 1 else ""
        notes.append(f"not quantized, width not divisible by {scheme.group_size}: {min(linears)}{more}")
    if len(linears) < len(names):
        notes.append(FLOAT_EXPERTS.format(family=config["model_type"]))
    return tuple(notes)
