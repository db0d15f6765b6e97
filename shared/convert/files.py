"""What a model folder holds beside its weights: config and tokenizer files, copied or adjusted."""

from __future__ import annotations

import shutil
from pathlib import Path

from shared.durable import write_json
from shared.folder import ModelFolder
from shared.quant.quanto_folder import MAP

COPIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "generation_config.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' name -> a config's
WORDS = {name: kind for kind, name in DTYPES.items()}
QUANTIZED_KEYS = ("quantization", "quantization_config")


def write_tokenizer(source: ModelFolder, folder: Path) -> None:
    """Copy the tokenizer and generation files that the source has."""
    for name in COPIED:
        if (source.path / name).is_file():
            shutil.copyfile(source.path / name, folder / name)


def write_config(source: ModelFolder, folder: Path, *, dtype: str | None, plain: bool) -> None:
    """Write config.json: the source's own bytes, or with another dtype and, if plain, without its quantization."""
    if dtype is None and not (plain and any(key in source.config for key in QUANTIZED_KEYS)):
        shutil.copyfile(source.path / "config.json", folder / "config.json")
        if not plain and (source.path / MAP).is_file():
            shutil.copyfile(source.path / MAP, folder / MAP)
        return
    config = {key: value for key, value in source.config.items() if not (plain and key in QUANTIZED_KEYS)}
    if dtype is not None:
        config["torch_dtype"] = config["dtype"] = dtype
    write_json(folder / "config.json", config)
