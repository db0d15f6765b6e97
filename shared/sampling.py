"""Picking the next token from logits, once for all backends: same logits and seed, same token."""

from __future__ import annotations

import numpy as np

from shared.seeds import generator
from shared.types import Sampling


def pick(logits_V: np.ndarray, sampling: Sampling, *, prompt: int, n: int) -> tuple[int, float]:
    """Return token n of a prompt and its log-probability (nats, at temperature 1).

    Temperature 0 takes the largest logit, the lowest id on a tie. Else: Gumbel-max with noise that is a
    function of (seed, prompt, n). Source: Gumbel 1954; argmax(logits / T + noise) is an exact sample.

    >>> greedy = Sampling(max_tokens=1, temperature=0.0, seed=0, stop_tokens=())
    >>> pick(np.array([0.0, 3.0, 1.0], dtype=np.float32), greedy, prompt=0, n=0)[0]
    1
    """
    wide_V = logits_V.astype(np.float64)
    top = wide_V.max()
    norm = top + np.log(np.exp(wide_V - top).sum())
    if sampling.temperature == 0:
        token = int(np.argmax(logits_V))
    else:
        noise_V = generator(sampling.seed, "sample", prompt, n).gumbel(size=len(wide_V))
        token = int(np.argmax(wide_V / sampling.temperature + noise_V))
    return token, float(wide_V[token] - norm)
