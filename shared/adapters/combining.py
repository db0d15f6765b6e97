"""Several adapters as one: added exactly, or by PEFT's rules for their factors.

With D_i = scale_i B_i A_i and weights w_i. concat: sum w_i D_i exactly, ranks added. svd: the best approximation of
that sum of a chosen rank. linear and ties work on A and B, each taking sqrt(w_i scale_i), so they are not the sum; as
PEFT's add_weighted_adapter has them.
Legend: R rank, K sum of ranks, I input width, O output width. Matrices of experts have one more axis in front.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shared.adapters.bases import check_bases
from shared.adapters.folder import Adapter
from shared.adapters.own import is_own
from shared.adapters.spec import ends_of, leaves_of, natural
from shared.errors import AdapterError, CapabilityError, ConfigError, did_you_mean
from shared.experts import is_stack
from shared.tensors import from_float32, is_finite, to_float32
from shared.types import AdapterSpec, Tensor

METHODS = ("concat", "linear", "ties", "svd")


@dataclass(frozen=True)
class Factors:
    """One adapter's matrices of one module in float64, with its weight and its scale."""

    A: np.ndarray  # (R, I)
    B: np.ndarray  # (O, R)
    weight: float
    scale: float

    @property
    def rank(self) -> int:
        """Return the rank."""
        return self.A.shape[-2]


Pair = tuple[np.ndarray, np.ndarray]  # A (R, I) and B (O, R)


def combine(
    adapters: Sequence[Adapter], weights: Sequence[float], *, method: str, rank: int | None = None,
    density: float | None = None,
) -> Adapter:  # fmt: skip
    """Return one adapter of several; raises ConfigError, and CapabilityError for DoRA, which cannot be added.

    rank: of svd. density: the share of values that ties keeps, 0 to 1.
    """
    check_options(method, rank=rank, density=density)
    chosen = [(adapter, weight) for adapter, weight in zip(adapters, weights, strict=True) if weight != 0]
    if not chosen:
        raise ConfigError("every weight is 0", fix="give one adapter a weight")
    if len(chosen) == 1 and chosen[0][1] == 1 and rank in (None, chosen[0][0].spec.rank):
        return chosen[0][0]  # nothing to add it to
    check_addable([adapter for adapter, _ in chosen])
    check_bases([adapter for adapter, _ in chosen])
    common = Counter(a.spec.scale_of(name) for a, _ in chosen for name in a.spec.modules).most_common(1)[0][0]
    scale = common if method == "concat" else 1.0
    modules = sorted({name for adapter, _ in chosen for name in adapter.spec.modules}, key=natural)
    tensors: dict[str, Tensor] = {}
    for module in modules:
        found = [factors_of(adapter, module, weight) for adapter, weight in chosen if module in adapter.spec.modules]
        pair = joined(found, module, method=method, scale=scale, rank=rank, density=density)
        for leaf, values in zip(leaves_of(module), pair, strict=True):
            tensors[f"{module}.{leaf}"] = rounded(values, name=f"{module}.{leaf}")
    ranks = {module: tensors[f"{module}.{leaves_of(module)[0]}"].shape[-2] for module in modules}
    most = max(ranks.values())
    spec = AdapterSpec(
        "lora", rank=most, alpha=scale * most, dropout=0.0, modules=tuple(modules),
        ranks={name: own for name, own in ranks.items() if own != most},
        alphas={name: scale * own for name, own in ranks.items() if own != most},
        tied=any(adapter.spec.tied for adapter, _ in chosen),
    )  # fmt: skip
    return Adapter(spec, tensors, common_notes([adapter.notes for adapter, _ in chosen]))


def check_options(method: str, *, rank: int | None, density: float | None) -> None:
    """Raise ConfigError for a method that nobody knows, or options that are not its own."""
    if method not in METHODS:
        raise ConfigError(f'--method: unknown value "{method}"', fix=did_you_mean(method, METHODS))
    if (rank is not None) != (method == "svd"):
        raise ConfigError("--rank is what --method svd needs, and no other takes", fix="--method svd --rank 8, say")
    if (density is not None) != (method == "ties"):
        raise ConfigError(
            "--density is what --method ties needs, and no other takes", fix="--method ties --density 0.5"
        )
    if density is not None and not 0 < density <= 1:
        raise ConfigError(f"--density is {density:g}", expected="above 0, at most 1")


def check_addable(adapters: Sequence[Adapter]) -> None:
    """Refuse DoRA, NaN and infinity, and matrices that do not belong to one base."""
    own = next((adapter.spec.kind for adapter in adapters if is_own(adapter.spec.kind)), None)
    if own is not None:
        raise CapabilityError(
            f"{own} is a user's own adapter, of which nobody knows what a sum would be", code="E406",
            expected="LoRA and rsLoRA", fix="use one at a time",
        )  # fmt: skip
    if any(adapter.spec.kind == "dora" for adapter in adapters):
        raise CapabilityError(
            "DoRA scales the base's rows by their norms: such adapters cannot be added to others", code="E406",
            expected="LoRA and rsLoRA", fix="fuse the DoRA adapter into the base, and use the others on that",
        )  # fmt: skip
    whole = next((name for adapter in adapters for name in adapter.spec.saved), None)
    if whole is not None:
        raise CapabilityError(
            f'an adapter brings "{whole}" whole (modules_to_save): two such modules have no sum', code="E406",
            expected="adapters without modules_to_save",
            fix="fuse that adapter into the base, and use the others on that",
        )  # fmt: skip
    if len({adapter.spec.tied for adapter in adapters if ends_of(adapter.spec.modules)}) > 1:
        raise CapabilityError(
            "one adapter changes embedding and head as one tensor, another does not (ensure_weight_tying)", code="E406",
            expected="adapters that treat them alike",
        )  # fmt: skip
    damaged = [name for adapter in adapters for name, tensor in adapter.tensors.items() if not is_finite(tensor)]
    if damaged:
        raise AdapterError(
            f'adapter tensor "{damaged[0]}" holds NaN or infinity', code="E311", fix="use an earlier checkpoint"
        )
    shapes: dict[str, tuple[int, ...]] = {}
    for adapter in adapters:
        for module in adapter.spec.modules:
            A, B = (adapter.tensors[f"{module}.{leaf}"] for leaf in leaves_of(module))
            shape = (*B.shape[:-1], A.shape[-1])
            if shapes.setdefault(module, shape) != shape:
                raise AdapterError(
                    f'"{module}" is {shapes[module]} in one adapter and {shape} in another',
                    expected="adapters of one base",
                )


