"""Whole models as Hugging Face folders, which transformers and mlx-lm both load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from shared.folder import ModelFolder
from shared.tensors import save_file
from shared.types import Tensor

COPIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "generation_config.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def write_model(folder: Path, tensors: Mapping[str, Tensor], *, source: ModelFolder, dtype: str) -> None:
    """Write weights, config and tokenizer files of a model into an existing folder."""
    save_file(folder / "model.safetensors", tensors.items(), metadata={"format": "pt"})
    config = {key: value for key, value in source.config.items() if key not in ("quantization", "quantization_config")}
    config["torch_dtype"] = config["dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in COPIED:
        if (source.path / name).is_file():
            shutil.copyfile(source.path / name, folder / name)
