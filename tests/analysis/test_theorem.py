"""AsymKV's theorem and the variance law, in float64."""

import numpy as np
import pytest

from kvjax.analysis import theorem


@pytest.fixture(scope="module")
def case():
    """Two heads, 40 tokens, 16 channels; errors large enough that exp is far from linear."""
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(2, 16)) * 2, rng.normal(size=(2, 40, 16)), rng.normal(size=(2, 40, 16))
    return q, k, v, rng.normal(size=k.shape) * 0.3


def outputs(q, k, v):
    s = np.einsum("bh,bth->bt", q, k) / 4.0
    a = np.exp(s - s.max(-1, keepdims=True))
    a /= a.sum(-1, keepdims=True)
    return a, np.einsum("bt,bth->bh", a, v)


def test_theorem_1_has_a_minus(case):
    q, k, v, error = case
    a, o = outputs(q, k, v)
    _, stored = outputs(q, k - error, v)
    weights, e = theorem.attention_weights(q, k), theorem.logit_error(q, error)
    np.testing.assert_allclose(weights, a, atol=1e-15)
    np.testing.assert_allclose(theorem.error_from_keys(weights, e, v), o - stored, atol=1e-12)
    printed = theorem.error_from_keys(weights, e, v, sign=1)
    assert np.abs(printed - (o - stored)).max() > 0.1


def test_sum_ratio(case):
    q, k, _, error = case
    s, stored = (np.einsum("bh,bth->bt", q, x) / 4.0 for x in (k, k - error))
    expected = np.exp(s).sum(-1) / np.exp(stored).sum(-1)
    weights, e = theorem.attention_weights(q, k), theorem.logit_error(q, error)
    np.testing.assert_allclose(theorem.sum_ratio(weights, e), expected, rtol=1e-12)


def test_an_error_that_all_tokens_share_is_free(case):
    q, k, v, error = case
    shared = np.broadcast_to(error[:, :1], k.shape)
    weights = theorem.attention_weights(q, k)
    e = theorem.logit_error(q, shared)
    assert np.abs(e).max() > 0.1
    np.testing.assert_allclose(theorem.error_from_keys(weights, e, v), 0, atol=1e-14)
    np.testing.assert_allclose(theorem.error_from_keys_first_order(weights, e, v), 0, atol=1e-14)
    both, e_both = theorem.error_from_keys(weights, e + theorem.logit_error(q, error), v), theorem.logit_error(q, error)
    np.testing.assert_allclose(both, theorem.error_from_keys(weights, e_both, v), atol=1e-14)


def test_first_order_and_values(case):
    q, k, v, error = case
    weights = theorem.attention_weights(q, k)
    for scale in (1e-3, 1e-4):
        e = theorem.logit_error(q, error * scale)
        exact, linear = theorem.error_from_keys(weights, e, v), theorem.error_from_keys_first_order(weights, e, v)
        assert np.abs(exact - linear).max() < 2 * scale**2 * np.abs(v).max()
    _, o = outputs(q, k, v)
    _, stored = outputs(q, k, v - error)
    np.testing.assert_allclose(theorem.error_from_values(weights, error), o - stored, atol=1e-14)


def test_hidden_tokens_have_no_weight(case):
    q, k, _, _ = case
    visible = np.arange(40) < 25
    weights = theorem.attention_weights(q, k, visible)
    np.testing.assert_allclose(weights[:, :25], theorem.attention_weights(q, k[:, :25]), atol=1e-15)
    assert (weights[:, 25:] == 0).all()


def test_variance_law_by_monte_carlo(case):
    """Errors small enough for the first order, of unequal variance by channel."""
    q, k, v, _ = case
    rng = np.random.default_rng(1)
    k_std, v_std = np.exp(rng.normal(size=(2, 16))) * 0.01, np.exp(rng.normal(size=(2, 16))) * 0.01
    weights = theorem.attention_weights(q, k)
    noise = rng.normal(size=(20000, *k.shape))
    e = theorem.logit_error(q, noise * k_std[:, None])
    from_keys = theorem.error_from_keys(weights, e, v).var(0)
    law = theorem.variance_from_keys(q, weights, v, k_std**2)
    np.testing.assert_allclose(from_keys, law, rtol=0.05)
    from_values = theorem.error_from_values(weights, noise * v_std[:, None]).var(0)
    np.testing.assert_allclose(from_values, theorem.variance_from_values(weights, v_std**2), rtol=0.05)
    ratio = theorem.sensitivity_ratio(q, weights, v, k_std**2, v_std**2)
    np.testing.assert_allclose(ratio, from_keys.sum(-1) / from_values.sum(-1), rtol=0.05)
