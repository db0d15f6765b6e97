"""What an adapter starts from: fresh values, or another adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from shared.adapters.bases import check_base
from shared.adapters.folder import check_copies, check_fit, read_adapter
from shared.adapters.spec import ends_of, first_values, short_name
from shared.adapters.writing import Facts, peft_targets, plain_number
from shared.config import RunConfig
from shared.errors import ConfigError
from shared.folder import ModelFolder
from shared.protocols import Model
from shared.types import AdapterSpec, Tensor


def start_values(config: RunConfig, spec: AdapterSpec, model: Model, base: ModelFolder) -> dict[str, Tensor]:
    """Return the first values of a run's adapter: of its seed, or of the adapter that `adapter.start` names.

    Raises AdapterError and CapabilityError for that folder, ConfigError where the config says another adapter.
    """
    if config.adapter.start is None:
        return first_values(spec, model, seed=config.train.seed)
    found = read_adapter(Path(config.adapter.start).expanduser())
    check_base(found, base)
    check_fit(found, model.info, own=config.adapter.type)
    check_copies(found, base)
    own = replace(found.spec, tied=found.spec.tied and model.info.is_tied)
    check_same(own, spec, facts=Facts(model.info.num_layers, frozenset(model.info.adaptable), model.info.family))
    return dict(found.tensors)


def check_same(found: AdapterSpec, spec: AdapterSpec, *, facts: Facts) -> None:
    """Raise ConfigError unless a config describes the adapter that was found; dropout may differ."""
    same = (
        (found.kind == spec.kind or {found.kind, spec.kind} == {"lora", "rslora"})
        and set(found.modules) == set(spec.modules)
        and set(found.saved) == set(spec.saved)
        and found.tied == spec.tied
        and all(found.rank_of(name) == spec.rank_of(name) for name in spec.modules)
        and all(math.isclose(found.scale_of(name), spec.scale_of(name), rel_tol=1e-9) for name in spec.modules)
    )
    if same:
        return
    there, here = (described(one, facts) for one in (found, spec))
    gaps = ", ".join(key for key in there if there[key] != here[key])
    told = (f"{key}: {value}" for key, value in there.items() if value not in EMPTY or here[key] not in EMPTY)
    raise ConfigError(
        f"adapter.start: the adapter there is another than the config describes ({gaps})", code="E204",
        fix=f"adapter.{', '.join(told)}",
    )  # fmt: skip


EMPTY = ("{}", "[]", "all")


def described(spec: AdapterSpec, facts: Facts) -> dict[str, str]:
    """Return the settings under `adapter` that stand for an adapter, as YAML."""
    targets, layers = peft_targets(spec.modules, replace(facts, modules=None))
    ends = ends_of([*spec.modules, *spec.saved])
    return {
        "type": spec.kind,
        "rank": str(spec.rank),
        "alpha": str(plain_number(spec.alpha)),
        "targets": f"[{', '.join(targets)}]",
        "layers": str(layers or "all"),
        "rank_pattern": pattern(spec.ranks, spec.modules),
        "alpha_pattern": pattern({name: plain_number(alpha) for name, alpha in spec.alphas.items()}, spec.modules),
        "modules_to_save": f"[{', '.join(spec.saved)}]",
        **({"ensure_weight_tying": str(spec.tied).lower()} if ends else {"ensure_weight_tying": "all"}),
    }


def pattern(values: Mapping[str, float], modules: Sequence[str]) -> str:
    """Return numbers of modules as a setting: by short names where all modules of that name have the same.

    >>> pattern({"a.0.q": 4, "a.1.q": 4, "a.1.v": 2}, ["a.0.q", "a.1.q", "a.0.v", "a.1.v"])
    '{q: 4, a.1.v: 2}'
    """
    kinds = {
        kind: {values.get(name) for name in modules if short_name(name) == kind} for kind in map(short_name, values)
    }
    whole = {kind for kind, found in kinds.items() if len(found) == 1}
    names = {short_name(name) if short_name(name) in whole else name: value for name, value in values.items()}
    return f"{{{', '.join(f'{name}: {value}' for name, value in names.items())}}}"
