"""Names of adapter tensors: ours (PEFT's orientation and leaves), PEFT's and mlx-lm's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from shared.adapters.spec import is_embedding
from shared.experts import mlx_stack, own_stack
from shared.types import Tensor

PEFT_FILE, MLX_FILE = "adapter_model.safetensors", "adapters.safetensors"
OWN_FILE = "own_adapter.safetensors"  # of an adapter that no library knows
TENSOR_FILES = (PEFT_FILE, MLX_FILE, OWN_FILE)
PEFT_PREFIX = "base_model.model."
SAVED = ".modules_to_save"  # between a module that is trained whole and its "weight" or "bias"
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
    >>> peft_name("lm_head.modules_to_save.weight")
    'base_model.model.lm_head.weight'
    """
    if SAVED in name:
        return f"{PEFT_PREFIX}{name.replace(SAVED, '')}"
    return f"{PEFT_PREFIX}{name}" if name.endswith(PEFT_UNWEIGHTED) else f"{PEFT_PREFIX}{name}.weight"


def own_name(name: str) -> str:
    """Return the canonical name of PEFT's adapter tensor, of whichever version.

    >>> own_name("base_model.model.a.q_proj.lora_A.default.weight"), own_name("base_model.model.a.q_proj.lora_A.weight")
    ('a.q_proj.lora_A', 'a.q_proj.lora_A')
    """
    return name.removeprefix(PEFT_PREFIX).removesuffix(".weight").removesuffix(".default")


def own_names(stored: Iterable[str], saved: Sequence[str]) -> dict[str, str]:
    """Return the canonical names of PEFT's tensors; saved: `modules_to_save`, ends of module names as PEFT has them.

    >>> own_names(["base_model.model.lm_head.weight"], ["head"])
    {'base_model.model.lm_head.weight': 'lm_head.modules_to_save.weight'}
    """
    names = {}
    for name in stored:
        module, _, leaf = name.removeprefix(PEFT_PREFIX).rpartition(".")
        whole = leaf in ("weight", "bias") and module.endswith(tuple(saved))
        names[name] = f"{module}{SAVED}.{leaf}" if whole else own_name(name)
    return names


def twin(name: str, table: str) -> str:
    """Return which tensor of an embedding holds that of a head tied to it, the matrices of LoRA turned.

    >>> twin("lm_head.lora_A", "model.embed_tokens"), twin("lm_head.modules_to_save.weight", "wte")
    ('model.embed_tokens.lora_embedding_B', 'wte.modules_to_save.weight')
    """
    own = {"lm_head.lora_A": "lora_embedding_B", "lm_head.lora_B": "lora_embedding_A"}
    return f"{table}.{own[name] if name in own else name.removeprefix('lm_head.')}"


def mlx_name(name: str, *, family: str = "") -> str:
    """Return mlx-lm's name of an adapter tensor; family: of the base, which decides what its experts are called.

    >>> mlx_name("a.q_proj.lora_A"), mlx_name("a.q_proj.lora_magnitude_vector")
    ('a.q_proj.lora_a', 'a.q_proj.m')
    >>> mlx_name("a.0.mlp.experts.up_proj.lora_A", family="mixtral")
    'a.0.block_sparse_moe.switch_mlp.up_proj.lora_a'
    """
    module, _, leaf = name.rpartition(".")
    return f"{mlx_stack(family, renamed(module, RENAMED))}.{MLX_LEAVES[leaf]}"


def own_name_of_mlx(name: str) -> str:
    """Return the canonical name of mlx-lm's adapter tensor.

    >>> own_name_of_mlx("model.embed_tokens.lora_a"), own_name_of_mlx("lm_head.lora_b")
    ('model.embed_tokens.lora_embedding_A', 'lm_head.lora_B')
    """
    module, _, leaf = name.rpartition(".")
    own = OWN_LEAVES[leaf]
    own = own.replace("lora_", "lora_embedding_") if is_embedding(module) and leaf != "m" else own
    return f"{own_stack(renamed(module, [(mlx, hf) for hf, mlx in RENAMED]))}.{own}"


def renamed(module: str, pairs: Sequence[tuple[str, str]]) -> str:
    """Return a module's name with the first prefix that matches replaced."""
    return next((new + module[len(old) :] for old, new in pairs if module.startswith(old)), module)


def turned(tensor: Tensor) -> Tensor:
    """Return the transposed matrix, contiguous; a vector stays as it is, and so do matrices of experts in mlx-lm."""
    return tensor if len(tensor.shape) == 3 else Tensor(tensor.dtype, np.ascontiguousarray(tensor.data.T))
