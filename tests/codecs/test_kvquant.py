"""KVQuant's codecs against a float64 transcription of the paper's formulas, and their promises."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import make_params, random_kv

from kvjax.codecs import NUQChannelCodec, NUQTokenCodec
from kvjax.codecs.outliers import largest, normalize_keys, normalize_values

K, T, H = 2, 64, 64


def nearest(x, levels):
    """argmin_j |x - C_j|, ties to the lower index (spec section 3.2)."""
    return np.abs(x[..., None] - levels).argmin(-1)


def keys_float64(x, scale, zero, levels, slots):
    """Section 6.3: N = (k - z) / s; the largest |N| > 1 go to slots and come back exactly, the rest saturate."""
    x, scale, zero, levels = (np.asarray(a, np.float64) for a in (x, scale, zero, levels))
    normalized = (x - zero) / scale
    out = scale * levels[nearest(normalized, levels)] + zero
    farthest = np.argsort(-np.abs(normalized), axis=-1, kind="stable")[..., :slots]
    for index in np.ndindex(*x.shape[:-1]):
        for channel in farthest[index]:
            if abs(normalized[index][channel]) > 1:
                out[index][channel] = x[index][channel]
    return out


def values_float64(x, levels, slots):
    """Section 6.3: slots first, s and z from the extremes of what is left over all heads, stored as float16."""
    x, levels = np.asarray(x, np.float64), np.asarray(levels, np.float64)
    out = np.empty_like(x)
    for t in range(x.shape[1]):
        token = x[:, t]
        farthest = np.argsort(-np.abs(token - token.mean()), axis=-1, kind="stable")[:, :slots]
        rest = np.ones(token.shape, bool)
        np.put_along_axis(rest, farthest, False, axis=-1)
        low, high = token[rest].min(), token[rest].max()
        scale, zero = np.float64(np.float16((high - low) / 2)), np.float64(np.float16((high + low) / 2))
        out[:, t] = np.where(rest, scale * levels[nearest((token - zero) / scale, levels)] + zero, token)
    return out


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("outliers", [0.0, 0.01, 0.05])
def test_keys_equal_the_paper(bits, outliers):
    codec = NUQChannelCodec(bits=bits, outliers=outliers)
    x, params = random_kv(np.random.default_rng(bits), K, T, H), make_params(codec, K, H)
    wanted = keys_float64(x, params["scale"], params["zero"], params["levels"], codec.slots(H))
    got = np.asarray(codec.decode(codec.encode(x, params), params))
    # Slots are float16 residuals; an element on a midpoint in float32 may fall to the other side.
    close = np.isclose(got, wanted, rtol=1e-3, atol=1e-3)
    assert close.mean() > 0.9999


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("outliers", [0.0, 0.01, 0.05])
def test_values_equal_the_paper(bits, outliers):
    codec = NUQTokenCodec(bits=bits, outliers=outliers)
    x, params = random_kv(np.random.default_rng(bits), K, T, H), make_params(codec, K, H)
    wanted = values_float64(x, params["levels"], codec.slots(H))
    got = np.asarray(codec.decode(codec.encode(x, params), params))
    assert np.isclose(got, wanted, rtol=1e-3, atol=1e-3).mean() > 0.9999


def test_keys_by_hand():
    """One head, one channel pair: scale 2, zero 1, levels -1, 0, 1/2, 1 (2 bits, dense)."""
    codec = NUQChannelCodec(bits=2)
    levels = np.array([-1.0, 0.0, 0.5, 1.0], np.float32)
    params = {"levels": levels, "decode_levels": levels}
    params |= {"scale": np.full((1, 1, 2), 2.0, np.float32), "zero": np.full((1, 1, 2), 1.0, np.float32)}
    x = np.zeros((1, 32, 2), np.float32)
    x[0, :5, 0] = [-1.0, 0.0, 1.6, 2.2, 9.0]  # normalized -1, -0.5 (tie: lower), 0.3 (above 0.25), 0.6, 4 (saturates)
    block = codec.quantize(x, params)
    assert np.asarray(block.codes)[0, :5, 0].tolist() == [0, 0, 2, 2, 3]
    assert np.asarray(codec.dequantize(block, params))[0, :5, 0].tolist() == [-1.0, -1.0, 2.0, 2.0, 3.0]


def test_outliers_come_back_as_float16_residuals_and_dropped_ones_saturate():
    codec = NUQChannelCodec(bits=3, outliers=0.01)  # one slot of 64
    params = make_params(codec, 1, H)
    params["scale"][:], params["zero"][:] = 1.0, 0.0
    x = np.zeros((1, 32, H), np.float32)
    x[0, 0, 7], x[0, 0, 9] = 30.123, -8.0  # two outliers, one slot: the larger gets it
    y = np.asarray(codec.decode(codec.encode(x, params), params))
    assert abs(y[0, 0, 7] - 30.123) < 30 * 2**-11
    assert y[0, 0, 9] == params["levels"][0]
    assert codec.dropped(x, params).tolist() == [[1] + 31 * [0]]


def test_inlier_error_is_at_most_half_the_largest_gap():
    codec = NUQTokenCodec(bits=3, outliers=0.01)
    x, params = random_kv(np.random.default_rng(3), K, T, H), make_params(codec, K, H)
    params["levels"][0], params["levels"][-1] = -1.0, 1.0
    block = codec.quantize(x, params)
    error = np.abs(np.asarray(codec.dequantize(block, params)) - x)
    gap = np.diff(params["levels"]).max() / 2
    limit = gap * np.asarray(block.scale, np.float32)[..., None] * 1.001 + 2e-3 * np.abs(x)
    assert (error <= limit).all()


@pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 128, 256])
def test_slots_follow_the_head_size_and_never_exceed_the_budget(head_dim):
    """Ties must not select more than the slots (the defect of masks by quantile)."""
    codec = NUQTokenCodec(bits=4, outliers=0.01)
    slots = codec.slots(head_dim)
    assert slots == math.ceil(0.01 * head_dim)
    if head_dim >= 64:
        assert 24 * slots / head_dim <= 0.40
    x = np.ones((1, 32, head_dim), np.float32)
    _, _, _, inlier = normalize_values(x, slots)
    assert int((~inlier).sum()) == 32 * slots


def test_llama_7b_bits_per_vector_match_the_paper():
    """D = 4096 (section 7.1): dense nuqX costs X + 16/D averaged over keys and values."""
    keys = NUQChannelCodec(bits=3).bits_per_element(128, 32, 128)
    values = NUQTokenCodec(bits=3).bits_per_element(128, 32, 128)
    assert (keys + values) / 2 == 3 + 16 / 4096


def test_normalize_is_what_the_codec_quantizes():
    x = random_kv(np.random.default_rng(5), K, T, H)
    params = make_params(NUQChannelCodec(bits=2, outliers=0.05), K, H)
    slots = NUQChannelCodec(outliers=0.05).slots(H)
    normalized, inlier = normalize_keys(x, params["scale"], params["zero"], slots)
    block = NUQChannelCodec(bits=2, outliers=0.05).quantize(x, params)
    assert int((~inlier).sum()) == int((np.asarray(block.slot_residual) != 0).sum())
    assert np.abs(np.asarray(normalized)).max() <= 1
    normalized, scale, zero, inlier = normalize_values(x, slots)
    inside = np.asarray(inlier)
    np.testing.assert_allclose(np.asarray(normalized * scale + zero)[inside], x[inside], rtol=2e-2, atol=2e-3)


def test_uncapped_outliers_are_all_exact():
    """`outliers=1`: a slot for every channel, the paper's uncapped form."""
    codec = NUQChannelCodec(bits=2, outliers=1.0)
    x, params = random_kv(np.random.default_rng(5), 1, 32, 16), make_params(codec, 1, 16)
    y = np.asarray(codec.roundtrip(x, params))
    outside = np.abs((x - params["zero"]) / params["scale"]) > 1
    assert outside.sum() > 10
    np.testing.assert_allclose(y[outside], x[outside], rtol=1e-3, atol=1e-3)
    assert not codec.dropped(x, params).any()


