"""Heads side by side: the same codes, scales and slots, elsewhere."""

import jax
import numpy as np
import pytest
from cases import make_params, random_kv

from kvjax import fused
from kvjax.codecs import AffineCodec, IdentityCodec, NUQChannelCodec, NUQTokenCodec, RotatedCodec
from kvjax.codecs.joined import JoinedCodec, can_join
from pallas_kernels.decode_attention.heads import join_format

T = 32
CODECS = [
    (IdentityCodec("float16"), 2, 64),
    (AffineCodec(bits=4, group=None), 2, 64),
    (AffineCodec(bits=2, group=32, along="tokens"), 4, 96),
    (AffineCodec(bits=8, group=32), 4, 96),
    (AffineCodec(bits=4, group=32, meta="int8"), 2, 64),
    (RotatedCodec(AffineCodec(bits=4, group=128)), 2, 64),
    (NUQChannelCodec(bits=3, outliers=0.02, pre_rope=True), 2, 64),
    (NUQTokenCodec(bits=2, outliers=0.02), 2, 64),
    (NUQChannelCodec(bits=4, outliers=0.01, pre_rope=True), 4, 96),
]


@pytest.mark.parametrize(("codec", "heads", "channels"), CODECS)
def test_nothing_is_added_and_everything_comes_back(codec, heads, channels):
    joined, rng = JoinedCodec(codec, heads), np.random.default_rng(0)
    params = make_params(codec, 2 * heads, channels)
    encode = jax.jit(codec.encode)
    blocks = [encode(random_kv(rng, 3, 2 * heads, T, channels), params) for _ in range(2)]
    stored = [joined.join(block) for block in blocks]
    assert sum(x.nbytes for x in jax.tree.leaves(stored[0])) == sum(x.nbytes for x in jax.tree.leaves(blocks[0]))
    packed = jax.tree.leaves(stored[0])[0]
    assert packed.shape[1] == 2 and packed.shape[-1] == heads * channels
    for x, y in zip(jax.tree.leaves(joined.separate(stored[0])), jax.tree.leaves(blocks[0]), strict=True):
        np.testing.assert_array_equal(x, y)
    if codec.token_local:
        kept = np.asarray([0, 7, T], np.int32)
        old, new = (x.keep(*both, kept) for x, both in ((codec, blocks), (joined, stored)))
        np.testing.assert_array_equal(codec.decode(old, params), joined.decode(new, params))


@pytest.mark.parametrize(("codec", "heads", "channels"), [c for c in CODECS if getattr(c[0], "meta", "") != "int8"])
def test_a_kernel_finds_them_as_it_expects(codec, heads, channels):
    joined, params = JoinedCodec(codec, heads), make_params(codec, 2 * heads, channels)
    x = random_kv(np.random.default_rng(0), 1, 1, 1, 2 * heads, T, channels)
    params = None if params is None else {name: jax.numpy.asarray(p)[None] for name, p in params.items()}
    one = None if params is None else {name: p[0] for name, p in params.items()}
    quantized = jax.jit(codec.quantize)(x, one)  # of both: what differs is how they pack
    found = fused.kernel_format(joined, joined.pack(quantized), params, 1)
    expected = join_format(fused.kernel_format(codec, codec.pack(quantized), params, 1), heads, codec.pre_rope)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_is_not_joined():
    assert can_join(NUQTokenCodec(bits=2)) and can_join(RotatedCodec(AffineCodec()))
    assert not can_join(NUQChannelCodec(bits=4, ranges="block"))