def factors_of(adapter: Adapter, module: str, weight: float) -> Factors:
    """Return an adapter's matrices of a module."""
    A, B = (to_float32(adapter.tensors[f"{module}.{leaf}"]).astype(np.float64) for leaf in leaves_of(module))
    return Factors(A, B, weight, adapter.spec.scale_of(module))


def joined(
    found: Sequence[Factors], module: str, *, method: str, scale: float, rank: int | None, density: float | None
) -> Pair:
    """Return A and B of a module for one adapter with this scale."""
    if method == "concat":
        return concatenated(found, scale=scale)
    if method == "svd":
        return truncated(*concatenated(found, scale=1.0), module, rank=rank or 1)
    if len({factors.rank for factors in found}) > 1:
        raise ConfigError(
            f'--method {method} adds matrices of one rank; "{module}" has ranks {[f.rank for f in found]}',
            fix="--method concat, or svd with a --rank",
        )
    roots = [math.sqrt(abs(factors.weight * factors.scale)) for factors in found]
    signs = [math.copysign(root, factors.weight) for root, factors in zip(roots, found, strict=True)]
    As, Bs = [factors.A for factors in found], [factors.B for factors in found]
    if method == "linear":
        return total(As, signs), total(Bs, roots)
    if is_stack(module):
        raise CapabilityError(
            f'--method ties trims by PEFT\'s tensors, which "{module}" is a part of', code="E404",
            fix="--method concat, linear or svd",
        )  # fmt: skip
    share = density or 1.0
    smallest = min(matrix.size for matrix in (*As, *Bs))
    if int(share * smallest) < 1:
        raise ConfigError(f'--density {share:g} keeps no value of "{module}"', expected=f"more than {1 / smallest:.3g}")
    return elected(As, signs, density=share), elected(Bs, roots, density=share)


def concatenated(found: Sequence[Factors], *, scale: float) -> Pair:
    """Return A (K, I) and B (O, K) whose product times scale is the weighted sum of all."""
    A = [factors.A * (factors.weight * factors.scale / scale) for factors in found]
    return np.concatenate(A, axis=-2), np.concatenate([factors.B for factors in found], axis=-1)


def truncated(A: np.ndarray, B: np.ndarray, module: str, *, rank: int) -> Pair:
    """Return the factors of the best approximation of B A of a rank (Eckart and Young 1936), without forming B A."""
    if rank > min(*A.shape[-2:], B.shape[-2]):
        raise ConfigError(
            f'--rank {rank}: the sum for "{module}" has rank {A.shape[-2]} at most', fix="--method concat"
        )
    left_Q, left_R = np.linalg.qr(B)
    right_Q, right_R = np.linalg.qr(A.swapaxes(-1, -2))
    U, S, Vh = np.linalg.svd(left_R @ right_R.swapaxes(-1, -2), full_matrices=False)
    return Vh[..., :rank, :] @ right_Q.swapaxes(-1, -2), left_Q @ (U[..., :rank] * S[..., None, :rank])


def total(matrices: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Return the weighted sum."""
    return np.sum([weight * matrix for weight, matrix in zip(weights, matrices, strict=True)], axis=0)


def elected(matrices: Sequence[np.ndarray], weights: Sequence[float], *, density: float) -> np.ndarray:
    """Return the mean of those trimmed values whose sign is that of most (Yadav et al. 2023, TIES, algorithm 1)."""
    kept = np.stack([trimmed(matrix, density) for matrix in matrices])
    sign = np.where(kept.sum(axis=0) >= 0, 1, -1)
    agree = np.sign(kept) == sign
    weighted = kept * np.reshape(weights, (-1, *[1] * (kept.ndim - 1)))
    return (weighted * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)


def trimmed(matrix: np.ndarray, density: float) -> np.ndarray:
    """Return a matrix with its largest values only, as many as the density says."""
    count = int(density * matrix.size)
    largest = np.argsort(-np.abs(matrix), axis=None, kind="stable")[:count]
    result = np.zeros(matrix.size)
    result[largest] = matrix.reshape(-1)[largest]
    return result.reshape(matrix.shape)


def rounded(values: np.ndarray, *, name: str) -> Tensor:
    """Return a matrix in float32, whatever the adapters are in: bfloat16 would round weights and scales away."""
    if not np.abs(values).max(initial=0) <= np.finfo(np.float32).max:
        raise ConfigError(f'the sum is too large for float32 ("{name}")', fix="smaller weights")
    return from_float32(values.astype(np.float32), "F32")


def common_notes(notes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what was noted alike of all, such as the base; not where one of them came from."""
    first = {key: value for key, value in notes[0].items() if key not in ("origin", "sha256")}
    same = {key: value for key, value in first.items() if all(other.get(key) == value for other in notes)}
    return same if "base" in same or "base" not in first else {**same, "base": "several"}  # no base's hash
