"""Tokens are drawn from softmax(logits / T), and from nothing but (logits, seed, prompt, place)."""

from __future__ import annotations

import numpy as np
import pytest

from shared.generation.sampling import pick
from shared.types import Sampling

LOGITS = np.array([0.0, 1.0, -2.0, 2.5, 0.3, -np.inf], dtype=np.float32)
DRAWS = 20_000


def sampling(temperature, seed=0):
    return Sampling(max_tokens=1, temperature=temperature, seed=seed, stop_tokens=())


def softmax(logits):
    wide = np.exp(logits.astype(np.float64) - logits.max())
    return wide / wide.sum()


def test_temperature_zero_takes_the_largest_and_the_first_of_equals():
    assert pick(LOGITS, sampling(0.0), prompt=0, n=0)[0] == 3
    assert pick(np.float32([1, 5, 5, 2]), sampling(0.0), prompt=9, n=9)[0] == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_are_distributed_as_softmax(temperature):
    tokens = [pick(LOGITS, sampling(temperature), prompt=0, n=n)[0] for n in range(DRAWS)]
    expected = softmax(LOGITS / np.float32(temperature))
    gap = np.abs(np.bincount(tokens, minlength=len(LOGITS)) / DRAWS - expected)
    assert (gap <= 4.5 * np.sqrt(expected * (1 - expected) / DRAWS)).all()  # 4.5 standard deviations
    assert 5 not in tokens  # probability 0


@pytest.mark.parametrize("temperature", [0.0, 0.5, 2.0])
def test_the_log_probability_is_that_at_temperature_one(temperature):
    token, log_prob = pick(LOGITS, sampling(temperature), prompt=0, n=3)
    assert log_prob == pytest.approx(np.log(softmax(LOGITS)[token]), abs=1e-12)


def test_large_logits_do_not_overflow():
    assert pick(np.float32([1e30, -1e30]), sampling(1.0), prompt=0, n=0) == (0, 0.0)
    assert pick(np.float32([1e4, 1e4]), sampling(0.0), prompt=0, n=0)[1] == pytest.approx(np.log(0.5))


def test_a_draw_is_a_function_of_seed_prompt_and_place():
    flat = np.zeros(1000, dtype=np.float32)
    draw = pick(flat, sampling(1.0), prompt=2, n=5)
    assert pick(flat, sampling(1.0), prompt=2, n=5) == draw
    others = [
        pick(flat, sampling(1.0, seed), prompt=prompt, n=n) for seed, prompt, n in ((1, 2, 5), (0, 3, 5), (0, 2, 6))
    ]
    assert draw not in others
    assert len(set(others)) == 3
