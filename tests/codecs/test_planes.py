"""Bit planes: nothing is lost, what is not read errs within its bound, and what float16 cannot hold is counted."""

import jax.numpy as jnp
import numpy as np
import pytest
from cases import random_kv
from hypothesis import given
from hypothesis import strategies as st

from kvjax.codecs import AffineCodec, AlignRule, IntPlanesCodec, PlanesCodec, RotatedCodec
from kvjax.codecs.planes import PlanesBlock, join, split

PATTERNS = np.arange(65536, dtype=np.uint16)
FLOATS = PATTERNS.view(np.float16).astype(np.float32)
BUDGET = AlignRule("rms", 2.0**-4)
KEYS, VALUES = PlanesCodec("tokens", BUDGET), PlanesCodec("channels", BUDGET)
along = pytest.mark.parametrize("codec", [KEYS, VALUES], ids=["keys", "values"])


def test_join_of_split_is_the_identity_for_every_pattern():
    np.testing.assert_array_equal(join(split(jnp.asarray(PATTERNS))), PATTERNS)


@along
def test_packing_is_the_identity_for_every_pattern(codec):
    block = PlanesBlock(split(jnp.asarray(PATTERNS.reshape(2, 128, 256))), jnp.zeros((2, 128), jnp.uint8))
    np.testing.assert_array_equal(join(codec.unpack(codec.pack(block)).planes).ravel(), PATTERNS)


@pytest.mark.parametrize(
    ("value", "pattern", "planes", "reads"),
    [  # worked by hand
        (0.33325, 0x3555, (0x35, 0x5, 0x5), (0.34375, 0.333984375)),  # 0x3580, 0x3558
        (-1.2002, 0xBCCD, (0xBC, 0xC, 0xD), (-1.125, -1.1953125)),  # 0xBC80, 0xBCC8
        (5.5, 0x4580, (0x45, 0x8, 0x0), (5.5, 5.53125)),  # 0x4580, 0x4588
        (0.0, 0x0000, (0, 0, 0), (2.0**-17, 2.0**-21)),  # zero reads as half of what is not known
    ],
)
def test_planes_and_reads_by_hand(value, pattern, planes, reads):
    block = VALUES.quantize(jnp.full((1, 1, 8), value, jnp.float32))
    assert np.float16(value).view(np.uint16) == pattern
    assert tuple(int(p[0, 0, 0]) for p in block.planes) == planes
    for level, wanted in enumerate(reads, start=1):
        assert float(VALUES.read_at(block, level)[0, 0, 0]) == wanted
    assert float(VALUES.read_at(block, 3)[0, 0, 0]) == np.float16(value)


@along
def test_the_error_bound_is_tight_for_every_finite_pattern(codec):
    """|x - read| <= 2^(max(e, 1) - 25 + b - 1) with b bits dropped: what the codec says, and reached."""
    x = FLOATS[np.isfinite(FLOATS)].reshape(-1, 1, 1)  # every pattern a head of its own
    x = np.broadcast_to(x, (len(x), 1, 8)) if codec is VALUES else x
    block = codec.quantize(jnp.asarray(x))
    exponent = np.maximum(PATTERNS[np.isfinite(FLOATS)] >> 10 & 31, 1).astype(int)
    size, *errors = (np.asarray(e)[:, 0] for e in codec.errors(codec.extent(block)))
    assert (np.abs(x[:, 0, 0]) <= size).all()
    for level, (dropped, bound) in enumerate(zip((8, 4), errors, strict=True), start=1):
        np.testing.assert_array_equal(bound, 2.0 ** (exponent - 25 + dropped - 1))
        error = np.abs(np.asarray(codec.read_at(block, level))[:, 0, 0] - x[:, 0, 0])
        assert (error <= bound).all() and (error == bound).any()


@along
def test_infinities_and_nan_are_read_in_full(codec):
    x = np.zeros((1, 32, 32), np.float32)
    x[0, 3, 5] = np.nan
    block = codec.quantize(jnp.asarray(x))
    size, *errors = codec.errors(codec.extent(block))
    at = 5 if codec is KEYS else 3
    assert all(np.isinf(np.asarray(e)[0, at]) and np.isinf(np.asarray(e)).sum() == 1 for e in (size, *errors))
    assert np.isnan(codec.roundtrip(x)[0, 3, 5])


