"""Binned elements stand in for the elements themselves."""

import numpy as np
import pytest

from kvjax.calibrate.histogram import BINS, bin_moments, bin_points, nearest_level, weighted_error
from kvjax.calibrate.kmeans import weighted_kmeans


def moments_of(x, weights, bins=BINS):
    moments = bin_moments(np.float32(x), np.float32(weights)[None], bins)
    return np.asarray(moments, np.float64)[0]


def test_by_hand():
    # Four bins of width 1/2. 0.1 and 0.3 fall in bin [0, 1/2), -1 in the first and 1 in the last.
    moments = moments_of([0.1, 0.3, -1.0, 1.0], [1.0, 3.0, 2.0, 0.0], bins=4)
    np.testing.assert_array_equal(moments[0], [2, 0, 4, 0])
    points, weights, within = bin_points(moments)
    np.testing.assert_allclose(points, [-1.0, 0.25], atol=1e-6)
    np.testing.assert_array_equal(weights, [2, 4])
    np.testing.assert_allclose(within, 1 * 0.15**2 + 3 * 0.05**2, rtol=1e-5)


@pytest.mark.parametrize("scale, slack", [(0.4, 1e-5), (0.01, 1e-3), (0.001, 0.05)])
def test_levels_are_those_of_the_elements(scale, slack):
    rng = np.random.default_rng(0)
    x = np.clip(rng.laplace(0, scale, 3000), -1, 1).astype(np.float32)
    weights = rng.lognormal(0, 2, x.size).astype(np.float32)
    points, mass, within = bin_points(moments_of(x, weights))
    exact_levels, exact = weighted_kmeans(x, weights, 8)
    levels, between = weighted_kmeans(points, mass, 8)
    # At 0.001 nearly all mass lies within ten bins.
    assert exact * (1 - 1e-6) <= between + within <= exact * (1 + slack)
    assert np.abs(levels - exact_levels).max() < 2 * 2 / BINS


def test_error_of_any_levels():
    rng = np.random.default_rng(1)
    x, weights = rng.uniform(-1, 1, 5000).astype(np.float32), rng.uniform(0, 1, 5000).astype(np.float32)
    levels, decode_levels = np.array([-0.8, -0.1, 0.5]), np.array([-0.7, 0.0, 0.6])
    want = np.sum(weights * (x - decode_levels[nearest_level(x, levels)]) ** 2)
    np.testing.assert_allclose(weighted_error(moments_of(x, weights), levels, decode_levels), want, rtol=1e-3)


def test_ties_go_to_the_lower_level():
    np.testing.assert_array_equal(nearest_level(np.array([-1, 0.0, 0.1, 1]), [-0.5, 0.5]), [0, 0, 1, 1])
