"""What an adapter starts from: fresh values, or another adapter."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from shared.adapters.bases import check_base
from shared.adapters.folder import check_copies, check_fit, read_adapter
from shared.adapters.spec import ends_of, first_values
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
    targets = ", ".join(peft_targets(found.modules, facts)[0])
    saved = f", modules_to_save: [{', '.join(found.saved)}]" if found.saved or spec.saved else ""
    ends = ends_of([*found.modules, *found.saved])
    tied = f", ensure_weight_tying: {str(found.tied).lower()}" if ends else ""
    raise ConfigError(
        "adapter.start: the adapter there is another than the config describes",
        code="E204",
        fix=f"adapter.type: {found.kind}, rank: {found.rank}, alpha: {plain_number(found.alpha)}, targets: [{targets}]"
        + saved
        + tied,
    )
