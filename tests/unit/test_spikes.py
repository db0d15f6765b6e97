"""What counts as a spike of the loss: rare on noise, sure on a jump, and never a new level for long."""

from __future__ import annotations

import numpy as np
import pytest

from shared.running.spikes import LAG, WINDOW, spike_limit


def alarms(losses: np.ndarray) -> list[int]:
    """Return the updates whose loss is a spike, as a run finds them."""
    known = list(losses)
    return [
        at for at in range(len(known)) if known[at] > spike_limit(known[max(at - LAG - WINDOW, 0) : max(at - LAG, 0)])
    ]


@pytest.mark.parametrize("noise", [0.01, 0.1, 0.3])
def test_noise_gives_fewer_than_one_alarm_in_ten_thousand_updates(noise):
    random = np.random.default_rng(0)
    losses = 2.0 * np.exp(-np.arange(10_000) / 5_000) * (1 + noise * random.standard_normal(10_000))
    assert len(alarms(losses)) <= 1


def test_a_jump_is_found_and_what_follows_is_judged_as_before():
    losses = 1.0 + 0.05 * np.random.default_rng(1).standard_normal(200)
    losses[[80, 120, 121]] = 3.0
    assert alarms(losses) == [80, 120, 121]


def test_a_new_level_is_usual_after_half_a_window():
    losses = np.array([1.0] * 100 + [3.0] * 100)
    assert alarms(losses) == list(range(100, 100 + LAG + WINDOW // 2))


def test_nothing_is_a_spike_before_a_window_is_known():
    assert alarms(np.array([1.0] * (LAG + WINDOW - 1) + [9.0])) == []
    assert alarms(np.array([1.0] * (LAG + WINDOW) + [9.0])) == [LAG + WINDOW]
