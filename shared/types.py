"""The nouns that cross the line between shared code and a backend: frozen, NumPy inside.

Shape suffixes: B rows, T tokens, S examples, N supervised positions, V vocabulary, D model width, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Part = Literal["base", "adapter"]
BackendName = Literal["mlx", "torch"]
MomentFormat = Literal["float32", "8bit"]  # how an optimizer's moments are kept between updates
Spikes = Literal["warn", "skip", "rollback", "ignore"]  # rollback: skip, and back to the last checkpoint's weights
PaddingSide = Literal["right", "left"]  # of rows that are shorter than their micro-batch
Recompute = bool | Literal["offload"]  # true: layers keep their input only; offload: in host memory


@dataclass(frozen=True)
class Tensor:
    """A named dtype and its words. bfloat16 is held as uint16 words: NumPy has no such type."""

    dtype: str  # a safetensors name: F64 F32 F16 BF16 I64 I32 I16 I8 U64 U32 U16 U8 BOOL
    data: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape; words and values count alike."""
        return tuple(self.data.shape)


@dataclass(frozen=True)
class Example:
    """One tokenized row. `supervised` marks the tokens that the model is trained to say."""

    tokens: np.ndarray  # (T,) int32
    supervised: np.ndarray  # (T,) bool; never true at position 0, which nothing predicts
    source: str  # "train.jsonl:3"


@dataclass(frozen=True)
class Shape:
    """The size of a micro-batch that was padded up to it: rows x tokens, and supervised positions."""

    rows: int
    tokens: int
    targets: int


Shapes = Collection[Shape]


@dataclass(frozen=True)
class Batch:
    """One micro-batch: its examples one per row and padded on one side, or packed end to end into a single row.

    Packed, an example attends to itself only and its positions start at 0 again: nothing is computed but real tokens.
    Padded up to a `Shape`, rows of length 0 and supervised positions of weight 0 stand behind the others.
    """

    tokens_BT: np.ndarray  # int32; what stands beside a row's example is never read
    starts_S: np.ndarray  # int32: flat b*T + t of each example's first token, ascending
    lengths_S: np.ndarray  # int32
    slots_S: np.ndarray  # int32: place of each example in its update, whatever the cut
    positions_N: np.ndarray  # int32: flat b*T + t of the hidden state that predicts the target
    targets_N: np.ndarray  # int32
    weights_N: np.ndarray  # float32
    padding_side: PaddingSide = "right"  # of rows of one example each

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens that are not padding."""
        return int(self.lengths_S.sum())

    @property
    def num_supervised(self) -> int:
        """Return the number of supervised positions that are not padding."""
        return int(np.count_nonzero(self.weights_N))

    @property
    def shape(self) -> Shape:
        """Return the size of its arrays."""
        rows, tokens = self.tokens_BT.shape
        return Shape(rows, tokens, len(self.targets_N))

    @property
    def is_packed(self) -> bool:
        """Return whether a row holds more than one example."""
        return len(self.lengths_S) != len(self.tokens_BT)

    @property
    def pads_B(self) -> np.ndarray:
        """Return (B,) int32: how many positions of padding stand in front of each row's example."""
        rows, width = self.tokens_BT.shape
        zeros = np.zeros(rows, dtype=np.int32)
        return zeros if self.is_packed else self.starts_S - width * np.arange(rows, dtype=np.int32)

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (B, T) int32 twice: every position's example by its slot, and the position's place in it."""
        if not self.is_packed:
            times_BT = np.arange(self.tokens_BT.shape[1], dtype=np.int32) - self.pads_B[:, None]
            return np.broadcast_to(self.slots_S[:, None], self.tokens_BT.shape), np.maximum(times_BT, 0)
        times = np.arange(self.tokens_BT.size, dtype=np.int32) - np.repeat(self.starts_S, self.lengths_S)
        return np.repeat(self.slots_S, self.lengths_S)[None], times[None]


@dataclass(frozen=True)
class Update:
    """Every number of one optimizer update; no backend has a default of its own."""

    step: int  # from 1
    seed: int
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float  # on tensors of two or more dimensions only
    max_grad_norm: float | None
    bias_correction: bool
    momentum: float
    nesterov: bool
    max_loss: float = math.inf  # nats; above it the update is skipped
    by_module: bool = False  # also give the gradient's norm of every module


@dataclass(frozen=True)
class Method:
    """Which optimizer: what decides what is kept between updates. `name` is a rule's in shared/optimizers.py."""

    name: str
    state: MomentFormat = "float32"
    lora_plus_ratio: float = 1.0  # rate of LoRA's B to that of all others
    scales_loss: bool = False  # for float16: small gradients would be zero