@along
def test_what_exceeds_float16_saturates_and_is_counted(codec):
    x = np.zeros((2, 1, 32, 32), np.float32)
    x[1, 0, :3, 0] = (65505.0, -1e9, np.inf)
    x[0, 0, 0, 0] = 65504.0
    np.testing.assert_array_equal(codec.dropped(x), [[32 * [0]], [3 * [1] + 29 * [0]]])
    np.testing.assert_array_equal(codec.decode(codec.encode(x))[1, 0, :3, 0], [65504, -65504, 65504])
    assert (codec.dropped(jnp.full((1, 32, 32), 1e5, jnp.bfloat16)) == 32).all()


@along
def test_words_lie_along_tokens(codec):
    """Packed first planes: of keys a channel's words are neighbours, of values a row holds a token of each quarter."""
    x = random_kv(np.random.default_rng(0), 1, 32, 64)
    one = x.copy()
    one[0, 15, 9] = 3.0
    words, changed = (np.asarray(codec.encode(x).planes[0])[0] for x in (x, one))
    assert words.shape == ((64, 8) if codec is KEYS else (8, 64))
    # Token 15 is the eighth of the second quarter.
    assert np.argwhere(words ^ changed).tolist() == [[9, 7] if codec is KEYS else [7, 9]]
    assert ((words ^ changed) & ~np.uint32(0xFF00) == 0).all()


def test_a_token_is_found_in_the_packed_words():
    block = VALUES.quantize(jnp.asarray(random_kv(np.random.default_rng(0), 3, 2, 32, 8)))
    token = jnp.asarray([0, 15, 31])
    words = VALUES.pack(block).planes[0]
    found = VALUES.first_planes(words, (jnp.arange(3), jnp.asarray([1, 0, 1])), token)
    np.testing.assert_array_equal(
        found, [block.planes[0][0, 1, 0], block.planes[0][1, 0, 15], block.planes[0][2, 1, 31]]
    )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("axis", ["tokens", "channels"])
@given(seed=st.integers(0, 1000))
def test_integer_codes_in_planes_are_the_codes(bits, axis, seed):
    """Read in full they are the affine codec's; half of the bits err by at most (2^(b/2) - 1)/2 steps."""
    inner = AffineCodec(bits, 16, axis)
    codec = IntPlanesCodec(inner, BUDGET)
    x = random_kv(np.random.default_rng(seed), 2, 32, 32)
    block = codec.unpack(codec.encode(x))
    whole = np.asarray(codec.read_at(block, 2))
    np.testing.assert_array_equal(whole, inner.roundtrip(x))
    size, error = (np.expand_dims(e, -2 if axis == "tokens" else -1) for e in codec.errors(codec.extent(block)))
    half = np.abs(np.asarray(codec.read_at(block, 1)) - whole)
    assert (half <= error * (1 + 1e-5)).all() and (np.abs(whole) <= size * (1 + 1e-5)).all()
    assert half.max() > 0.9 * error.min()


def test_one_range_over_all_heads_bounds_each_head():
    codec = IntPlanesCodec(AffineCodec(4, None, "channels", meta="int8"), BUDGET)
    x = random_kv(np.random.default_rng(0), 2, 32, 32)
    block = codec.unpack(codec.encode(x))
    size, error = codec.errors(codec.extent(block))
    assert size.shape == error.shape == (2, 32)
    assert (np.abs(codec.read_at(block, 1) - codec.read_at(block, 2)) <= error[..., None] * (1 + 1e-5)).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PlanesCodec("tokens", BUDGET, pre_rope=True), "rotation mixes channels"),
        (lambda: IntPlanesCodec(AffineCodec(2, 32, "tokens"), BUDGET), "`bits=2` do not halve"),
        (lambda: IntPlanesCodec(AffineCodec(4, 32, "tokens"), AlignRule()), 'take "worst" or "rms"'),
        (lambda: RotatedCodec(KEYS), "is read by channel"),
        (lambda: AlignRule("exact"), "`mode='exact'`"),
        (lambda: AlignRule("rms"), "`budget=None` must be above 0"),
        (lambda: AlignRule("criterion", 0.1), "the criterion has none"),
        (lambda: AlignRule(scope="row"), "`scope='row'`"),
    ],
)
def test_what_makes_no_codec(make, message):
    with pytest.raises(ValueError, match=message):
        make()
