"""What the zoos do after the last hidden state, per family: one table, so that our loss does the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shared.errors import ModelError
from shared.types import Scheme

# Families whose logits are those of `head_facts`, checked by the parity tests. Any other family is
# compared with the zoo's own logits when it is loaded, and refused where they differ.
CHECKED = frozenset({"llama", "mistral", "qwen2"})

LOGIT_GAP = 1e-3  # a wrong head is off by the order of its logits


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


def with_old_rope_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config whose rope settings also stand under rope_theta and rope_scaling.

    transformers 5 saves them as `rope_parameters`; mlx-lm 0.32 reads only the older keys for many families, and
    silently takes its own default base instead.

    >>> with_old_rope_keys({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})["rope_theta"]
    500000.0
    """
    result, found = dict(config), config.get("rope_parameters")
    if isinstance(found, Mapping) and "rope_theta" in found:
        result.setdefault("rope_theta", found["rope_theta"])
        if found.get("rope_type", "default") != "default":
            result.setdefault("rope_scaling", {key: value for key, value in found.items() if key != "rope_theta"})
    return result


def is_tied(config: Mapping[str, Any], *, has_head: bool) -> bool:
    """Return whether head and embedding are one tensor: as the config says, else whether the folder has a head."""
    found = config.get("tie_word_embeddings")
    return (not has_head) if found is None else bool(found)


def check_logits(family: str, *, gap: float, exact: bool) -> None:
    """Refuse a family whose logits are not head(last hidden state) as this table has it.

    gap: largest difference to the zoo's own logits, relative to the largest. exact: computed in float32.
    """
    if not gap <= (LOGIT_GAP if exact else 10 * LOGIT_GAP):
        raise ModelError(
            f'the family "{family}" computes its logits in a way this version does not know (gap {gap:.1e})',
            fix=f"report it; {', '.join(sorted(CHECKED))} are known to be right",
        )


def left_out(names: Sequence[str], scheme: Scheme) -> tuple[str, ...]:
    """Return a note on the layers that stay float because their width does not divide into groups, if any."""
    if not names:
        return ()
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return (f"not quantized, width not divisible by {scheme.group_size}: {min(names)}{more}",)
