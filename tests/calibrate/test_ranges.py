"""Streaming ranges against numpy.quantile over all values."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.calibrate.ranges import init_tails, merge_tails, range_of

merge = jax.jit(merge_tails)


def stream(x, chunks, fraction):
    """`x` [..., N, C] fed in pieces of `chunks` tokens."""
    tails = init_tails((*x.shape[:-2], x.shape[-1]), x.shape[-2], fraction)
    for piece in np.split(x, np.cumsum(chunks)[:-1], axis=-2):
        tails = merge(tails, piece)
    return tails


@pytest.mark.parametrize("fraction", [0.0, 0.003, 0.01, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("chunks", [[400], [100] * 4, [1, 99, 300]])
@pytest.mark.parametrize("ties", [False, True])
def test_equals_numpy_quantile(fraction, chunks, ties):
    x = np.random.default_rng(0).standard_t(3, (2, 400, 5)).astype(np.float32)
    x = np.round(x * 2) / 2 if ties else x
    lower, upper = range_of(stream(x, chunks, fraction), fraction)
    x = x.astype(np.float64)
    np.testing.assert_array_equal(lower, np.quantile(x, fraction / 2, axis=-2))
    np.testing.assert_array_equal(upper, np.quantile(x, 1 - fraction / 2, axis=-2))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.sampled_from([1, 2, 3, 7, 20]), st.floats(0, 0.99), st.floats(0, 0.99))
def test_any_count_and_any_smaller_fraction(tokens, fraction, other):
    fraction, other = sorted([fraction, other])
    x = np.random.default_rng(1).normal(size=(tokens, 2)).astype(np.float32)
    lower, upper = range_of(stream(x, [tokens], other), fraction)
    x = x.astype(np.float64)
    np.testing.assert_allclose(lower, np.quantile(x, fraction / 2, axis=0), rtol=1e-12)
    np.testing.assert_allclose(upper, np.quantile(x, 1 - fraction / 2, axis=0), rtol=1e-12)


def test_memory_is_bounded_by_the_fraction():
    tails = init_tails((3, 8), 32768, 0.01)
    assert tails.largest.shape == (3, 8, 166)  # 0.005 * 32767 = 163.8


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"outlier_fraction=1\.5"):
        init_tails((4,), 10, 1.5)
    with pytest.raises(ValueError, match="at least one calibration token"):
        init_tails((4,), 0, 0.01)
    with pytest.raises(ValueError, match="larger than the one"):
        range_of(stream(np.zeros((100, 1), np.float32), [100], 0.01), 0.5)
