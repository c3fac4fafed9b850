"""The affine codec: worked vectors, error bounds, degenerate groups, and which levels are better."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kvjax.codecs import AffineCodec
from kvjax.codecs.affine import ETA

# One group of eight, worked by hand (specification of KIVI's quantizer): scale = range / (2^b - 1), zero = minimum.
VECTOR = np.array([-1, -0.5, 0, 0.25, 0.9, 1, 2, 3], np.float32)


def by_token(codec, group):
    """Quantizes one group as 1 head, 1 token."""
    block = codec.quantize(group.reshape(1, 1, -1))
    return np.asarray(block.codes).ravel().tolist(), float(block.scale.ravel()[0]), float(block.zero.ravel()[0])


@pytest.mark.parametrize(
    ("bits", "codes", "scale"),
    [
        (1, [0, 0, 0, 0, 0, 0, 1, 1], 4.0),
        (2, [0, 0, 1, 1, 1, 2, 2, 3], 4 / 3),
        (4, [0, 2, 4, 5, 7, 8, 11, 15], 4 / 15),
    ],
)
def test_minmax_by_hand(bits, codes, scale):
    got, got_scale, zero = by_token(AffineCodec(bits, group=8), VECTOR)
    assert zero == -1.0
    assert got_scale == float(np.float16(scale))
    # (1 - -1) / (4/3) = 1.5 is a tie in exact arithmetic; the scale as stored decides it (float16 4/3 is low).
    assert got == codes


def test_the_midpoint_of_one_bit_goes_to_the_minimum():
    codes, scale, zero = by_token(AffineCodec(1, group=8), np.array([0, 1, 0.5, 0.5, 0, 1, 0.25, 0.75], np.float32))
    assert (codes, scale, zero) == ([0, 1, 0, 0, 0, 1, 0, 1], 1.0, 0.0)


def test_two_mean_by_hand():
    codec = AffineCodec(1, group=8, levels="two_mean")
    codes, scale, zero = by_token(codec, VECTOR)  # mean 0.70625, levels -0.3125 and 1.725
    assert codes == [0, 0, 0, 0, 1, 1, 1, 1]
    assert zero == -0.3125
    np.testing.assert_allclose(zero + scale, 1.725, rtol=1e-3)
    np.testing.assert_allclose(np.asarray(codec.roundtrip(VECTOR.reshape(1, 1, 8))).mean(), 0.70625, atol=1e-3)


groups = hnp.arrays(np.float32, (1, 32, 32), elements=st.floats(-1000, 1000, width=32))


@pytest.mark.parametrize("along", ["tokens", "channels"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@given(x=groups)
def test_the_error_is_half_a_step(along, bits, x):
    """|x - decode| <= scale / 2, and what rounding scale and zero to float16 adds: (2^b - 1) ulps of the scale."""
    codec = AffineCodec(bits, group=32, along=along)
    axis = 1 if along == "tokens" else 2
    error = np.abs(np.asarray(codec.roundtrip(x)) - x).max(axis)
    low, high = x.min(axis), x.max(axis)
    step = (high - low) / (2**bits - 1)
    assert (error <= 0.5 * step + 2.0**-10 * (np.abs(low) + high - low) + 1e-4).all()


@pytest.mark.parametrize("levels", ["minmax", "eta", "two_mean"])
def test_groups_without_spread_come_back_exactly(levels):
    bits = 1 if levels == "two_mean" else 2
    values = jnp.asarray([0.0, 1.5, -3.0, 65504.0, 2.0**-24, -0.0078125], jnp.float32)
    for codec in (
        AffineCodec(bits, 32, "channels", levels),
        AffineCodec(bits, 32, "tokens", levels),
        AffineCodec(bits, None, "channels", levels),
    ):
        for value in values:
            x = jnp.full((2, 32, 32), value)
            assert (codec.roundtrip(x) == value).all()
            assert (codec.quantize(x).codes == 0).all()


def test_second_level_metadata_costs_less_and_stays_close():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 128, 64)).astype(np.float32)
    for along in ("tokens", "channels"):
        plain, second = (AffineCodec(4, 32, along, meta=meta) for meta in ("float16", "int8"))
        assert second.bits_per_element(128, 8, 128) < plain.bits_per_element(128, 8, 128) - 0.4
        errors = [np.square(np.asarray(codec.roundtrip(x)) - x).mean() for codec in (plain, second)]
        assert errors[1] < 1.1 * errors[0]


def test_one_bit_blocks_hold_two_values_per_group():
    x = np.random.default_rng(0).normal(size=(1, 64, 8)).astype(np.float32)
    for levels in ("minmax", "eta", "two_mean"):
        y = np.asarray(AffineCodec(1, 32, "tokens", levels).roundtrip(x)).reshape(2, 32, 8)
        assert {len(np.unique(y[g, :, c])) for g in range(2) for c in range(8)} == {2}


def test_two_means_beat_eta_beats_the_mean_beats_the_extremes():
    x = np.random.default_rng(0).normal(size=(1, 256, 256)).astype(np.float32)

    def error(levels):
        return np.square(np.asarray(AffineCodec(1, 32, levels=levels).roundtrip(x)) - x).mean()

    mean = x.reshape(-1, 32).mean(1, keepdims=True)
    mean_only = np.square(x.reshape(-1, 32) - mean).mean()
    assert error("two_mean") < error("eta") < mean_only < error("minmax")
    np.testing.assert_allclose(
        [error("two_mean"), error("eta"), mean_only, error("minmax")], [0.334, 0.365, 0.970, 1.963], rtol=0.02
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_eta_is_no_worse_than_the_extremes(bits):
    x = np.random.default_rng(0).normal(size=(1, 256, 256)).astype(np.float32)
    for group in (32, 64, 128):
        errors = [
            np.square(np.asarray(AffineCodec(bits, group, levels=levels).roundtrip(x)) - x).mean()
            for levels in ("eta", "minmax")
        ]
        assert errors[0] < errors[1]
    assert list(ETA) == [1, 2, 3, 4, 8]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 5}, "`bits=5` cannot be packed"),
        ({"group": None, "along": "tokens"}, "`group=None`"),
        ({"levels": "two_mean", "bits": 2}, "`bits=1`"),
    ],
)
def test_settings_that_make_no_codec(settings, message):
    with pytest.raises(ValueError, match=message):
        AffineCodec(**settings)


def test_a_group_that_does_not_divide_is_told():
    with pytest.raises(ValueError, match="`group=48` must divide T=128; use a divisor such as 128"):
        AffineCodec(4, 48, "tokens").quantize(np.zeros((1, 128, 64), np.float32))
