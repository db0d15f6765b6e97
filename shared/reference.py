"""The oracle: every formula of a training step in NumPy float64, without chunks, tricks or speed.

Tests compare the backends with this file; it is checked itself by finite differences.
Legend: N positions, D input width, V vocabulary, O output width, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from shared.families import HeadFacts
from shared.types import Update

CLIP_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_ has the same


@dataclass(frozen=True)
class LossAndGradients:
    """The summed loss in nats and its derivatives; `bias` is None where the head has none."""

    loss: float
    hidden: np.ndarray  # (N, D)
    weight: np.ndarray  # (V, D)
    bias: np.ndarray | None  # (V,)


@dataclass(frozen=True)
class LoRAGradients:
    """Derivatives of a LoRA layer's output, contracted with an incoming gradient."""

    x: np.ndarray  # (N, D)
    A: np.ndarray  # (R, D)
    B: np.ndarray  # (O, R)


@dataclass(frozen=True)
class AdamWState:
    """A tensor and its two moments behind one update."""

    param: np.ndarray
    m: np.ndarray
    v: np.ndarray


def wide(values: np.ndarray) -> np.ndarray:
    """Return the values as float64.

    >>> wide(np.float32([0.5])).dtype
    dtype('float64')
    """
    return np.asarray(values, dtype=np.float64)


def sft_loss(
    hidden_ND: np.ndarray,
    weight_VD: np.ndarray,
    bias: np.ndarray | None,
    targets_N: np.ndarray,
    weights_N: np.ndarray,
    facts: HeadFacts,
) -> LossAndGradients:
    """Return -sum(w * log softmax(logits)[target]) and its gradients.

    logits (N, V) = softcap * tanh(z / softcap), z = (h W.T + b) * scale (Gemma 2 report, section 2).

    >>> zero = sft_loss(np.zeros((1, 3)), np.ones((4, 3)), None, np.array([2]), np.array([2.0]), HeadFacts())
    >>> round(zero.loss, 6), zero.hidden.tolist()
    (2.772589, [[0.0, 0.0, 0.0]])
    """
    h_ND, w_VD, rows_N = wide(hidden_ND), wide(weight_VD), np.arange(len(targets_N))
    z_NV = (h_ND @ w_VD.T + (0.0 if bias is None else wide(bias))) * facts.scale
    curve_NV = np.ones_like(z_NV)
    if facts.softcap is not None:
        z_NV = facts.softcap * np.tanh(z_NV / facts.softcap)
        curve_NV = 1 - (z_NV / facts.softcap) ** 2
    top_N1 = z_NV.max(axis=1, keepdims=True)
    logp_NV = z_NV - top_N1 - np.log(np.exp(z_NV - top_N1).sum(axis=1, keepdims=True))
    slope_NV = np.exp(logp_NV)
    slope_NV[rows_N, targets_N] -= 1
    slope_NV *= wide(weights_N)[:, None] * facts.scale * curve_NV
    return LossAndGradients(
        loss=float(-(wide(weights_N) * logp_NV[rows_N, targets_N]).sum()),
        hidden=slope_NV @ w_VD,
        weight=slope_NV.T @ h_ND,
        bias=None if bias is None else slope_NV.sum(axis=0),
    )


def lora(
    x_ND: np.ndarray,
    W_OD: np.ndarray,
    bias: np.ndarray | None,
    A: np.ndarray,
    B: np.ndarray,
    scale: float,
    mask: np.ndarray | None = None,
    p: float = 0,
) -> np.ndarray:
    """Return (N, O): x W.T + bias + scale * dropped(x) A.T B.T, with A (R, D) and B (O, R).

    mask (N, D), true where a feature is kept; kept ones are scaled by 1 / (1 - p). Source: Hu et al. 2021, eq. 3.

    >>> one = np.ones((1, 1))
    >>> lora(one, one, None, 2 * one, 3 * one, 0.5).tolist()
    [[4.0]]
    """
    y_NO = wide(x_ND) @ wide(W_OD).T + (0.0 if bias is None else wide(bias))
    return y_NO + scale * (dropped(x_ND, mask, p) @ wide(A).T @ wide(B).T)


def dropped(x_ND: np.ndarray, mask: np.ndarray | None, p: float) -> np.ndarray:
    """Return x with dropped features zero and the kept ones scaled, (N, D).

    >>> dropped(np.ones((1, 2)), np.array([[True, False]]), 0.5).tolist()
    [[2.0, 0.0]]
    """
    return wide(x_ND) if mask is None else wide(x_ND) * mask / (1 - p)


def lora_backward(
    dy_NO: np.ndarray,
    x_ND: np.ndarray,
    W_OD: np.ndarray,
    A: np.ndarray,
    B: np.ndarray,
    scale: float,
    mask: np.ndarray | None = None,
    p: float = 0,
) -> LoRAGradients:
    """Return the gradients of sum(dy * lora(x, ...)) with respect to x, A and B.

    >>> one = np.ones((1, 1))
    >>> found = lora_backward(one, one, one, 2 * one, 3 * one, 0.5)
    >>> found.x.item(), found.A.item(), found.B.item()
    (4.0, 1.5, 1.0)
    """
    low_NR = scale * (wide(dy_NO) @ wide(B))
    keep_ND = dropped(np.ones_like(x_ND, dtype=np.float64), mask, p)
    return LoRAGradients(
        x=wide(dy_NO) @ wide(W_OD) + keep_ND * (low_NR @ wide(A)),
        A=low_NR.T @ dropped(x_ND, mask, p),
        B=scale * wide(dy_NO).T @ (dropped(x_ND, mask, p) @ wide(A).T),
    )


