"""A window's keys and values as a cache would return them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CODEC_CASES, make_params, make_policy, random_kv

from kvjax import decode
from kvjax.codecs import IdentityCodec, NUQChannelCodec
from kvjax.evaluate.compress import bits_of, kv_map, share_without_slot, through_storage
from kvjax.model.forward import forward, forward_with_kv
from kvjax.policy import Policy, Preset, SegmentPolicy, bind, preset
from kvjax.presets import kvquant


def run(model, tokens, policy, block=128):
    through = kv_map(policy, model, block)
    return np.asarray(jax.jit(lambda model, tokens: forward(model, tokens, kv_map=through))(model, tokens))


@pytest.mark.parametrize("name", ["identity-f32", "token-nuq3-1%", "channel-nuq3-1%", "channel-block-int3-1%"])
def test_through_storage(name):
    """Sinks as they are, everything else as the codec's own round trip in blocks counted from behind the sinks."""
    codec = CODEC_CASES[name]
    params = make_params(codec, 2, 32)
    x = random_kv(np.random.default_rng(0), 2, 75, 2, 32)
    store = functools.partial(through_storage, codec, sinks=3, block=32, dtype=jnp.float32)
    stored = np.asarray(jax.jit(store)(params, jnp.asarray(x)))
    assert stored.shape == x.shape
    np.testing.assert_array_equal(stored[:, :3], x[:, :3])
    for start in range(3, 75, 32):
        block = x[:, start : start + 32]
        if block.shape[1] < 32 and not codec.token_local:
            block = np.concatenate([block, np.repeat(block[:, -1:], 32 - block.shape[1], 1)], 1)
        expected = jax.jit(codec.roundtrip)(jnp.asarray(block).swapaxes(1, 2), params).swapaxes(1, 2)
        got = stored[:, start : start + 32]
        np.testing.assert_allclose(got, expected[:, : got.shape[1]], atol=1e-6)


def test_filling_up_a_block_moves_no_range():
    codec = NUQChannelCodec(bits=4, table="uniform", ranges="block")
    x = jnp.asarray(random_kv(np.random.default_rng(0), 1, 75, 2, 32))
    stored = through_storage(codec, None, x, 0, 96, jnp.float32)
    np.testing.assert_allclose(stored, codec.roundtrip(x.swapaxes(1, 2)).swapaxes(1, 2), atol=1e-6)


def test_uncompressed_windows_give_the_plain_logits(model, windows):
    plain = forward(model, windows)
    np.testing.assert_allclose(run(model, windows, bind("f32", preset("f32"), 2)), plain, atol=1e-4)
    sinks = make_policy(dataclasses.replace(kvquant(2), sinks=windows.shape[1]), 2, 2, 32)
    np.testing.assert_allclose(run(model, windows, sinks), plain, atol=1e-4)


def test_segments_and_keys_before_and_after_rope(model, windows):
    """One segment of two layers equals two segments of one; layers may differ in what their codec stores."""
    whole = make_policy(kvquant(3), 2, 2, 32)
    (segment,) = whole.segments

    def part(layer: int) -> SegmentPolicy:
        k, v = ({n: p[layer : layer + 1] for n, p in ps.items()} for ps in (segment.k_params, segment.v_params))
        return SegmentPolicy((layer,), segment.k_codec, segment.v_codec, k, v)

    halves = Policy("halves", (part(0), part(1)), whole.sinks)
    expected = run(model, windows, whole)
    np.testing.assert_allclose(run(model, windows, halves), expected, atol=1e-5)
    exact = IdentityCodec("float32")
    mixed = Policy("mixed", (part(0), SegmentPolicy((1,), exact, exact)), whole.sinks)
    assert np.abs(run(model, windows, mixed) - expected).max() > 1e-3


@pytest.mark.parametrize("name", ["channel-nuq3-1%", "token-nuq4"])
def test_bits_are_those_of_a_real_cache(model, name):
    policy = make_policy(Preset(CODEC_CASES[name], CODEC_CASES["token-nuq3-1%"], sinks=1), 2, 2, 32)
    cache = decode.init_cache(model, policy, batch=2, capacity=300)
    assert bits_of(model, policy, capacity=300) == decode.bits_per_element(cache)


def test_share_without_slot(model, windows):
    policy = make_policy(kvquant(3), 2, 2, 32)
    (segment,) = policy.segments
    _, k, _ = forward_with_kv(model, windows)
    k = np.asarray(k, np.float64)[:, :, 1:]  # behind the sink; [L, B, S, K, H]
    scale, zero = (p.swapaxes(1, 2)[:, None] for p in (segment.k_params["scale"], segment.k_params["zero"]))
    outside = (np.abs((k - zero) / scale) > 1).sum(-1)
    dropped = np.maximum(outside - segment.k_codec.slots(32), 0).sum()  # values always find one
    assert dropped > 0
    assert share_without_slot(model, policy, windows) == pytest.approx(dropped / (2 * 2 * 5 * 80 * 2 * 32))
