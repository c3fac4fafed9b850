"""Exact k-means against every partition, against Lloyd's iterations, and by hand."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.calibrate.kmeans import weighted_kmeans


def cost_of(levels, points, weights):
    return float(np.sum(weights * ((points[:, None] - np.asarray(levels)[None]) ** 2).min(1)))


def brute_force(points, weights, clusters):
    order = np.argsort(points)
    points, weights = points[order], weights[order]
    best = np.inf
    for cuts in itertools.combinations(range(1, len(points)), clusters - 1):
        edges = [0, *cuts, len(points)]
        runs = [slice(i, j) for i, j in itertools.pairwise(edges)]
        means = [np.average(points[r], weights=weights[r]) for r in runs]
        best = min(best, sum(np.sum(weights[r] * (points[r] - m) ** 2) for r, m in zip(runs, means)))
    return best


def lloyd(points, weights, clusters, iterations=200):
    levels = np.quantile(points, (np.arange(clusters) + 0.5) / clusters)
    for _ in range(iterations):
        nearest = np.abs(points[:, None] - levels[None]).argmin(1)
        for c in range(clusters):
            if weights[nearest == c].sum():
                levels[c] = np.average(points[nearest == c], weights=weights[nearest == c])
    return cost_of(levels, points, weights)


def test_by_hand():
    # {0, 0.1} and {0.8, 1}, weights 1, 1 and 3, 1: means 0.05 and 0.85, cost 2 * 0.05² + 3 * 0.05² + 0.15².
    levels, cost = weighted_kmeans([1.0, 0.0, 0.8, 0.1], [1, 1, 3, 1], 2)
    np.testing.assert_allclose(levels, [0.05, 0.85])
    np.testing.assert_allclose(cost, 0.035)


weighted_points = st.lists(
    st.tuples(st.integers(-20, 20), st.sampled_from([1e-3, 0.1, 1.0, 2.0, 1e3])), min_size=1, max_size=9
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(weighted_points, st.integers(1, 5))
def test_equals_every_partition(pairs, clusters):
    points = np.array([p / 20 for p, _ in pairs])
    weights = np.array([w for _, w in pairs])
    levels, cost = weighted_kmeans(points, weights, clusters)
    assert levels.shape == (clusters,) and (np.diff(levels) > 0).all()
    assert levels[0] >= -1 and levels[-1] <= 1
    want = 0.0 if len(set(points)) <= clusters else brute_force(points, weights, clusters)
    np.testing.assert_allclose(cost, want, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(cost_of(levels, points, weights), cost, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("clusters", [4, 8, 16])
@pytest.mark.parametrize("seed", [0, 1])
def test_never_worse_than_lloyd(clusters, seed):
    rng = np.random.default_rng(seed)
    points = np.clip(rng.laplace(size=600) / 4, -1, 1)
    weights = rng.lognormal(0, 2, 600)
    assert weighted_kmeans(points, weights, clusters)[1] <= lloyd(points, weights, clusters) * (1 + 1e-12)


@pytest.mark.parametrize("factor", [1e-300, 1e-12, 3.0, 1e290])
def test_a_common_factor_of_the_weights_changes_nothing(factor):
    rng = np.random.default_rng(2)
    points, weights = rng.uniform(-1, 1, 300), rng.lognormal(0, 1, 300)
    levels, cost = weighted_kmeans(points, weights, 8)
    scaled_levels, scaled_cost = weighted_kmeans(points, weights * factor, 8)
    np.testing.assert_allclose(scaled_levels, levels, rtol=1e-9)
    np.testing.assert_allclose(scaled_cost, cost * factor, rtol=1e-9)


def test_spare_levels_fill_the_widest_gaps():
    np.testing.assert_array_equal(weighted_kmeans([0.5], [1.0], 4)[0], [-0.625, -0.25, 0.125, 0.5])
    np.testing.assert_array_equal(weighted_kmeans([], [], 2)[0], [-1, 1])
    # A point of weight 0 is no point.
    np.testing.assert_array_equal(weighted_kmeans([0.5, 0.1], [1.0, 0.0], 1)[0], [0.5])


def test_heavy_points_do_not_hide_light_ones():
    # One point carries 1e9 times the weight of the others, which still get the levels they need.
    points = np.array([-0.9, -0.5, -0.45, 0.3, 0.35, 0.8])
    weights = np.array([1e9, 1, 1, 1, 1, 1])
    np.testing.assert_allclose(weighted_kmeans(points, weights, 4)[0], [-0.9, -0.475, 0.325, 0.8])


def test_points_of_hardly_any_weight_are_harmless():
    rng = np.random.default_rng(4)
    points, weights = rng.uniform(-1, 1, 200), 10.0 ** rng.uniform(-40, 0, 200)
    levels, cost = weighted_kmeans(points, weights, 8)
    assert np.isfinite(levels).all() and np.isfinite(cost)
    assert cost <= lloyd(points, weights, 8) * (1 + 1e-9)


@pytest.mark.parametrize("points, weights", [([0.0], [1.0, 2.0]), ([np.nan], [1.0]), ([0.0], [-1.0])])
def test_bad_input_is_refused(points, weights):
    with pytest.raises(ValueError, match="must be"):
        weighted_kmeans(points, weights, 2)


def test_sixteen_levels_of_4096_bins_take_well_below_a_second():
    rng = np.random.default_rng(3)
    points = np.sort(rng.uniform(-1, 1, 4096))
    start = time.perf_counter()
    weighted_kmeans(points, rng.lognormal(0, 2, 4096), 16)
    assert time.perf_counter() - start < 1.0
