"""What is read: thresholds by hand, monotony, signs, budgets, and what the released code's mistakes cost."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvjax.codecs import AlignRule, PlanesCodec
from kvjax.codecs.align import align_addends, align_result, exponent, level_of_dropped, within_budget

CRITERION = AlignRule()
WIDTHS = np.array([0, 8, 12, 16])


def test_exponents():
    x = np.array([1.0, 1.99, 2.0, -0.75, 65504.0, 2.0**-24, 0.0], np.float32)
    np.testing.assert_array_equal(exponent(x), [0, 0, 1, -1, 15, -24, -127])


def test_thresholds_of_the_paper():
    dropped = jnp.arange(-20, 40)
    level = np.asarray(level_of_dropped(CRITERION, dropped))
    wanted = np.where(dropped < 4, 16, np.where(dropped < 8, 12, 8))
    np.testing.assert_array_equal(WIDTHS[level], wanted)
    skipping = np.asarray(level_of_dropped(dataclasses.replace(CRITERION, skip=True), dropped))
    np.testing.assert_array_equal(WIDTHS[skipping], np.where(dropped < 11, wanted, 0))
    assert (np.diff(level) <= 0).all() and (np.diff(skipping) <= 0).all()


def test_addends_by_hand():
    """Products of exponent 0+15, -3+15, 1+10 and 0+2: 0, 3, 4 and 13 below the largest; a zero query needs nothing."""
    q = jnp.asarray([[1.0, 0.2, 2.5, 1.0, 0.0]])
    top = jnp.asarray([[15, 15, 10, 2, 15]], jnp.uint8)
    np.testing.assert_array_equal(WIDTHS[np.asarray(align_addends(CRITERION, q, top))], [[16, 16, 12, 8, 8]])


def test_result_by_hand():
    """Output of exponent -2, values of exponent 0 (biased 15): a token of probability 2^-k drops k - 2 bits."""
    p = jnp.asarray([[0.5, 2.0**-5, 2.0**-6, 2.0**-9, 2.0**-10, 2.0**-30, 0.0]])
    level = align_result(CRITERION, p, jnp.asarray([[0.25, 8.0]]), jnp.asarray([[15, 10]], jnp.uint8))
    np.testing.assert_array_equal(WIDTHS[np.asarray(level)], [[16, 16, 12, 12, 8, 8, 8]])


@given(seed=st.integers(0, 1000))
def test_signs_do_not_matter(seed):
    rng = np.random.default_rng(seed)
    k, q = rng.normal(size=(2, 32, 16)).astype("f4") - 1.0, rng.normal(size=(2, 16)).astype("f4")
    codec = PlanesCodec("tokens", CRITERION)
    levels = [align_addends(CRITERION, q, codec.extent(codec.quantize(sign * k))) for sign in (1.0, -1.0)]
    np.testing.assert_array_equal(*levels)


@given(seed=st.integers(0, 1000), tau=st.sampled_from([2.0**-8, 2.0**-4, 1.0]), skip=st.booleans())
def test_the_worst_case_of_logits_keeps_to_the_budget(seed, tau, skip):
    """Every logit, and the sum of every channel's largest possible error, against float64."""
    rng = np.random.default_rng(seed)
    codec = PlanesCodec("tokens", AlignRule("worst", tau, skip=skip))
    scale = np.exp(rng.normal(0, 2, 64))
    k = (rng.normal(size=(1, 32, 64)) * scale).astype(np.float16).astype("f4")
    q = (rng.standard_t(2, size=(1, 64)) / 8).astype("f4")
    block = codec.quantize(k)
    errors = codec.errors(codec.extent(block))
    weight = jnp.abs(q)
    level = within_budget(codec.read, jnp.float32(tau), weight, weight.sum(-1, keepdims=True), jnp.float32(64), errors)
    assert skip or (level >= 1).all()
    bound = np.choose(np.asarray(level), [*np.asarray(errors, float), np.zeros((1, 64))])
    assert (np.abs(q.astype(float)) * bound).sum() <= tau * (1 + 1e-6)
    faces = [np.zeros(k.shape), *(np.asarray(codec.read_at(block, i), float) for i in (1, 2, 3))]
    read = np.choose(np.asarray(level)[:, None], faces)
    assert np.abs(np.einsum("kh,kth->kt", q.astype(float), read - k)).max() <= tau


