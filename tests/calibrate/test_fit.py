"""Tables from statistics: the paper's objective, its baselines and Q-Norm, on synthetic keys."""

import numpy as np
import pytest

from kvjax.calibrate.fit import Stats, TensorStats, fit_tables, sensitivity_error
from kvjax.calibrate.histogram import bin_moments, nearest_level
from kvjax.calibrate.kmeans import weighted_kmeans
from kvjax.codecs.tables import nf_levels, uniform_levels

LAYERS, TOKENS, HEADS, CHANNELS = 2, 512, 2, 32


@pytest.fixture(scope="module")
def synthetic():
    """Keys with log-normal channel scales, half Gaussian and half Laplace channels, and random gradients."""
    rng = np.random.default_rng(0)
    shape = (LAYERS, HEADS, TOKENS, CHANNELS)
    x = np.where(np.arange(CHANNELS) % 2, rng.normal(size=shape), rng.laplace(size=shape))
    per_channel = (LAYERS, HEADS, 1, CHANNELS)
    x = x * rng.lognormal(0, 1.5, per_channel) + rng.normal(size=per_channel)
    grad = rng.normal(size=shape) * rng.lognormal(0, 0.5, (LAYERS, HEADS, TOKENS, 1))
    low, high = x.min(2, keepdims=True), x.max(2, keepdims=True)
    scale, zero = (high - low) / 2, (high + low) / 2
    normalized = (x - zero) / scale
    weightings = np.stack([np.ones(shape), grad**2, (grad * scale) ** 2], 1)
    moments = [
        bin_moments(n.reshape(-1).astype(np.float32), w.reshape(3, -1).astype(np.float32))
        for n, w in zip(normalized, weightings)
    ]
    none = np.zeros(LAYERS, np.int64)
    tensor = TensorStats(np.array(moments, np.float64), none, none, TOKENS * HEADS * CHANNELS)
    stats = Stats(tensor, tensor, np.float32(scale), np.float32(zero), 0.0, 0, 1, TOKENS, True)
    return stats, normalized, grad * scale


def objective(levels, normalized, grad_times_scale):
    """Eq. 1 of arXiv 2401.18079 per layer, from the elements themselves."""
    errors = [n - layer[nearest_level(n, layer)] for n, layer in zip(normalized, levels)]
    return np.array([np.sum((g * e) ** 2) for g, e in zip(grad_times_scale, errors)])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_papers_weights_minimise_the_papers_objective(synthetic, bits):
    stats, *elements = synthetic
    error = {
        name: objective(fit_tables(stats, bits, name)["keys"]["levels"].astype(float), *elements)
        for name in ("fisher*s2", "fisher", "none", "uniform", "nf")
    }
    for name, other in error.items():
        if name != "fisher*s2":
            assert (error["fisher*s2"] < other * 0.99).all(), name
    optimum = [weighted_kmeans(n.reshape(-1), g.reshape(-1) ** 2, 2**bits)[1] for n, g in zip(*elements, strict=True)]
    np.testing.assert_allclose(error["fisher*s2"], optimum, rtol=1e-4)


def test_the_reported_error_is_the_objective(synthetic):
    stats, *elements = synthetic
    keys = fit_tables(stats, 3)["keys"]
    want = objective(keys["levels"].astype(float), *elements)
    np.testing.assert_allclose(sensitivity_error(stats.keys, keys["levels"]), want, rtol=1e-3)


def test_shapes_and_fixed_tables(synthetic):
    stats, *_ = synthetic
    tables = fit_tables(stats, 3, "nf")
    assert tables["keys"].keys() == {"levels", "decode_levels", "scale", "zero"}
    assert tables["values"].keys() == {"levels", "decode_levels"}
    np.testing.assert_array_equal(tables["values"]["levels"], np.float32([nf_levels(3)] * LAYERS))
    uniform = fit_tables(stats, 4, "uniform")["keys"]["levels"]
    np.testing.assert_array_equal(uniform[1], np.float32(uniform_levels(4)))
    for array in [*tables["keys"].values(), *tables["values"].values()]:
        assert array.dtype == np.float32 and len(array) == LAYERS
    with pytest.raises(ValueError, match=r"weights='hessian'.*fisher\*s2"):
        fit_tables(stats, 3, "hessian")


@pytest.mark.parametrize("weights", ["fisher*s2", "none", "uniform"])
def test_qnorm_restores_mean_and_spread(synthetic, weights):
    stats, normalized, _ = synthetic
    keys = fit_tables(stats, 2, weights, qnorm=True)["keys"]
    np.testing.assert_array_equal(keys["levels"], fit_tables(stats, 2, weights)["keys"]["levels"])
    for n, levels, decode_levels in zip(normalized, keys["levels"], keys["decode_levels"]):
        rounded = decode_levels[nearest_level(n, levels)]
        # Up to the few elements of bins that a decision boundary cuts.
        np.testing.assert_allclose(rounded.mean(), n.mean(), atol=1e-3)
        np.testing.assert_allclose(rounded.std(), n.std(), rtol=1e-3)


def test_a_layer_without_sensitivity_gets_uniform_levels(synthetic):
    stats, *_ = synthetic
    silent = TensorStats(np.zeros_like(stats.keys.moments), *list(vars(stats.keys).values())[1:])
    tables = fit_tables(Stats(silent, silent, *list(vars(stats).values())[2:]), 2, qnorm=True)
    np.testing.assert_array_equal(tables["values"]["decode_levels"][0], np.float32(uniform_levels(2)))
