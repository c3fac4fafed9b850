"""float8 with a scale per token, and rotation in front of any codec."""

import ml_dtypes
import numpy as np
import pytest
from cases import random_kv

from kvjax.codecs import AffineCodec, Float8Codec, NUQTokenCodec, RotatedCodec
from kvjax.codecs.rotated import hadamard


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_float8_rounds_as_numpy_does_and_never_saturates(name):
    x = random_kv(np.random.default_rng(0), 2, 32, 16)
    codec = Float8Codec(name)
    block = codec.quantize(x)
    largest = np.abs(x).max((0, 2))
    scale = np.asarray(block.scale)[0, 0].astype(np.float32)
    np.testing.assert_array_equal(scale, (largest / np.float32(448)).astype(np.float16))
    kind = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}[name]
    wanted = np.clip(x / scale[:, None], -448, 448).astype(kind)
    np.testing.assert_array_equal(np.asarray(block.values).view(np.uint8), wanted.view(np.uint8))
    bits_of_mantissa = {"e4m3": 3, "e5m2": 2}[name]
    error = np.abs(np.asarray(codec.roundtrip(x)) - x)
    # Half an ulp, or half of the smallest subnormal for what is small in its token; float16 rounds the scale.
    floor = scale[:, None] * {"e4m3": 2.0**-10, "e5m2": 2.0**-17}[name]
    assert (error <= np.maximum(np.abs(x) * 2.0 ** -(bits_of_mantissa + 1), floor) + 1e-3 * np.abs(x)).all()


@pytest.mark.parametrize("order", [1, 2, 64])
def test_hadamard_is_orthonormal_and_its_own_inverse(order):
    matrix = hadamard(order)
    np.testing.assert_allclose(matrix @ matrix, np.eye(order), atol=1e-6)
    np.testing.assert_array_equal(matrix, matrix.T)


def test_rotation_spreads_an_outlier_channel():
    x = np.random.default_rng(0).normal(size=(2, 64, 64)).astype(np.float32)
    x[..., 7] *= 20.0
    plain = AffineCodec(4, None)
    errors = [np.square(np.asarray(c.roundtrip(x)) - x).mean() for c in (plain, RotatedCodec(plain))]
    assert errors[1] < errors[0] / 5


def test_rotation_takes_the_largest_power_of_two_that_divides():
    x = np.random.default_rng(0).normal(size=(1, 8, 96)).astype(np.float32)
    inner = AffineCodec(8, None)
    for order in (None, 32, 8):
        np.testing.assert_allclose(RotatedCodec(inner, order).roundtrip(x), x, atol=0.05)
    with pytest.raises(ValueError, match="`order=64` must divide H=96"):
        RotatedCodec(inner, 64).roundtrip(x)
    with pytest.raises(ValueError, match="power of two"):
        RotatedCodec(inner, 24).roundtrip(x)


def test_rotating_fitted_constants_is_refused():
    with pytest.raises(ValueError, match="fitted constants"):
        RotatedCodec(NUQTokenCodec(bits=3))
    assert RotatedCodec(AffineCodec(4, 32, "tokens", pre_rope=True)).pre_rope