@dataclass(frozen=True)
class DoRAGradients:
    """Derivatives of a DoRA layer's output, contracted with an incoming gradient."""

    x: np.ndarray  # (N, D)
    A: np.ndarray  # (R, D)
    B: np.ndarray  # (O, R)
    m: np.ndarray  # (O,)


def dora(
    x_ND: np.ndarray,
    W_OD: np.ndarray,
    bias: np.ndarray | None,
    A: np.ndarray,
    B: np.ndarray,
    m: np.ndarray,
    scale: float,
    mask: np.ndarray | None = None,
    p: float = 0,
) -> np.ndarray:
    """Return (N, O): m / |W + scale B A| * lora(x) + bias, the norm taken of each row. Source: Liu et al. 2024, eq. 5.

    >>> one = np.ones((1, 1))
    >>> dora(one, one, None, 2 * one, 3 * one, np.array([5.0]), 0.5).tolist()
    [[5.0]]
    """
    norms_O = np.linalg.norm(wide(W_OD) + scale * wide(B) @ wide(A), axis=1)
    y_NO = lora(x_ND, W_OD, None, A, B, scale, mask, p) * (wide(m) / norms_O)
    return y_NO + (0.0 if bias is None else wide(bias))


def dora_backward(
    dy_NO: np.ndarray,
    x_ND: np.ndarray,
    W_OD: np.ndarray,
    A: np.ndarray,
    B: np.ndarray,
    m: np.ndarray,
    scale: float,
    mask: np.ndarray | None = None,
    p: float = 0,
) -> DoRAGradients:
    """Return the gradients of sum(dy * dora(x, ...)), the norm being a constant (Liu et al. 2024, section 4.3).

    >>> one = np.ones((1, 1))
    >>> found = dora_backward(one, one, one, 2 * one, 3 * one, np.array([5.0]), 0.5)
    >>> found.x.item(), found.A.item(), found.B.item(), found.m.item()
    (5.0, 1.875, 1.25, 1.0)
    """
    norms_O = np.linalg.norm(wide(W_OD) + scale * wide(B) @ wide(A), axis=1)
    inner = lora_backward(wide(dy_NO) * (wide(m) / norms_O), x_ND, W_OD, A, B, scale, mask, p)
    z_NO = lora(x_ND, W_OD, None, A, B, scale, mask, p)
    return DoRAGradients(inner.x, inner.A, inner.B, (wide(dy_NO) * z_NO).sum(axis=0) / norms_O)


def adamw(param: np.ndarray, grad: np.ndarray, m: np.ndarray, v: np.ndarray, update: Update) -> AdamWState:
    """Return a tensor and its moments behind one update; the gradient is divided and clipped already.

    Weight decay is decoupled and spares tensors below two dimensions. Source: Loshchilov and Hutter 2019,
    algorithm 2; bias correction of Kingma and Ba 2015, algorithm 1.

    >>> update = Update(step=1, seed=0, lr=0.1, beta1=0.9, beta2=0.99, eps=0.0, weight_decay=0.5,
    ...                 max_grad_norm=None, bias_correction=True, momentum=0.0, nesterov=False)
    >>> one, zero = np.ones((1, 1)), np.zeros((1, 1))
    >>> moved = adamw(one, one, zero, zero, update)
    >>> round(moved.param.item(), 6), round(moved.m.item(), 6), round(moved.v.item(), 6)
    (0.85, 0.1, 0.01)
    """
    m = update.beta1 * wide(m) + (1 - update.beta1) * wide(grad)
    v = update.beta2 * wide(v) + (1 - update.beta2) * wide(grad) ** 2
    m_hat, v_hat = m, v
    if update.bias_correction:
        m_hat, v_hat = m / (1 - update.beta1**update.step), v / (1 - update.beta2**update.step)
    decay = update.lr * update.weight_decay if np.ndim(param) >= 2 else 0.0
    return AdamWState(wide(param) * (1 - decay) - update.lr * m_hat / (np.sqrt(v_hat) + update.eps), m, v)


def clip(grads: Mapping[str, np.ndarray], max_norm: float | None) -> tuple[dict[str, np.ndarray], float]:
    """Return the gradients times min(1, max_norm / (norm + 1e-6)), and their global norm before that.

    Source: Pascanu et al. 2013, algorithm 1. None for max_norm clips nothing.

    >>> clipped, norm = clip({"a": np.array([3.0]), "b": np.array([4.0])}, 1.0)
    >>> norm, clipped["a"].round(6).tolist()
    (5.0, [0.6])
    """
    norm = float(np.sqrt(sum(float((wide(grad) ** 2).sum()) for grad in grads.values())))
    factor = 1.0 if max_norm is None else min(max_norm / (norm + CLIP_EPS), 1.0)
    return {name: wide(grad) * factor for name, grad in grads.items()}, norm
