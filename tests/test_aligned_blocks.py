"""Levels of blocks against the rules they are made of."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax import aligned_blocks
from kvjax.codecs import AlignRule, PlanesCodec, align
from pallas_kernels.decode_attention import reference
from pallas_kernels.decode_attention.formats import Planes

B, N, K, G, H, T = 2, 3, 2, 4, 32, 64


def stored(codec, x, order):
    block = codec.quantize(jnp.asarray(x, jnp.float32))
    packed = codec.pack(block)
    return Planes(tuple(p[None] for p in packed.planes), jnp.full(x.shape[:3], 3, jnp.int32), order=order), block.top


def tensor(*shape, seed=0):
    """Blocks of sizes that differ by powers of two, and channels too."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * 2.0 ** rng.integers(-6, 3, (*shape[:3], 1, 1))
    return x * 2.0 ** rng.integers(-3, 3, shape[-1])


@pytest.mark.parametrize("rule", [AlignRule("worst", 2.0**-2), AlignRule("rms", 2.0**-3, skip=True)])
def test_keys_are_read_as_their_most_demanding_channel(rule):
    codec = PlanesCodec("tokens", rule)
    k, top = stored(codec, tensor(B, N, K, T, H), "channels")
    q = jnp.asarray(np.random.default_rng(1).standard_normal((B, K, G, H)) / 6, jnp.float32)
    levels = aligned_blocks.key_levels(codec, q, top)
    for b, n, h in np.ndindex(B, N, K):
        weight = jnp.abs(q[b, h])
        total, errors = weight.sum(-1, keepdims=True), codec.errors(top[b, n, h][None])
        each = align.within_budget(rule, jnp.float32(rule.budget), weight, total, jnp.float32(H), errors)
        assert levels[b, n, h] == each.max()
    assert len(np.unique(levels)) > 1

    def logits(levels):
        x = reference.dequantize(dataclasses.replace(k, levels=levels), jnp.int32(0))
        return np.einsum("bkgh,bnkth->bnkgt", *(np.asarray(a, np.float64) for a in (q, x)))

    assert np.abs(logits(levels) - logits(k.levels)).max() <= rule.budget


@pytest.mark.parametrize("mode", ["worst", "rms"])
@pytest.mark.parametrize("skip", [False, True])
def test_limits_are_where_the_rule_changes_its_level(mode, skip):
    rule = AlignRule(mode, 2.0**-10, skip=skip)
    codec = PlanesCodec("channels", rule)
    top = jnp.asarray(np.random.default_rng(0).integers(0, [[[18]], [[12]]], (B, N, K)), jnp.uint8)
    count = jnp.asarray([100, 5000], jnp.int32)
    limits = aligned_blocks.value_limits(codec, top, count)
    log_p = jnp.linspace(-20.0, 0.0, 500).reshape(1, 1, 1, -1)
    got = (log_p[None] > limits[..., None]).sum(0)

    errors = tuple(e[..., None] for e in codec.errors(top))
    budget = rule.budget * errors[0].max(1, keepdims=True)
    p, one, n = jnp.exp(log_p), jnp.float32(1), count.astype(jnp.float32)[:, None, None, None]
    want = align.within_budget(rule, budget, p, one, n, errors)
    assert (got >= want).all()  # never less than the rule's
    assert (got != want).mean() < 1e-2  # and more only within the margin
    assert len(np.unique(want)) == (4 if skip else 3)


def test_values_within_limits_keep_to_the_budget():
    rule = AlignRule("worst", 2.0**-5, skip=True)
    codec = PlanesCodec("channels", rule)
    v, top = stored(codec, tensor(B, N, K, T, H), "words")
    scores = jnp.asarray(np.random.default_rng(2).standard_normal((B, K, G, N * T)) * 3, jnp.float32)
    limits = aligned_blocks.value_limits(codec, top.max(-1), jnp.full((B,), N * T, jnp.int32))
    v_read = dataclasses.replace(v, levels=None, limits=limits)
    levels = reference.levels_within(v_read, scores, jax.nn.logsumexp(scores, axis=-1))
    assert len(np.unique(levels)) > 1
    p = np.asarray(jax.nn.softmax(scores), np.float64)

    def output(levels):
        x = np.asarray(reference.dequantize(dataclasses.replace(v, levels=levels), jnp.int32(0)), np.float64)
        return np.einsum("bkgt,bkth->bkgh", p, x.swapaxes(1, 2).reshape(B, K, N * T, H))

    error = np.abs(output(levels) - output(v.levels)).max((2, 3))
    largest = codec.errors(top)[0].max((1, 3))
    assert (error <= rule.budget * np.asarray(largest)).all()
