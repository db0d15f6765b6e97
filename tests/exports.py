"""Tiny random models of every family that goes to GGUF, with a tokenizer that llama.cpp knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.conftest import CHATML, EOS, MERGES, PAD, SPECIAL, byte_tokenizer

BEGIN = "<|begin|>"
SIZES = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128,
    "num_hidden_layers": 2, "max_position_embeddings": 256, "head_dim": 16,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "llama-3": {
        "family": "llama", "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "llama-linear": {
        "family": "llama", "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    },
    "mistral": {"sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
    "gemma2": {"query_pre_attn_scalar": 16, "sliding_window": 8, "final_logit_softcapping": 5.0},
    "gemma3_text": {"query_pre_attn_scalar": 16, "sliding_window": 8, "num_hidden_layers": 6},
    "phi3": {"sliding_window": None, "pad_token_id": 0},
}  # fmt: skip


def save_family(folder: Path, name: str, *, dtype: str = "float32", tokenizer: bool = True, **more: Any) -> Path:
    """Write a random model of a family; norms and biases are random too, so that none hides."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {**SIZES, "tie_word_embeddings": False, **FAMILIES[name], **more}
    family = settings.pop("family", name)
    vocabulary = len(SPECIAL) + 256 + len(MERGES)
    tied = {"tie_word_embeddings": True} if family.startswith("gemma") else {}
    config = AutoConfig.for_model(
        family, vocab_size=vocabulary, bos_token_id=vocabulary - 3, eos_token_id=vocabulary - 1, **{**settings, **tied}
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=random) * 0.1
            parameter.copy_(noise + 1 if "norm" in key and not family.startswith("gemma") else noise)
    model.to(getattr(torch, dtype)).save_pretrained(str(folder))
    return save_gpt2_tokenizer(folder) if tokenizer else folder


def save_gpt2_tokenizer(folder: Path) -> Path:
    """Write a byte-level tokenizer that cuts text as GPT-2's does."""
    from tokenizers import pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = byte_tokenizer(special=SPECIAL, merges=MERGES[:6], bos=BEGIN, eos_at_end=None)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    outer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=BEGIN, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )
    outer.chat_template = CHATML
    outer.save_pretrained(str(folder))
    return folder
