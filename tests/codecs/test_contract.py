"""The equations of `AbstractCodec`, for every codec."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CODEC_CASES, make_params, random_kv

from kvjax.codecs import CODECS

K, T, H = 2, 64, 24
codecs = pytest.mark.parametrize("codec", CODEC_CASES.values(), ids=CODEC_CASES.keys())


def setup(codec, *lead, seed=0):
    return random_kv(np.random.default_rng(seed), *lead, K, T, H), make_params(codec, K, H)


def leaves_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_every_registered_codec_has_a_case():
    assert {type(codec) for codec in CODEC_CASES.values()} == set(CODECS.values())


@codecs
def test_roundtrip_is_decode_of_encode(codec):
    x, params = setup(codec)
    decoded = codec.decode(codec.encode(x, params), params)
    assert decoded.dtype == jnp.float32 and decoded.shape == x.shape
    np.testing.assert_allclose(codec.roundtrip(x, params), decoded, rtol=0, atol=1e-6)


@codecs
def test_leading_axes_are_independent(codec):
    x, params = setup(codec, 2, 3)
    whole = codec.encode(x, params)
    leaves_equal(jax.tree.map(lambda leaf: leaf[1, 2], whole), codec.encode(x[1, 2], params))
    np.testing.assert_array_equal(
        codec.decode(whole, params)[1, 2], codec.decode(codec.encode(x[1, 2], params), params)
    )


@codecs
def test_bits_per_element_is_what_encode_allocates(codec):
    params = make_params(codec, 4, 128)
    block = jax.eval_shape(codec.encode, jax.ShapeDtypeStruct((4, 128, 128), jnp.float32), params)
    bits = 8 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(block))
    assert bits / (4 * 128 * 128) == codec.bits_per_element(128, 4, 128)


@codecs
def test_what_does_not_come_back_is_counted_at_its_token(codec):
    """Nothing saturates in silence. An element of 10^6 is beyond float16."""
    x, params = setup(codec)
    assert codec.dropped(x, params).shape == (K, T)
    before = codec.dropped(x, params)
    x[1, 5, 7] = 1e6
    returned = abs(codec.roundtrip(x, params)[1, 5, 7] - 1e6) < 0.1e6
    added = codec.dropped(x, params) - before
    assert returned if not added[1, 5] else added[1, 5] >= 1
    assert not (codec.token_local and np.delete(added, 5, 1).any())  # else it changes its neighbours' range


@codecs
def test_token_local_codes_do_not_depend_on_neighbours(codec):
    x, params = setup(codec)
    changed = x.copy()
    changed[:, 1:] = 100.0 * random_kv(np.random.default_rng(9), K, T - 1, H)
    same = np.array_equal(codec.roundtrip(x, params)[:, 0], codec.roundtrip(changed, params)[:, 0])
    if not codec.reads_in_part:  # what is read in part depends on the block, what is stored need not
        assert same == codec.token_local


@codecs
def test_keep_mixes_by_token(codec):
    if not codec.token_local:
        pytest.skip("blocks of codecs over groups of tokens are not mixed")
    old, params = setup(codec, 2, 3)  # axes that another test has compiled for
    new, _ = setup(codec, 2, 3, seed=1)
    kept = np.array([[0, 13, T], [T, 1, T - 1]], np.int32)
    mixed = np.where((np.arange(T) < kept[..., None])[..., None, :, None], old, new)
    leaves_equal(codec.keep(codec.encode(old, params), codec.encode(new, params), kept), codec.encode(mixed, params))


@codecs
def test_degenerate_blocks_stay_finite(codec):
    """All zeros, constants, one huge element, subnormals, bf16 input: no NaN, and float16 constants come back."""
    params = make_params(codec, K, H)
    for value in (0.0, 1.5, 1e-30):
        x = jnp.full((K, T, H), value)
        y = np.asarray(codec.roundtrip(x, params))
        assert np.isfinite(y).all()
        if getattr(codec, "table", None) == "uniform" and params is None:  # online ranges, a level at each end
            np.testing.assert_allclose(y, value, atol=1e-4)
    huge = np.zeros((K, T, H), np.float32)
    huge[0, 3, 5] = 1e6
    assert np.isfinite(codec.roundtrip(huge, params)).all()
    assert np.isfinite(codec.roundtrip(jnp.ones((K, T, H), jnp.bfloat16), params)).all()


@codecs
def test_jit_equals_eager(codec):
    x, params = setup(codec)
    block = codec.encode(x, params)
    compiled = jax.jit(codec.encode)(x, params)
    for a, b in zip(jax.tree.leaves(block), jax.tree.leaves(compiled), strict=True):
        if a.dtype == jnp.uint32 or a.dtype == jnp.uint8:
            # Fused multiply-add may move an element that lies on a midpoint.
            assert (np.asarray(a) != np.asarray(b)).mean() < 0.01
        else:
            np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3)
