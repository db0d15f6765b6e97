"""Whole models as Hugging Face folders, which transformers and mlx-lm both load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from shared.convert.files import QUANTIZED_KEYS, write_tokenizer
from shared.durable import write_json
from shared.folder import ModelFolder
from shared.tensors import save_file
from shared.types import Tensor


def write_model(folder: Path, tensors: Mapping[str, Tensor], *, source: ModelFolder, dtype: str) -> None:
    """Write weights, config and tokenizer files of a model into an existing folder."""
    save_file(folder / "model.safetensors", tensors.items(), metadata={"format": "pt"})
    config = {key: value for key, value in source.config.items() if key not in QUANTIZED_KEYS}
    config["torch_dtype"] = config["dtype"] = dtype
    write_json(folder / "config.json", config)
    write_tokenizer(source, folder)