@given(seed=st.integers(0, 1000), peak=st.sampled_from([0.0, 2.0, 8.0]), mode=st.sampled_from(["worst", "rms"]))
def test_budgets_of_outputs_hold_for_any_probabilities(seed, peak, mode):
    """Worst case: the sum of p e. rms: the variance of the sum. With probabilities only known from above."""
    rng, tau, n = np.random.default_rng(seed), 2.0**-6, 256
    p = np.exp(peak * rng.normal(size=n))
    p /= p.sum()
    hat = (p * rng.uniform(1, 30, n)).astype("f4")
    errors = [jnp.asarray(s * np.exp(rng.normal(size=n)), jnp.float32) for s in (1.0, 0.1, 0.01)]
    errors = [errors[0], jnp.minimum(errors[1], errors[0]), jnp.minimum(errors[2], errors[1])]
    rule = AlignRule(mode, tau, skip=True)
    level = np.asarray(within_budget(rule, jnp.float32(tau), hat, jnp.float32(1), jnp.float32(n), errors))
    bound = np.choose(level, [*np.asarray(errors, float), np.zeros(n)])
    if mode == "worst":
        assert (p * bound).sum() <= tau * (1 + 1e-6)
    else:
        assert (p * bound)[level == 0].sum() <= tau / 4 * (1 + 1e-6)
        assert ((p * bound)[level > 0] ** 2 / 3).sum() <= (0.75 * tau / 3) ** 2 * (1 + 1e-6)
    assert (within_budget(rule, jnp.float32(2 * tau), hat, jnp.float32(1), jnp.float32(n), errors) <= level).all()


def test_what_is_not_a_number_is_read():
    errors = [jnp.asarray([jnp.inf, 1.0])] * 3
    level = within_budget(
        AlignRule("rms", 1.0, skip=True), jnp.float32(100), jnp.zeros(2), jnp.float32(1), jnp.float32(1), errors
    )
    np.testing.assert_array_equal(level, [3, 0])


@pytest.fixture(scope="module")
def synthetic():
    """A head of 128 channels with unequal scales and means, 1024 tokens, and scores with few heavy tokens."""
    rng = np.random.default_rng(0)
    scale = np.exp(rng.normal(0, 1.2, 128))
    k = (scale * (rng.normal(size=(64, 1024, 128)) * 0.5 + rng.normal(0, 0.25, (64, 1, 128)))).astype(np.float16)
    q = rng.normal(size=(64, 128)).astype(np.float16)
    v = rng.normal(size=(64, 1024, 128)).astype(np.float16)
    p = np.exp(2.5 * rng.normal(size=(64, 1024)))
    return k, q, v, p / p.sum(-1, keepdims=True)


def cut(x, width):
    """float16 with its lowest bits replaced by 1000..., width 8, 12, 13 or 16, per element."""
    dropped = 16 - np.asarray(width)
    mask = (1 << dropped) - 1
    bits = x.view(np.uint16) & ~mask | np.where(dropped > 0, 1 << np.maximum(dropped - 1, 0), 0)
    return bits.astype(np.uint16).view(np.float16).astype(float)


def share_wrong(wanted, got):
    """Outputs wrong by 2^-7 or more."""
    return (np.abs(got - wanted) >= 2.0**-7 * np.abs(wanted)).mean()


def test_released_criteria_err_where_the_right_ones_do_not(synthetic):
    """Keys: maxima of magnitudes beat signed ones and 13 bits for all; values: thresholds of 4 and 8 beat 1 and 2."""
    k, q, v, p = synthetic
    logits = np.einsum("bh,bth->bt", q.astype(float), k.astype(float))
    wrong, bits = {}, {}
    for name, top in (("abs", np.abs(k).max(1)), ("signed", np.maximum(k.max(1), 2.0**-14))):
        top = (top.astype(np.float16).view(np.uint16) >> 10 & 31).astype(np.uint8)
        width = WIDTHS[np.asarray(align_addends(CRITERION, q.astype("f4"), top))]
        bits[name] = width.mean()
        wrong[name] = share_wrong(logits, np.einsum("bh,bth->bt", q.astype(float), cut(k, width[:, None])))
    wrong["uniform"] = share_wrong(logits, np.einsum("bh,bth->bt", q.astype(float), cut(k, 13)))
    assert wrong["abs"] < wrong["signed"] < wrong["uniform"]
    assert bits["abs"] < 13.5

    outputs = np.einsum("bt,bth->bh", p, v.astype(float))
    best = np.argmax(p.reshape(64, 32, 32), 1) * 32 + np.arange(32)
    rows = np.arange(64)[:, None]
    estimate = np.einsum("br,brh->bh", p[rows, best], np.abs(cut(v, 8))[rows, best]).astype("f4")
    top = (np.abs(v).max(1).view(np.uint16) >> 10 & 31).astype(np.uint8)
    width = WIDTHS[np.asarray(align_result(CRITERION, p.astype("f4"), estimate, top))]
    base = (np.asarray(exponent(estimate)) + 15 - top).min(-1, keepdims=True)
    early = base - np.asarray(exponent(p.astype("f4")))
    hasty = np.where(early < 1, 16, np.where(early < 2, 12, 8))
    right, released = (share_wrong(outputs, np.einsum("bt,bth->bh", p, cut(v, w[..., None]))) for w in (width, hasty))
    assert right < released / 2 and hasty.mean() < width.mean() < 13
