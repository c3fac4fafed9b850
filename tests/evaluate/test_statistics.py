"""Per-token statistics against float64, from divergences of 1e-9 to distributions that share nothing."""

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.evaluate.statistics import Totals, token_statistics


def in_float64(reference, logits, targets):
    """The definitions: `[3, ...]`."""

    def log_softmax(x):
        x = np.asarray(x, np.float64)
        x = x - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    log_p, log_q = log_softmax(reference), log_softmax(logits)
    nll = -np.take_along_axis(log_q, np.asarray(targets)[..., None], -1)[..., 0]
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    return np.stack([nll, kl, np.argmax(reference, -1) == np.argmax(logits, -1)])


@pytest.mark.parametrize("noise", [1e-4, 1e-3, 0.1, 1.0, 30.0])
def test_statistics_against_float64(noise):
    rng = np.random.default_rng(0)
    reference = rng.normal(0, 4, (3, 5, 500)).astype(np.float32)
    logits = (reference + 7 + noise * rng.normal(size=reference.shape)).astype(np.float32)
    targets = rng.integers(0, 500, (3, 5))
    got = np.asarray(token_statistics(jnp.asarray(reference), jnp.asarray(logits), jnp.asarray(targets)))
    expected = in_float64(reference, logits, targets)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5, atol=1e-5)
    # The plain formula in float32 would be off by 100 % at the smallest noise.
    np.testing.assert_allclose(got[1], expected[1], rtol=3e-3 if noise < 1e-3 else 1e-4)
    np.testing.assert_array_equal(got[2], expected[2])


def test_equal_logits_do_not_diverge():
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 4, (4, 100)), jnp.float32)
    statistics = np.asarray(token_statistics(logits, logits, jnp.zeros(4, jnp.int32)))
    np.testing.assert_array_equal(statistics[1], 0.0)
    np.testing.assert_array_equal(statistics[2], 1.0)


def test_mass_where_the_reference_has_none():
    """p = (1, 0), q = (1/2, 1/2): KL = log 2, though exp(-x') overflows for the second token."""
    statistics = np.asarray(token_statistics(jnp.asarray([200.0, 0.0]), jnp.asarray([0.0, 0.0]), jnp.asarray(0)))
    np.testing.assert_allclose(statistics, [np.log(2), np.log(2), 1.0], rtol=1e-6)


def test_totals_do_not_depend_on_the_batching():
    statistics = np.random.default_rng(0).random((3, 7, 11)).astype(np.float32)
    whole, parts = Totals(), Totals()
    whole.add(statistics)
    for start in range(0, 7, 3):
        parts.add(statistics[:, start : start + 3])
    assert (whole.sums == parts.sums).all()
    assert whole.tokens == parts.tokens == 77
    np.testing.assert_allclose(whole.nll, statistics[0].astype(np.float64).mean(), rtol=1e-12)
    assert whole.perplexity == np.exp(whole.nll)
