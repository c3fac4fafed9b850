"""Fixed-point angles against Python's integers and fractions, which have no rounding to share with them."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from kvjax.model import turns

FREQUENCIES = 10000.0 ** -(np.arange(0, 128, 2) / 128)  # radians per position, of LLaMA
positions = st.integers(-(2**31), 2**31 - 1)
phase, cos_sin = jax.jit(turns.phase), jax.jit(turns.cos_sin)


def wrapped(count):
    """An integer as int32 keeps it."""
    return (count + 2**31) % 2**32 - 2**31


def test_a_quarter_turn_per_position_by_hand():
    quarter = turns.from_frequencies(np.asarray([math.pi / 2]))
    assert quarter.high.dtype == quarter.low.dtype == np.int32 and quarter == ([2**30], [0])
    angles = phase(quarter, jnp.asarray([0, 1, 2, 3, 4, -1]))
    assert angles[:, 0].tolist() == [0, 2**30, -(2**31), -(2**30), 0, -(2**30)]
    cos, sin = cos_sin(angles[:, 0])
    assert cos.tolist() == [1, 0, -1, 0, 1, 0] and sin.tolist() == [0, 1, 0, -1, 0, -1]


@given(position=positions, counts=st.lists(st.integers(0, 2**48 - 1), min_size=4, max_size=4))
@example(position=-(2**31), counts=[2**48 - 1, 2**47, 2**16 - 1, 1])
@example(position=2**31 - 1, counts=[2**48 - 1, 2**47, 2**16 - 1, 1])
@example(position=-1, counts=[2**48 - 1, 2**47, 2**16 - 1, 1])
@example(position=0xFFFF, counts=[2**48 - 1, 2**47, 2**16 - 1, 1])
def test_phase_is_the_product_of_integers_rounded_down(position, counts):
    words = turns.Turns(*np.asarray([[wrapped(c >> 16) for c in counts], [c & 0xFFFF for c in counts]], np.int32))
    got = phase(words, jnp.asarray([position], jnp.int32))
    assert got.dtype == jnp.int32 and got.shape == (1, 4)
    assert got[0].tolist() == [wrapped(position * c >> 16) for c in counts]


def test_frequencies_are_rounded_to_48_bits_and_come_back():
    words = turns.from_frequencies(FREQUENCIES)
    for high, low, frequency in zip(words.high.tolist(), words.low.tolist(), FREQUENCIES.tolist()):
        assert 0 <= low < 2**16
        assert abs((high << 16) + low - frequency / (2 * math.pi) * 2**48) < 0.6
    np.testing.assert_allclose(turns.to_frequencies(words), FREQUENCIES, rtol=0, atol=2.0**-48 * math.pi)
    beyond = turns.from_frequencies(np.asarray([4.0, 7.0]))  # more than half a turn, and more than a turn
    np.testing.assert_allclose(turns.to_frequencies(beyond), [4.0, 7.0 - 2 * math.pi], atol=1e-13)


def test_cos_and_sin_all_around():
    ends = [q * 2**29 + d for q in range(-4, 4) for d in (-1, 0, 1)]  # where quadrants and their signs change
    angles = np.asarray([*range(-(2**31), 2**31, 104729), *map(wrapped, ends), 2**31 - 1], np.int32)
    exact = angles * (2 * math.pi / 2**32)
    cos, sin = cos_sin(angles)
    assert cos.dtype == sin.dtype == jnp.float32
    np.testing.assert_allclose(cos, np.cos(exact), rtol=0, atol=1.5e-7)
    np.testing.assert_allclose(sin, np.sin(exact), rtol=0, atol=1.5e-7)


# 2 pi to 47 digits, so that 2^31 turns leave 37 of the last one.
TWO_PI = Fraction("6.28318530717958647692528676655900576839433879875")


@given(position=positions)
@example(position=0)
@example(position=1)
@example(position=2**24 + 1)
@example(position=10**7)
@example(position=10**7 - 1)
@example(position=10**7 - 77777)
@example(position=-(10**7) + 1)
@example(position=2**31 - 1)
@example(position=-(2**31))
def test_angles_of_any_position(position):
    """What the module's docstring says: 1.1e-7 rad at 10^7, 2.4e-5 rad at 2^31, besides float32's own rounding."""
    cos, sin = cos_sin(phase(turns.from_frequencies(FREQUENCIES), jnp.asarray(position, jnp.int32)))
    exact = [Fraction(f) * position / TWO_PI for f in FREQUENCIES.tolist()]
    exact = np.asarray([float((turn - round(turn)) * TWO_PI) for turn in exact])
    error = np.arctan2(np.asarray(sin, np.float64), np.asarray(cos, np.float64)) - exact
    error = np.abs((error + math.pi) % (2 * math.pi) - math.pi)
    assert error.max() < 1.5e-7 + abs(position) * 2**-49 * 2 * math.pi
