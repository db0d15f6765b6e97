"""The exponents that the scaling benchmark prints are those of least squares."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.common import fit_power

SIZES = [128, 256, 512, 1024, 4096]


@pytest.mark.parametrize(("exponent", "factor"), [(1.0, 3.0), (2.0, 0.25), (0.0, 7.0), (-0.5, 100.0)])
def test_a_power_law_is_found_again(exponent, factor):
    found = fit_power(SIZES, [factor * size**exponent for size in SIZES])
    assert found.exponent == pytest.approx(exponent, abs=1e-9)
    assert found.factor == pytest.approx(factor)
    assert found.standard_error == pytest.approx(0.0, abs=1e-6)


def test_exponent_and_standard_error_are_those_of_numpy_polyfit():
    noise = np.exp(np.random.default_rng(0).normal(0, 0.2, len(SIZES)))
    costs = [3 * size**1.3 * n for size, n in zip(SIZES, noise, strict=True)]
    (slope, _), covariance = np.polyfit(np.log(SIZES), np.log(costs), 1, cov=True)
    found = fit_power(SIZES, costs)
    assert found.exponent == pytest.approx(slope, abs=1e-8)
    assert found.standard_error == pytest.approx(covariance[0, 0] ** 0.5, abs=1e-8)


def test_the_true_exponent_is_within_two_standard_errors_about_95_times_in_100():
    random, hits = np.random.default_rng(1), 0
    sizes = [2.0**n for n in range(30)]  # many points, so that Student's t is nearly normal
    for _ in range(400):
        found = fit_power(sizes, [size**0.7 * np.exp(random.normal(0, 0.3)) for size in sizes])
        assert found.standard_error is not None
        hits += abs(found.exponent - 0.7) < 2 * found.standard_error
    assert 0.91 < hits / 400 < 0.99


def test_two_points_have_an_exponent_and_no_standard_error():
    found = fit_power([1, 10], [5, 500])
    assert (found.exponent, found.standard_error) == (pytest.approx(2.0), None)


@pytest.mark.parametrize(("x", "y"), [([1], [1]), ([2, 2], [1, 3]), ([1, 2], [0, 1]), ([1, 2], [-1, 1])])
def test_what_has_no_power_law_is_refused(x, y):
    with pytest.raises(ValueError, match="no power law"):
        fit_power(x, y)
