"""Models and rows that are made on the spot, for measurements: real files and shapes, random contents.

Legend: D model width, F width of the MLP, V vocabulary, T tokens of a row, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shared.durable import write_json
from shared.seeds import generator
from shared.tensors import from_float32, save_file
from shared.types import Example, Tensor

BLOCK = 2**20  # random values; larger tensors repeat them
SPREAD = 0.02  # standard deviation of a new Llama's weights
TURNS = 2
SHORTEST = 4


@dataclass(frozen=True)
class Shape:
    """The shape of a Llama."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool

    @property
    def head_dim(self) -> int:
        """Return the width of one attention head."""
        return self.hidden // self.heads

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Return the linear modules of one layer: name -> (out, in)."""
        D, F, kv = self.hidden, self.intermediate, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (D, D), "self_attn.k_proj": (kv, D), "self_attn.v_proj": (kv, D),
            "self_attn.o_proj": (D, D), "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F),
        }  # fmt: skip

    @property
    def num_linear(self) -> int:
        """Return how many weights the layers' linear modules have."""
        return self.layers * sum(out * width for out, width in self.linears.values())

    @property
    def num_parameters(self) -> int:
        """Return how many values the whole model has."""
        return sum(math.prod(shape) for _, shape in self.tensors())

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield every tensor's Hugging Face name and shape."""
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for n in range(self.layers):
            for name, shape in self.linears.items():
                yield f"model.layers.{n}.{name}.weight", shape
            yield f"model.layers.{n}.input_layernorm.weight", (self.hidden,)
            yield f"model.layers.{n}.post_attention_layernorm.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        if not self.tied:
            yield "lm_head.weight", (self.vocabulary, self.hidden)

    def config(self, *, positions: int) -> dict[str, Any]:
        """Return the content of config.json, for rows of at most `positions` tokens."""
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_act": "silu",
            "hidden_size": self.hidden, "intermediate_size": self.intermediate, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim,
            "vocab_size": self.vocabulary, "max_position_embeddings": positions, "tie_word_embeddings": self.tied,
            "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "bos_token_id": 0, "eos_token_id": 0,
        }  # fmt: skip


def write_llama(folder: Path, shape: Shape, *, positions: int, seed: int) -> Path:
    """Write a random Llama in bfloat16 as a Hugging Face folder, and return the folder.

    Its tensors are pieces of one block of random words, so that a large model takes no memory to speak of.
    """
    folder.mkdir(parents=True, exist_ok=True)
    largest = max(math.prod(dims) for _, dims in shape.tensors())
    noise = generator(seed, "synthetic weights").standard_normal(min(largest, BLOCK) + 1, dtype=np.float32)
    words = np.resize(from_float32(noise * np.float32(SPREAD), "BF16").data, largest + BLOCK)
    one = from_float32(np.ones(shape.hidden, dtype=np.float32), "BF16")
    starts = generator(seed, "synthetic starts")

    def value(name: str, dims: tuple[int, ...]) -> Tensor:
        if name.endswith("norm.weight"):
            return one
        start = int(starts.integers(BLOCK))
        return Tensor("BF16", words[start : start + math.prod(dims)].reshape(dims))

    tensors = ((name, value(name, dims)) for name, dims in shape.tensors())
    save_file(folder / "model.safetensors", tensors, metadata={"format": "pt"})
    write_json(folder / "config.json", shape.config(positions=positions))
    return folder


def make_rows(
    count: int, *, median: int, sigma: float, longest: int, supervised: float, vocabulary: int, seed: int
) -> list[Example]:
    """Return chat-like rows: log-normal lengths, turns that begin with a prompt and end with supervised tokens.

    sigma: of the logarithm of the length, 0 for rows of one length. supervised: about that share of the tokens.
    """
    random = generator(seed, "synthetic rows")
    lengths = np.exp(np.log(median) + sigma * random.standard_normal(count))
    rows = []
    for number, length in enumerate(np.clip(np.rint(lengths), SHORTEST, longest).astype(int)):
        tokens = random.integers(0, vocabulary, length, dtype=np.int32)
        rows.append(Example(tokens, mark(int(length), share=supervised), f"made:{number + 1}"))
    return rows


def mark(length: int, *, share: float) -> np.ndarray:
    """Return (T,) bool: the end of every turn, never the first token, and always the last.

    >>> mark(10, share=0.4).astype(int)
    array([0, 0, 0, 1, 1, 0, 0, 0, 1, 1])
    """
    place_T = (np.arange(length) * TURNS / length) % 1
    marked = place_T >= 1 - share - 1e-9
    marked[0], marked[-1] = False, True
    return marked


def step_flops(shape: Shape, examples: Sequence[Example], *, rank: int) -> float:
    """Return the operations that one LoRA update of these rows needs, without recompute or padding.

    Per token: 4 per matmul weight of the layers (forward, and gradient of the input), 6 per adapter weight (its own
    gradient too), and causal attention, forward and twice that backward; per supervised token: 4 per head weight.
    """
    tokens, supervised = (sum(sizes) for sizes in zip(*(sizes_of(example) for example in examples), strict=True))
    adapter = shape.layers * rank * sum(out + width for out, width in shape.linears.values())
    pairs = sum(len(example.tokens) ** 2 for example in examples) / 2
    attention = 3 * 4 * pairs * shape.layers * shape.hidden  # 2 products of 2 operations per pair and channel
    head = 4.0 * supervised * shape.vocabulary * shape.hidden
    return 4.0 * tokens * shape.num_linear + 6.0 * tokens * adapter + attention + head


def sizes_of(example: Example) -> tuple[int, int]:
    """Return the number of tokens of a row, and of supervised ones."""
    return len(example.tokens), int(example.supervised.sum())
