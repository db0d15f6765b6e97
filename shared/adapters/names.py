"""Names of adapter tensors: ours (PEFT's orientation and leaves), PEFT's and mlx-lm's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shared.adapters.spec import is_embedding
from shared.types import Tensor

PEFT_FILE, MLX_FILE = "adapter_model.safetensors", "adapters.safetensors"
PEFT_PREFIX = "base_model.model."
COPY = ".base_layer"  # a weight of the base that PEFT saves with the adapter of an embedding or a head
MLX_LEAVES = {
    "lora_A": "lora_a", "lora_B": "lora_b", "lora_magnitude_vector": "m",
    "lora_embedding_A": "lora_a", "lora_embedding_B": "lora_b",
}  # fmt: skip
OWN_LEAVES = {"lora_a": "lora_A", "lora_b": "lora_B", "m": "lora_magnitude_vector"}
PEFT_UNWEIGHTED = ("lora_magnitude_vector", "lora_embedding_A", "lora_embedding_B")  # saved without ".weight"
# Where the libraries name the same module differently: a text model inside a vision model (transformers 5, mlx-lm).
RENAMED = (("model.language_model.", "language_model.model."),)


def peft_name(name: str) -> str:
    """Return PEFT's name of an adapter tensor.

    >>> peft_name("a.q_proj.lora_A"), peft_name("a.q_proj.lora_magnitude_vector")
    ('base_model.model.a.q_proj.lora_A.weight', 'base_model.model.a.q_proj.lora_magnitude_vector')
    """
    return f"{PEFT_PREFIX}{name}" if name.endswith(PEFT_UNWEIGHTED) else f"{PEFT_PREFIX}{name}.weight"


def own_name(name: str) -> str:
    """Return the canonical name of PEFT's adapter tensor, of whichever version.

    >>> own_name("base_model.model.a.q_proj.lora_A.default.weight"), own_name("base_model.model.a.q_proj.lora_A.weight")
    ('a.q_proj.lora_A', 'a.q_proj.lora_A')
    """
    return name.removeprefix(PEFT_PREFIX).removesuffix(".weight").removesuffix(".default")


def mlx_name(name: str) -> str:
    """Return mlx-lm's name of an adapter tensor.

    >>> mlx_name("a.q_proj.lora_A"), mlx_name("a.q_proj.lora_magnitude_vector")
    ('a.q_proj.lora_a', 'a.q_proj.m')
    """
    module, _, leaf = name.rpartition(".")
    return f"{renamed(module, RENAMED)}.{MLX_LEAVES[leaf]}"


def own_name_of_mlx(name: str) -> str:
    """Return the canonical name of mlx-lm's adapter tensor.

    >>> own_name_of_mlx("model.embed_tokens.lora_a"), own_name_of_mlx("lm_head.lora_b")
    ('model.embed_tokens.lora_embedding_A', 'lm_head.lora_B')
    """
    module, _, leaf = name.rpartition(".")
    own = OWN_LEAVES[leaf]
    own = own.replace("lora_", "lora_embedding_") if is_embedding(module) and leaf != "m" else own
    return f"{renamed(module, [(mlx, hf) for hf, mlx in RENAMED])}.{own}"


def renamed(module: str, pairs: Sequence[tuple[str, str]]) -> str:
    """Return a module's name with the first prefix that matches replaced."""
    return next((new + module[len(old) :] for old, new in pairs if module.startswith(old)), module)


def turned(tensor: Tensor) -> Tensor:
    """Return the transposed matrix, contiguous; a vector stays as it is."""
    return Tensor(tensor.dtype, np.ascontiguousarray(tensor.data.T))
