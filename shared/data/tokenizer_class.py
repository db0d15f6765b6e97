"""Which tokenizer class a folder needs, where that is known without asking AutoTokenizer.

AutoTokenizer imports the configurations of all models, and with them torch where it is installed: 1.3 s of CPU that
an MLX run has no other use for. For the folders below its choice is known; every other folder goes to it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VERSION = "5.23."  # of transformers: the table was compared with AutoTokenizer's choice there
GENERIC = ("PreTrainedTokenizer", "TokenizersBackend")
# (model type, tokenizer_class without "Fast") -> class of transformers
CHOICES = {
    **{(family, name): "TokenizersBackend" for family in ("llama", "mistral", "qwen3") for name in GENERIC},
    ("llama", "LlamaTokenizer"): "LlamaTokenizer",
    ("mistral", "LlamaTokenizer"): "TokenizersBackend",
    **{("qwen2", name): "Qwen2Tokenizer" for name in (*GENERIC, "Qwen2Tokenizer")},
    ("qwen3", "Qwen2Tokenizer"): "Qwen2Tokenizer",
}


def known_class(folder: Path) -> Any | None:
    """Return the class of transformers that AutoTokenizer takes for a folder, None where only it can tell."""
    import transformers

    if not transformers.__version__.startswith(VERSION) or (folder / "tekken.json").exists():
        return None
    settings, config = read_object(folder / "tokenizer_config.json"), read_object(folder / "config.json")
    declared = str(settings.get("tokenizer_class")).removesuffix("Fast")
    name = CHOICES.get((str(config.get("model_type")), declared))
    if name is None or "auto_map" in settings or not (folder / "tokenizer.json").is_file():
        return None
    if name == "LlamaTokenizer" and '"ByteLevel"' in (folder / "tokenizer.json").read_text(encoding="utf-8"):
        name = "TokenizersBackend"  # the class would put a SentencePiece splitter into it
    return getattr(transformers, name)


def read_object(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file, empty where there is none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
