"""Adapters of experts as PEFT keeps them, from ours and back, to the same weights.

Ours, and mlx-lm's: A (E, R, I) and B (E, O, R) of gate_proj, up_proj and down_proj. PEFT adapts what transformers
holds, `experts.gate_up_proj`, gate above up, and `experts.down_proj`, and lays all experts' matrices flat: A (E R, I),
expert below expert, and B (O, R E), whose column r E + e is column r of expert e. Where both are adapted, down_proj is
wrapped around gate_up_proj: that one's matrices are called `experts.base_layer.lora_A`, down_proj's `experts.lora_A`.

Two A of gate and up make one of rank 2 R, with B in blocks: [[B_gate, 0], [0, B_up]]. One A of both stays one.
Before transformers 5 each expert had linear layers, and PEFT matrices of each (`experts.0.w1.lora_A`), read here too.
Legend: E experts, I input width, O output width, R rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from shared.adapters.schema import CONFIG_FILE, match_pattern
from shared.adapters.spec import natural
from shared.errors import AdapterError, CapabilityError
from shared.experts import BLOCK, MIXTURES, STACKED, is_stack
from shared.tensors import to_float32
from shared.types import AdapterSpec, Tensor

TARGETS = ("experts.gate_up_proj", "experts.down_proj")  # of transformers' parameters, in the order of the classes
INNER = ".base_layer"  # of the first of two parameters that PEFT wraps
MATRIX = re.compile(r"\.experts(\.base_layer)?\.lora_[AB]$")
ONE_OF_MANY = re.compile(r"(.+)\.\w+\.experts\.(\d+)\.(\w+)\.(lora_[AB])")
OWN_LEAVES = {stored: own for _, leaves in MIXTURES.values() for stored, own in zip(leaves, STACKED, strict=True)}


@dataclass(frozen=True)
class Pair:
    """The two matrices of one kind of all experts, and what their product is scaled by."""

    A: Tensor  # (E, R, I)
    B: Tensor  # (E, O, R)
    scale: float

    @property
    def rank(self) -> int:
        """Return the rank."""
        return self.A.shape[1]


@dataclass(frozen=True)
class Fused:
    """What PEFT keeps of experts: its tensors by names without its prefix; rank and alpha of each parameter."""

    tensors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    ranks: dict[str, int] = field(default_factory=dict[str, int])
    alphas: dict[str, float] = field(default_factory=dict[str, float])


def alpha_of(scale: float, rank: int, kind: str) -> float:
    """Return the alpha that gives a scale; to a whole number where it is one but for a rounding."""
    alpha = scale * (math.sqrt(rank) if kind == "rslora" else rank)
    return float(round(alpha)) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def fuse_experts(spec: AdapterSpec, tensors: Mapping[str, Tensor]) -> Fused:
    """Return PEFT's tensors of a spec's experts; raises CapabilityError where gate and up have no common scale."""
    found = Fused()
    for block in dict.fromkeys(name.rpartition(".")[0] for name in spec.modules if is_stack(name)):
        pairs = {
            leaf: Pair(tensors[f"{block}.{leaf}.lora_A"], tensors[f"{block}.{leaf}.lora_B"],
                       spec.scale_of(f"{block}.{leaf}"))
            for leaf in ("gate_proj", "up_proj", "down_proj") if f"{block}.{leaf}" in spec.modules
        }  # fmt: skip
        parts = {"gate_up_proj": gate_above_up(pairs, block), "down_proj": pairs.get("down_proj")}
        for leaf, pair in parts.items():
            if pair is None:
                continue
            inner = INNER if leaf == "gate_up_proj" and parts["down_proj"] is not None else ""
            found.tensors[f"{block}{inner}.lora_A"] = flat_A(pair.A)
            found.tensors[f"{block}{inner}.lora_B"] = flat_B(pair.B)
            found.ranks[f"{block}.{leaf}"] = pair.rank
            found.alphas[f"{block}.{leaf}"] = alpha_of(pair.scale, pair.rank, spec.kind)
    return found


def gate_above_up(pairs: Mapping[str, Pair], block: str) -> Pair | None:
    """Return gate and up as one; None where neither is adapted."""
    both = [pairs[leaf] for leaf in ("gate_proj", "up_proj") if leaf in pairs]
    if not both:
        return None
    if len({pair.scale for pair in both}) > 1:
        raise CapabilityError(
            f'"{block}.gate_proj" is scaled by {both[0].scale:g} and its up_proj by {both[1].scale:g}: PEFT, which has '
            "them as one tensor, knows one scale", code="E405", expected="one rank and one alpha",
        )  # fmt: skip
    first, last = both[0], both[-1]
    gate_B, up_B = (pairs[leaf].B if leaf in pairs else zeros_like(first.B) for leaf in ("gate_proj", "up_proj"))
    if first.A.dtype == last.A.dtype and np.array_equal(first.A.data, last.A.data):
        return Pair(first.A, joined([gate_B, up_B], axis=1), first.scale)
    blocks = [
        joined([gate_B, zeros_like(gate_B, last.rank)], axis=2), joined([zeros_like(up_B, first.rank), up_B], axis=2),
    ]  # fmt: skip
    return Pair(joined([first.A, last.A], axis=1), joined(blocks, axis=1), first.scale)


def zeros_like(B: Tensor, rank: int | None = None) -> Tensor:
    """Return a B of zeros, of another rank where asked."""
    return Tensor(B.dtype, np.zeros((*B.shape[:2], B.shape[2] if rank is None else rank), dtype=B.data.dtype))


def joined(parts: Sequence[Tensor], *, axis: int) -> Tensor:
    """Return tensors one behind the other, in float32 where their dtypes differ."""
    dtypes = {part.dtype for part in parts}
    if len(dtypes) > 1:
        return Tensor("F32", np.concatenate([to_float32(part) for part in parts], axis=axis))
    return Tensor(dtypes.pop(), np.concatenate([part.data for part in parts], axis=axis))


def flat_A(A: Tensor) -> Tensor:
    """Return (E R, I)."""
    return Tensor(A.dtype, A.data.reshape(-1, A.shape[-1]))


def flat_B(B: Tensor) -> Tensor:
    """Return (O, R E).

    >>> flat_B(Tensor("F32", np.float32([[[1, 2]], [[3, 4]]]))).data.tolist()
    [[1.0, 3.0, 2.0, 4.0]]
    """
    number, out, rank = B.shape
    return Tensor(B.dtype, np.ascontiguousarray(B.data.transpose(1, 2, 0)).reshape(out, rank * number))


@dataclass(frozen=True)
class Unfused:
    """Adapters of experts as we have them: tensors by our names, rank and alpha of every module."""

    tensors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    ranks: dict[str, int] = field(default_factory=dict[str, int])
    alphas: dict[str, float] = field(default_factory=dict[str, float])


def is_fused(name: str) -> bool:
    """Return whether a tensor of PEFT, without its prefix, is of experts' parameters."""
    return MATRIX.search(name) is not None


