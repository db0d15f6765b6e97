"""The convergence check: under 5 % false alarms on noise over a whole run, and what really falls is seen."""

from __future__ import annotations

import numpy as np
import pytest

from shared.convergence import FALSE_ALARMS, WINDOW, ConvergenceCheck, find_trend

RUNS, TESTS = 1000, 8


def verdicts(losses: np.ndarray) -> list[str]:
    """Return what is said about the rows of a run, a word each."""
    notes: list[str] = []
    check = ConvergenceCheck(notes.append)
    for number, loss in enumerate(losses):
        check.on_step({"step": 10 * (number + 1), "loss": float(loss)})
    return [next(word for word in ("falls", "rises", "is level") if word in note) for note in notes]


@pytest.mark.parametrize("kind", ["normal", "uniform", "lognormal"])
def test_on_noise_fewer_than_five_percent_of_whole_runs_are_told_of_a_trend(kind):
    random = np.random.default_rng(7)
    draw = {
        "normal": random.standard_normal,
        "uniform": random.random,
        "lognormal": lambda n: random.lognormal(0, 0.5, n),
    }
    told = sum(set(verdicts(2 + 0.1 * draw[kind](WINDOW * TESTS))) != {"is level"} for _ in range(RUNS))
    assert told / RUNS < 0.05


def test_every_note_states_the_rate_of_false_alarms():
    notes: list[str] = []
    check = ConvergenceCheck(notes.append)
    for step in range(WINDOW):
        check.on_step({"step": step + 1, "loss": 2.0 + step % 2})
    assert f"at most {FALSE_ALARMS:.0%} are ever told otherwise" in notes[0]


def test_what_falls_and_then_stays_is_said():
    random = np.random.default_rng(0)
    falling = np.concatenate([np.linspace(3, 2, 2 * WINDOW), np.full(2 * WINDOW, 2.0)]) + 0.05 * random.standard_normal(
        4 * WINDOW
    )
    assert verdicts(falling) == ["falls", "falls", "is level", "is level"]
    assert verdicts(falling[2 * WINDOW :: -1])[0] == "rises"


def test_the_interval_is_that_of_least_squares():
    """Oracle: numpy's own fit with its covariance, and the tabulated quantile 2.0423 of 30 degrees of freedom."""
    random = np.random.default_rng(3)
    steps, losses = np.arange(32.0), random.standard_normal(32)
    (slope, _), covariance = np.polyfit(steps, losses, 1, cov=True)
    found = find_trend(steps.tolist(), losses.tolist(), alpha=0.05)
    assert found.slope == pytest.approx(slope)
    assert found.high - found.slope == pytest.approx(2.0423 * np.sqrt(covariance[0, 0]), rel=1e-4)


def test_skipped_updates_have_no_loss_and_are_passed_over():
    check = ConvergenceCheck(lambda text: None)
    check.on_step({"step": 1})
    assert not check.points


def test_noise_that_could_hide_a_fall_is_not_taken_for_convergence():
    notes: list[str] = []
    for spread in (0.001, 1.0):
        check = ConvergenceCheck(notes.append)
        for step in range(WINDOW):
            check.on_step({"step": step + 1, "loss": 2.0 + spread * (step % 2)})
    assert "it may have converged" in notes[0]
    assert "too noisy to tell more" in notes[1]
