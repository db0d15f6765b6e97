"""Supervised fine-tuning: the weighted negative log-likelihood of the supervised tokens."""

from __future__ import annotations

from typing import Any


def sft(logp_N: Any, weights_N: Any) -> Any:
    """Return the *sum* -sum(w * log p) in nats, for NumPy, MLX or torch arrays alike.

    The update divides it once by the sum of weights over all its micro-batches.

    >>> import numpy as np
    >>> float(sft(np.log([0.5, 0.25]), np.array([1.0, 0.0])))
    0.6931471805599453
    """
    return -(logp_N * weights_N).sum()