def unfuse_experts(
    tensors: Mapping[str, Tensor], targets: Sequence[str], *, kind: str, rank: int, alpha: float,
    ranks: Mapping[str, int], alphas: Mapping[str, float],
) -> Unfused:  # fmt: skip
    """Return our tensors of PEFT's; targets: its target_parameters; rank and alpha, and patterns of them.

    Raises AdapterError where the tensors are not what the config says, CapabilityError for other parameters.
    """
    found = Unfused()
    for target in targets:
        if not f".{target}".endswith(tuple(f".{own}" for own in TARGETS)):
            raise CapabilityError(
                f'the adapter changes the parameter "{target}" (target_parameters), which this version does not know',
                code="E404", expected=", ".join(TARGETS),
            )  # fmt: skip
    for parameter, A, B in parameters_of(tensors, targets):
        own_rank, own_alpha = match_pattern(ranks, parameter, rank), match_pattern(alphas, parameter, alpha)
        pair = unflattened(A, B, int(own_rank), parameter)
        block, _, leaf = parameter.rpartition(".")
        halves = {leaf: pair} if leaf == "down_proj" else gate_and_up(pair, parameter)
        scale = own_alpha / (math.sqrt(own_rank) if kind == "rslora" else own_rank)
        for name, half in halves.items():
            found.tensors[f"{block}.{name}.lora_A"], found.tensors[f"{block}.{name}.lora_B"] = half
            found.ranks[f"{block}.{name}"] = half[0].shape[1]
            found.alphas[f"{block}.{name}"] = alpha_of(scale, half[0].shape[1], kind)
    return found


