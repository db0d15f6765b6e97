"""Which base an adapter is for: of another architecture it is refused, though its matrices may fit."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from shared.adapters.folder import Adapter
from shared.errors import AdapterError
from shared.folder import ModelFolder

KEY = "architecture"  # of our notes in adapter_config.json
FACTS = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")  # of config.json
VARIABLE = "MLXLORA_ANY_BASE"  # set: whatever fits is taken


def architecture_of(base: ModelFolder) -> dict[str, Any]:
    """Return what of a base an adapter keeps beside its hash."""
    return {name: base.config[name] for name in FACTS if name in base.config}


def check_base(adapter: Adapter, base: ModelFolder) -> None:
    """Raise AdapterError where an adapter's notes name another architecture than the base's."""
    gaps = differences(adapter.notes.get(KEY), architecture_of(base))
    if gaps:
        words = ", ".join(f"{name} {trained}, here {here}" for name, trained, here in gaps)
        what = f"the adapter {adapter.source} was trained on another architecture: {words}"
        raise refusal(what, adapter.trained_on, insist=all(may_fit(*gap) for gap in gaps))


def check_bases(adapters: Sequence[Adapter]) -> None:
    """Raise AdapterError where adapters that are to be one were trained on different architectures."""
    known = [adapter.notes[KEY] for adapter in adapters if KEY in adapter.notes]
    gaps = [gap for other in known[1:] for gap in differences(known[0], other)]
    if gaps:
        words = ", ".join(dict.fromkeys(f"{name} {one} and {other}" for name, one, other in gaps))
        raise refusal(
            f"the adapters were trained on different architectures: {words}", insist=all(may_fit(*gap) for gap in gaps)
        )


def differences(one: Any, other: Any) -> list[tuple[str, Any, Any]]:
    """Return in what two architectures differ of all that both state; in nothing where the user insists."""
    if os.environ.get(VARIABLE) or not (isinstance(one, dict) and isinstance(other, dict)):
        return []
    return [(name, one[name], other[name]) for name in FACTS
            if name in one and name in other and one[name] != other[name]]  # fmt: skip


def may_fit(name: str, trained: Any, here: Any) -> bool:
    """Return whether an adapter's matrices could fit all the same: not those of another width, or of more layers."""
    if name == "num_hidden_layers":
        return isinstance(trained, int) and isinstance(here, int) and here > trained
    return name != "hidden_size"


def refusal(what: str, named: str | None = None, *, insist: bool) -> AdapterError:
    """Return the error that names the base, and how to insist where that could work."""
    fix = f"use the base it was trained on, {named}" if named else "use the base that adapter_config.json names"
    return AdapterError(what, fix=f"{fix}; {VARIABLE}=1 takes whatever fits" if insist else fix)


def other_weights(adapter: Adapter, sha256: str) -> Iterator[str]:
    """Yield that a base of this joint hash is another than the adapter was trained on, as far as its notes say."""
    if adapter.notes.get("base", sha256) != sha256:
        yield "this is not the base that the adapter was trained on: its files differ"


def different_bases(adapters: Sequence[Adapter]) -> Iterator[str]:
    """Yield that adapters that are to be one were trained on different weights, as far as their notes say."""
    if len({adapter.notes["base"] for adapter in adapters if "base" in adapter.notes}) > 1:
        yield "the adapters were trained on different bases: their files differ"