@dataclass(frozen=True)
class StepStats:
    """What one update did: loss in nats per unit of weight, gradient norm before clipping."""

    loss: float
    grad_norm: float
    skipped: bool  # true: a non-finite loss or gradient, nothing was changed
    overflowed: bool = False  # true: skipped too, but only because the loss scale of float16 was too large
    norms: Mapping[str, float] = field(default_factory=dict[str, float])  # of the gradient by module, where asked for


@dataclass(frozen=True)
class Memory:
    """Bytes in use, at the highest, and at most (None where the platform does not say)."""

    active: int
    peak: int
    limit: int | None


# Formats whose name alone says how many bits a value takes and how many values share a scale (0: a whole row).
FIXED = {
    "nf4": (4, 64), "fp4": (4, 64), "int8": (8, 0), "mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32),
    "quanto-qint2": (2, 128), "quanto-qint4": (4, 128), "quanto-qint8": (8, 0), "quanto-qfloat8": (8, 0),
    "bitnet": (2, 0), "bitnet-inverse": (2, 0),
}  # fmt: skip


# Rules that choose ternary codes; sparsityN gives N percent of each group to zero.
TERNARY_RULES = ("exact", "absmean", "twn", "quantile", "stochastic", *(f"sparsity{n}" for n in range(10, 100, 10)))


@dataclass(frozen=True)
class Scheme:
    """A storage format for weights, e.g. affine with 4 bits in groups of 64; its str is its name in a config.

    >>> print(Scheme("affine", 4, 64, solver="hqq"), Scheme("nf4", 4, 64, double=True), Scheme("ternary", 2, 64))
    affine-4bit-g64+hqq nf4-dq ternary-g64
    """

    name: str  # of the format, which decides how it is decoded
    bits: int  # of a stored code
    group_size: int  # values that share a scale, 0: a whole row
    double: bool = False  # the scales are quantized too
    solver: str = ""  # what chooses the codes, "": the format's own rule

    def __str__(self) -> str:
        bits = f"-{self.bits}bit" if self.name == "affine" else ""
        group = "" if FIXED.get(self.name) == (self.bits, self.group_size) else f"-g{self.group_size}"
        return self.name + bits + group + ("-dq" if self.double else "") + (f"+{self.solver}" if self.solver else "")

    @property
    def codec(self) -> str:
        """Return the key of its codec in the registry: the format, and the solver where one is named."""
        return f"{self.name}+{self.solver}" if self.solver else self.name


@dataclass(frozen=True)
class Stored:
    """What the arrays of a quantized weight stand for: how they are read, and shape and dtype of the weight."""

    scheme: Scheme
    shape: tuple[int, int]  # (O, I)
    dtype: str  # F32, F16 or BF16


@dataclass(frozen=True)
class Packed:
    """A quantized weight: what it is, and the arrays that hold it under the names that its codec gives them."""

    scheme: Scheme
    arrays: Mapping[str, Tensor]  # affine: weight (O, I*bits/32) U32, scales and biases (O, I/group)
    shape: tuple[int, int]  # (O, I) of the weight it stands for
    dtype: str  # of the decoded weight: F32, F16 or BF16

    @property
    def stored(self) -> Stored:
        """Return what the arrays stand for."""
        return Stored(self.scheme, self.shape, self.dtype)


@dataclass(frozen=True)
class AdapterSpec:
    """What to train, resolved against a model: `modules` are canonical names in model order."""

    kind: str  # "lora" | "rslora" | "dora" | "none" (full fine-tuning) | "package.module:NAME" of a user's own
    rank: int
    alpha: float
    dropout: float
    modules: tuple[str, ...]
    ranks: Mapping[str, int] = field(default_factory=dict[str, int])  # of modules that have one of their own
    alphas: Mapping[str, float] = field(default_factory=dict[str, float])
    saved: tuple[str, ...] = ()  # modules that are trained whole, PEFT's modules_to_save
    tied: bool = False  # of a base whose head is its embedding: what is trained of the one is trained of both

    @property
    def scale(self) -> float:
        """Return the multiplier of the low-rank product of modules without numbers of their own."""
        return self.scale_of("")

    def rank_of(self, module: str) -> int:
        """Return the rank of a module."""
        return self.ranks.get(module, self.rank)

    def scale_of(self, module: str) -> float:
        """Return alpha / rank, of rsLoRA alpha / sqrt(rank) (Kalajdzievski 2023, theorem 3.2).

        >>> AdapterSpec("rslora", rank=16, alpha=8.0, dropout=0.0, modules=()).scale_of("q_proj")
        2.0
        """
        rank, alpha = self.rank_of(module), self.alphas.get(module, self.alpha)
        return alpha / math.sqrt(rank) if self.kind == "rslora" else alpha / rank


@dataclass(frozen=True)
class ModelInfo:
    """Facts of a loaded base under Hugging Face names."""

    family: str
    num_layers: int
    vocab_size: int
    max_positions: int | None
    max_tokens: int | None  # longer rows would be computed wrongly (a window that the zoo does not apply)
    can_pack: bool  # examples packed into one row give what they give alone
    linears: Mapping[str, tuple[int, int]]  # module name inside the decoder layers -> (out, in)
    num_parameters: int  # of those linears
    quantized: Mapping[str, str]  # module name -> scheme
    notes: tuple[str, ...]  # what a user should know, to be printed once
    ends: Mapping[str, tuple[int, int]] = field(
        default_factory=dict[str, tuple[int, int]]
    )  # embedding and head, as linears
    is_tied: bool = False  # the head is the embedding
    can_batch: bool = False  # sequences of different lengths are continued side by side
    can_pad_left: bool = False  # a row with padding in front of it gives what it gives alone
    num_experts: int = 1  # in a layer
    norms: Mapping[str, int] = field(default_factory=dict[str, int])  # module with a vector of weights -> its width
    experts: Mapping[str, tuple[int, int, int]] = field(
        default_factory=dict[str, tuple[int, int, int]]
    )  # stacks of experts -> (experts, out, in)

    @property
    def adaptable(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes (out, in) of all modules that adapters know: linears, ends and stacks of experts.

        Of an embedding (D, V), of a stack (E, out, in).
        """
        return {**self.linears, **self.ends, **self.experts}


@dataclass(frozen=True)
class Sampling:
    """How to pick tokens: temperature 0 is greedy; the fields behind the first four change nothing by default."""

    max_tokens: int
    temperature: float
    seed: int
    stop_tokens: tuple[int, ...]
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_strings: tuple[str, ...] = ()  # for those who know text; a backend does not read them
    batch_size: int = 1  # prompts computed together, at most


@dataclass(frozen=True)
class Token:
    """One generated token of one prompt, with its log-probability in nats at temperature 1."""

    prompt: int
    token: int
    log_prob: float
    stopped: bool  # an end token: not part of the text


@dataclass(frozen=True)
class Capability:
    """What a backend can do on this machine, or why it cannot."""

    name: str
    available: bool
    reason: str  # why not, or which device and why
    fix: str | None
    device: str
    dtypes: tuple[str, ...]
    schemes: tuple[str, ...]
    objectives: tuple[str, ...]
    versions: Mapping[str, str]