def test_block_ranges_hold_every_element():
    codec = NUQChannelCodec(bits=4, ranges="block", table="uniform")
    x = random_kv(np.random.default_rng(6), K, T, H)
    block = codec.quantize(x)
    step = 2 * np.asarray(block.scale, np.float32)[:, None] / 15
    error = np.abs(np.asarray(codec.dequantize(block)) - x)
    assert (error <= 0.51 * step + 1e-3 * np.abs(x)).all()


def test_q_norm_changes_decoding_only():
    plain, matched = NUQTokenCodec(bits=2), NUQTokenCodec(bits=2, q_norm=True)
    x, params = random_kv(np.random.default_rng(7), K, T, H), make_params(plain, K, H)
    a, b = plain.quantize(x, params), matched.quantize(x, params)
    assert all(np.array_equal(p, q) for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    zero = np.asarray(a.zero, np.float32)[..., None]
    scale = np.asarray(a.scale, np.float32)[..., None]
    wanted = scale * params["decode_levels"][np.asarray(a.codes)] + zero
    np.testing.assert_allclose(matched.dequantize(b, params), wanted, rtol=1e-5, atol=1e-5)


def test_missing_constants_say_the_way_out():
    with pytest.raises(ValueError, match="calibrate"):
        NUQChannelCodec(bits=3).quantize(jnp.zeros((1, 32, 8)))
    with pytest.raises(ValueError, match="at most 256"):
        NUQTokenCodec(outliers=0.01, table="nf").quantize(jnp.zeros((1, 32, 320)))


@pytest.mark.parametrize("count", [1, 2, 4, 5])
def test_the_largest_are_those_of_top_k_ties_included(count):
    x = np.random.default_rng(0).integers(0, 4, (3, 5, 16)).astype(np.float32)
    for got, wanted in zip(largest(jnp.asarray(x), count), jax.lax.top_k(x, count), strict=True):
        np.testing.assert_array_equal(got, wanted)