def stack_experts(
    tensors: Mapping[str, Tensor], *, rank: int, alpha: float, ranks: Mapping[str, int], alphas: Mapping[str, float]
) -> Unfused:
    """Return our tensors of those that PEFT has expert by expert; rank and alpha, and patterns of them.

    Raises AdapterError where an expert is missing, or is adapted in another way than the others.
    """
    groups: dict[str, dict[int, str]] = {}
    for name in tensors:
        if (match := ONE_OF_MANY.fullmatch(name)) and match[3] in OWN_LEAVES:
            own = f"{match[1]}.{BLOCK}.experts.{OWN_LEAVES[match[3]]}.{match[4]}"
            groups.setdefault(own, {})[int(match[2])] = name
    found = Unfused()
    for own, names in groups.items():
        each = [tensors[names[number]] for number in sorted(names)]
        places = [name.rpartition(".")[0] for name in names.values()]
        numbers = {(match_pattern(ranks, one, rank), match_pattern(alphas, one, alpha)) for one in places}
        kinds = {(one.dtype, one.shape) for one in each}
        if sorted(names) != list(range(len(names))) or len(kinds) > 1 or len(numbers) > 1:
            raise AdapterError(
                f'the adapter has {len(names)} matrices of experts for "{own}", which are no stack',
                code="E311", expected="every expert from 0, with one rank and one alpha",
            )  # fmt: skip
        module, ((own_rank, own_alpha),) = own.rpartition(".")[0], numbers
        found.tensors[own] = Tensor(each[0].dtype, np.stack([one.data for one in each]))
        found.ranks[module], found.alphas[module] = int(own_rank), own_alpha
    return found


def is_one_of_many(name: str) -> bool:
    """Return whether a tensor of PEFT, without its prefix, is of one expert."""
    match = ONE_OF_MANY.fullmatch(name)
    return match is not None and match[3] in OWN_LEAVES


def parameters_of(tensors: Mapping[str, Tensor], targets: Sequence[str]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield the adapted parameters of every block with their two flat matrices."""
    names = [name for name in tensors if is_fused(name)]
    for block in sorted({name.rpartition(".lora_")[0].removesuffix(INNER) for name in names}, key=natural):
        wanted = [
            parameter
            for parameter in (f"{block.rpartition('.')[0]}.{target}" for target in TARGETS)
            if any(f".{parameter}".endswith(f".{target}") for target in targets)
        ]
        places = [f"{block}{INNER}", block] if len(wanted) == 2 else [block]
        own = {name for name in names if name.rpartition(".lora_")[0].removesuffix(INNER) == block}
        expected = {f"{place}.lora_{half}" for place in places for half in "AB"}
        if len(places) != len(wanted) or own != expected:
            odd = min(own ^ expected)
            raise AdapterError(
                f'adapter tensor "{odd}" {"is missing" if odd in expected else "is there"}, by the target_parameters '
                f"of {CONFIG_FILE}", code="E311", fix="copy config and tensors of one adapter",
            )  # fmt: skip
        for parameter, place in zip(wanted, places, strict=True):
            yield parameter, tensors[f"{place}.lora_A"], tensors[f"{place}.lora_B"]


def unflattened(A: Tensor, B: Tensor, rank: int, parameter: str) -> tuple[Tensor, Tensor]:
    """Return A (E, R, I) and B (E, O, R) of PEFT's flat ones; raises AdapterError where they do not divide so."""
    if len(A.shape) != 2 or len(B.shape) != 2 or A.shape[0] % rank or A.shape[0] != B.shape[1]:
        raise AdapterError(
            f'adapter tensors of "{parameter}" have shapes {A.shape} and {B.shape}', code="E311",
            expected=f"(experts * {rank}, in) and (out, experts * {rank}) by {CONFIG_FILE}",
        )  # fmt: skip
    number = A.shape[0] // rank
    split = B.data.reshape(B.shape[0], rank, number).transpose(2, 0, 1)
    return (
        Tensor(A.dtype, A.data.reshape(number, rank, A.shape[1])),
        Tensor(B.dtype, np.ascontiguousarray(split)),
    )


def gate_and_up(pair: tuple[Tensor, Tensor], parameter: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the pairs of gate and up: the halves where B is in blocks, else both with all of A."""
    A, B = pair
    rank, out = A.shape[1], B.shape[1] // 2
    if B.shape[1] % 2:
        raise AdapterError(
            f'"{parameter}" has {B.shape[1]} rows', code="E311", expected="gate above up: an even number"
        )
    half = rank // 2
    is_blocks = rank % 2 == 0 and not (B.data[:, :out, half:].any() or B.data[:, out:, :half].any())
    columns = (slice(0, half), slice(half, rank)) if is_blocks else (slice(0, rank),) * 2
    rows = (slice(0, out), slice(out, 2 * out))
    return {
        leaf: (part(A, np.s_[:, column]), part(B, np.s_[:, row, column]))
        for leaf, row, column in zip(("gate_proj", "up_proj"), rows, columns, strict=True)
    }


def part(tensor: Tensor, at: tuple[slice, ...]) -> Tensor:
    """Return some of a tensor's values, contiguous."""
    return Tensor(tensor.dtype, np.ascontiguousarray(tensor.data[at]))
