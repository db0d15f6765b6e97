"""Adapter folders as PEFT writes them, made from random numbers: what the tests of fusing and exporting start from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shared.convert.source import plain_weights
from shared.folder import open_folder
from shared.tensors import save_file
from shared.types import Tensor

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj")


def save_adapter(
    folder: Path, base: Path, *, rank: int = 4, alpha: float = 8.0, size: float = 0.05, targets: Sequence[str] = ALL,
    seed: int = 0, **config: Any,
) -> Path:  # fmt: skip
    """Write PEFT's files of a LoRA on every target of a base; size 0 gives an adapter that changes nothing."""
    random, tensors, modules = np.random.default_rng(seed), {}, []
    for weight in plain_weights(open_folder(base)).values():
        if weight.module.rpartition(".")[2] not in targets or not weight.name.endswith(".weight"):
            continue
        out, width = weight.shape
        modules.append(weight.module)
        for leaf, shape, spread in (("A", (rank, width), 0.2), ("B", (out, rank), size)):
            values = (random.standard_normal(shape) * spread).astype(np.float32)
            tensors[f"base_model.model.{weight.module}.lora_{leaf}.weight"] = Tensor("F32", values)
    folder.mkdir(parents=True)
    save_file(folder / "adapter_model.safetensors", tensors.items(), metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha, "target_modules": modules,
        "base_model_name_or_path": str(base), "lora_dropout": 0.0, "bias": "none", **config,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder
