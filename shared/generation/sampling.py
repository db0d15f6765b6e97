"""Picking the next token from logits, once for all backends: same logits and seed, same token.

Legend: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from shared.seeds import gumbel, key64
from shared.types import Sampling


def pick(
    logits_V: np.ndarray, sampling: Sampling, *, prompt: int, n: int, seen: Collection[int] = ()
) -> tuple[int, float]:
    """Return token n of a prompt and its log-probability (nats; at temperature 1, with nothing filtered or penalized).

    Temperature 0 takes the largest logit, the lowest id on a tie. Else: Gumbel-max; the noise of a token is a function
    of (seed, prompt, n, id), whatever is filtered. Source: Gumbel 1954; argmax(logits / T + noise) is an exact sample.
    prompt: the number or key of the prompt. seen: ids of the text so far, for the repetition penalty.

    >>> greedy = Sampling(max_tokens=1, temperature=0.0, seed=0, stop_tokens=())
    >>> pick(np.array([0.0, 3.0, 1.0], dtype=np.float32), greedy, prompt=0, n=0)[0]
    1
    """
    wide_V = logits_V.astype(np.float64)
    top = wide_V.max()
    norm = top + np.log(np.exp(wide_V - top).sum())
    scores_V = shape(wide_V, sampling, seen=seen)
    if sampling.temperature == 0:
        token = int(np.argmax(scores_V))
    else:
        kept_K = np.flatnonzero(scores_V > -np.inf)
        noise_K = gumbel(kept_K, key=key64(sampling.seed, "sample", prompt, n))
        token = int(kept_K[np.argmax(scores_V[kept_K] + noise_K)])
    return token, float(wide_V[token] - norm)


def shape(wide_V: np.ndarray, sampling: Sampling, *, seen: Collection[int] = ()) -> np.ndarray:
    """Return (V,) float64 logits of the distribution that is drawn from, -inf where a token is filtered out.

    In this order, which is transformers': repetition penalty, temperature, top-k, top-p, min-p. At temperature 0 the
    filters are left out: they keep the largest.
    """
    scores_V = penalize(wide_V, seen, penalty=sampling.repetition_penalty)
    if sampling.temperature == 0:
        return scores_V
    scores_V = scores_V / sampling.temperature
    if 0 < sampling.top_k < len(scores_V):
        scores_V = cut_below(scores_V, np.partition(scores_V, -sampling.top_k)[-sampling.top_k])
    if sampling.top_p < 1:
        scores_V = cut_below(scores_V, nucleus(scores_V, share=sampling.top_p))
    if sampling.min_p > 0:
        scores_V = cut_below(scores_V, scores_V.max() + np.log(sampling.min_p))
    return scores_V


def penalize(scores_V: np.ndarray, seen: Collection[int], *, penalty: float) -> np.ndarray:
    """Return logits with those of seen tokens made smaller: divided by the penalty, below zero multiplied.

    Source: Keskar et al. 2019, section 4.1, with the signs of transformers.
    """
    if penalty == 1 or not seen:
        return scores_V
    ids = np.fromiter(seen, dtype=np.int64)
    result_V = scores_V.copy()
    result_V[ids] = np.where(scores_V[ids] < 0, scores_V[ids] * penalty, scores_V[ids] / penalty)
    return result_V


def nucleus(scores_V: np.ndarray, *, share: float) -> float:
    """Return the smallest logit of the fewest likeliest tokens whose probabilities sum to `share` or more.

    Source: Holtzman et al. 2020, section 3.1.
    """
    p_V = np.exp(scores_V - scores_V.max())
    total = p_V.sum()
    # What is below (1 - share) / V sums to less than 1 - share: none of it is needed, and few tokens are left to sort.
    falling_K = np.sort(scores_V[p_V >= (1 - share) * total / len(p_V)])[::-1]
    p_K = np.exp(falling_K - falling_K[0])
    likelier_K = (np.cumsum(p_K) - p_K) / total  # the sum over all in front of each
    return float(falling_K[max(np.count_nonzero(likelier_K < share), 1) - 1])


def cut_below(scores_V: np.ndarray, least: float) -> np.ndarray:
    """Return logits with those below the least one filtered out; equals of it stay, so that no order decides."""
    return np.where(scores_V < least, -np.inf, scores_V)
