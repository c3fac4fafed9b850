"""Kernels behind the cache: what they are given, that they give what the chunked reference gives, and what is said.

The kernel here is the plain definition (`implementation="reference"`), so what is tested is the wiring.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import make_policy, random_kv
from kernel_cases import rotate

import kvjax
from kvjax import attention, decode, fused, sealed
from kvjax.codecs.affine import AffineBlock
from kvjax.codecs.identity import DenseBlock
from kvjax.codecs.kvquant import NUQBlock
from kvjax.model.rope import make_rope
from kvjax.policy import preset
from kvjax.sharding import make_mesh
from kvjax.striped import Stripe
from pallas_kernels.decode_attention import api, numba_cpu
from pallas_kernels.decode_attention.formats import shape_of
from pallas_kernels.decode_attention.reference import dequantize

BLOCKS = 3


@pytest.fixture(scope="module")
def model():
    return kvjax.load("tiny")


@pytest.fixture(autouse=True)
def definition(monkeypatch):
    for block in (DenseBlock, AffineBlock, NUQBlock):
        for platform in ("cpu", "tpu"):
            monkeypatch.setitem(fused.FAST, (block, platform), "reference")


def filled(model, quant, target="cpu", **changes):
    """A cache whose sealed blocks hold random keys and values, rows of different lengths."""
    sizes = {"batch": 3, "capacity": BLOCKS * 128 + 64, "block": 128}
    cache = decode.init_cache(model, kvjax.policy(quant, model), target=target, **sizes)
    rng = np.random.default_rng(0)
    segments = []
    for segment in cache.segments:
        out = {}
        for name in ("k", "v"):
            codec, params = getattr(segment, f"{name}_codec"), getattr(segment, f"{name}_params")
            blocks = jax.tree.leaves(getattr(segment, name))[0].shape[2]
            x = rng.standard_normal((3, blocks, cache.shape.kv_heads, 128, cache.shape.head_dim))
            encode = jax.jit(codec.encode)
            coded = encode(jnp.asarray(x, jnp.float32), jax.tree.map(lambda p: p[0], params))
            out[name] = jax.tree.map(lambda leaf, c: leaf.at[0].set(c), getattr(segment, name), coded)
        segments.append(dataclasses.replace(segment, **out))
    length = jnp.asarray([cache.sinks, cache.sinks + cache.window + 128, cache.capacity - 1], jnp.int32)
    return dataclasses.replace(cache, segments=tuple(segments), length=length, **changes)


def queries(cache):
    shape = cache.shape
    q = np.random.default_rng(1).standard_normal(
        (3, 1, shape.kv_heads, shape.q_heads // shape.kv_heads, shape.head_dim)
    )
    return attention.queries(shape, jnp.asarray(q, jnp.float32), cache.length, cache.length + 1)


def both(cache):
    """The sealed part of layer 0 by the kernel and by the reference."""
    segment = cache.segments[0]
    assert fused.kernel(cache, segment)
    run = jax.jit(lambda f, cache: f(cache, cache.segments[0], jnp.int32(0), queries(cache)), static_argnums=0)
    return run(sealed.attend_sealed, cache), run(lambda *args: sealed.in_chunks(*args, Stripe()), cache)


@pytest.mark.parametrize(
    "quant",
    [
        "bf16",
        "kivi4",
        "kivi2-g64",
        "asymkv-2-0",
        "int4",
        "int3",
        "nf3",
        "kivi4-rot",
        "kvquant3",
        "kvquant2-dense-qnorm",
    ],
)
def test_a_kernel_is_given_what_the_codec_stored(model, quant):
    kernel, plain = both(filled(model, quant))
    for a, b in zip(kernel, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("quant", ["kivi4-rot", "kvquant3"])
def test_heads_of_64_stand_side_by_side_on_tpu(model, quant):
    plain, joined = (filled(model, quant, target) for target in ("cpu", "tpu:v5e"))
    k, v = fused.formats(joined.segments[0])
    assert shape_of(k)[3:] == shape_of(v)[3:] == (1, 128, 128) and k.joined == v.joined == 2
    assert decode.bits_per_element(joined) == decode.bits_per_element(plain)
    assert decode.explain(joined, "cpu") == decode.explain(plain)
    for a, b, c in zip(*both(joined), both(plain)[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)
        np.testing.assert_allclose(b, c, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quant", ["kivi2", "kvquant3"])
def test_a_sliding_window_bounds_what_a_kernel_reads(model, quant):
    cache = filled(model, quant)
    cache = dataclasses.replace(cache, shape=dataclasses.replace(cache.shape, sliding_window=200))
    for a, b in zip(*both(cache), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


def test_yarn_scales_queries_of_keys_before_rope(model):
    cache = filled(model, "kvquant3")
    rope = make_rope(
        cache.shape.head_dim, 64, rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=64
    )
    assert rope.attention_factor > 1
    cache = dataclasses.replace(cache, shape=dataclasses.replace(cache.shape, rope=rope))
    for a, b in zip(*both(cache), strict=True):
        np.testing.assert_allclose(a, b, rtol=5e-4, atol=5e-4)


@pytest.mark.parametrize("quant", ["bf16", "kivi2", "int8", "nf2", "kvquant4"])
def test_formats_decode_as_the_codec(model, quant):
    cache = filled(model, quant)
    segment = cache.segments[0]
    for name, fmt in zip("kv", fused.formats(segment), strict=True):
        params = jax.tree.map(lambda p: p[0], getattr(segment, f"{name}_params"))
        stored = jax.tree.map(lambda leaf: leaf[0], getattr(segment, name))
        expected = getattr(segment, f"{name}_codec").decode(stored, params)
        np.testing.assert_allclose(dequantize(fmt, jnp.int32(0)), expected, rtol=1e-6, atol=1e-6)


def test_only_single_queries_take_the_kernel(model):
    cache = filled(model, "kivi2")
    assert "decode steps, reference (chunked jnp) in prefill" in decode.explain(cache)


@pytest.mark.parametrize(
    ("quant", "reason"),
    [
        ("f32", "kernels read 16-bit values, not float32"),
        ("kivi2-m8", "kernels read 16-bit scales and zeros, not 8-bit ones"),
        ("fp8", "no kernel for Float8Block on cpu"),
        ("alignedkv", "xla_cpu does not read float16 planes"),
    ],
)
def test_what_has_no_kernel_says_why(model, quant, reason):
    cache = decode.init_cache(model, kvjax.policy(quant, model), batch=1, capacity=200, target="cpu")
    assert f"reference (chunked jnp), {reason}" in decode.explain(cache)
    with pytest.raises(NotImplementedError, match=reason):
        decode.explain(cache, strict=True)


@pytest.fixture
def on_cpu(monkeypatch):
    for block in (DenseBlock, AffineBlock, NUQBlock):
        monkeypatch.setitem(fused.FAST, (block, "cpu"), "xla_cpu")


def test_long_contexts_on_cpu_are_compiled_by_numba_where_it_is(model, on_cpu, monkeypatch):
    def explain(capacity):
        policy = kvjax.policy("kivi2", model)
        cache = jax.eval_shape(lambda: decode.init_cache(model, policy, batch=1, capacity=capacity, target="cpu"))
        return decode.explain(cache, strict=True)

    assert "numba_cpu in decode steps," in explain(fused.NATIVE_TOKENS)
    assert "xla_cpu in decode steps," in explain(fused.NATIVE_TOKENS // 2)
    with monkeypatch.context() as refusing:
        refusing.setattr(numba_cpu, "SMALLEST", 1000)  # no head has so many channels
        assert "xla_cpu in decode steps," in explain(fused.NATIVE_TOKENS)
    monkeypatch.setattr(api, "installed", lambda name: name != "numba_cpu")
    assert "xla_cpu in decode steps (numba_cpu is faster: install the extra `cpu`)," in explain(fused.NATIVE_TOKENS)


def test_planes_on_cpu_are_read_by_numba_alone(model, on_cpu, monkeypatch):
    def explain(capacity):
        policy = kvjax.policy("alignedkv-budget", model)
        cache = jax.eval_shape(lambda: decode.init_cache(model, policy, batch=1, capacity=capacity, target="cpu"))
        return decode.explain(cache)

    assert "numba_cpu in decode steps (levels by runs of 128 tokens and kv head)" in explain(fused.NATIVE_TOKENS)
    assert "(numba_cpu does, from 4,096 tokens of capacity)" in explain(fused.NATIVE_TOKENS // 2)
    monkeypatch.setattr(api, "installed", lambda name: name != "numba_cpu")
    assert "(numba_cpu does: install the extra `cpu`)" in explain(fused.NATIVE_TOKENS)


def test_numbas_kernel_on_every_device_of_a_mesh(on_cpu, monkeypatch):
    """Two rows of different lengths over eight devices, against XLA's kernel on one."""
    shape = decode.CacheShape(1, 8, 4, 32, make_rope(32, 512))
    policy = make_policy(preset("kvquant3"), 1, 4, 32, "kvquant3")
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(x) for x in (random_kv(rng, 2, 100, 4, 32), random_kv(rng, 2, 100, 4, 32)))
    q, counts = jnp.asarray(random_kv(rng, 2, 1, 8, 32)), jnp.asarray([100, 70], jnp.int32)

    def attend(mesh):
        cache = decode.init_cache(shape, policy, batch=2, capacity=320, block=32, target="cpu", mesh=mesh)
        fill = jax.jit(lambda cache: decode.advance(decode.append(cache, 0, k, v, counts), counts))
        step = jax.jit(lambda cache: decode.attend(cache, 0, q, jnp.ones_like(counts)))
        cache = fill(cache)
        return decode.explain(cache), step(decode.append(cache, 0, k[:, :1], v[:, :1], jnp.ones_like(counts)))

    path, expected = attend(None)
    assert "xla_cpu in decode steps" in path
    monkeypatch.setattr(fused, "NATIVE_TOKENS", 0)
    path, found = attend(make_mesh("data=2,seq=2,tensor=2"))
    assert "numba_cpu in decode steps" in path
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_the_reference_can_be_asked_for(model):
    cache = decode.init_cache(model, kvjax.policy("kivi2", model), batch=1, capacity=200, target="reference")
    assert fused.kernel(cache, cache.segments[0]) is None
    assert "reference (chunked jnp), asked for" in decode.explain(cache)
    with pytest.raises(ValueError, match="`target='tpv'` names no platform"):
        decode.init_cache(model, kvjax.policy("kivi2", model), batch=1, capacity=200, target="tpv")


@pytest.mark.parametrize("path", ["numba_cpu", "xla_cpu", "reference"])
def test_a_query_ten_million_tokens_after_its_keys(model, path, monkeypatch):
    """Keys before RoPE against attention in float64: float32 angles would be off by up to 0.8 rad."""
    monkeypatch.setitem(fused.FAST, (NUQBlock, "cpu"), "xla_cpu")
    cache = filled(model, "kvquant3")
    monkeypatch.setattr(fused, "NATIVE_TOKENS", cache.capacity + (path != "numba_cpu"))
    cache = dataclasses.replace(
        cache, target=path if path == "reference" else "cpu", length=jnp.full(3, cache.capacity, jnp.int32)
    )
    shape, segment, start = cache.shape, cache.segments[0], np.asarray([10**7 - 1, 10**7 + 1, 9_999_001], np.int32)
    assert (fused.kernel(cache, segment) is None) == (path == "reference")
    assert f"{path} in decode steps" in fused.explain(cache) or path == "reference"
    q = np.random.default_rng(1).standard_normal((3, 1, shape.kv_heads, 2, shape.head_dim)).astype(np.float32)

    @jax.jit
    def run(cache):
        qs = attention.queries(shape, jnp.asarray(q), jnp.asarray(start), jnp.asarray(start + 1))
        return attention.finish(sealed.attend_sealed(cache, cache.segments[0], jnp.int32(0), qs))[:, :, :, 0]

    expected = attend64(segment, q[:, 0] / np.sqrt(shape.head_dim), start[:, None] - cache.sinks)
    np.testing.assert_allclose(run(cache), expected, rtol=0, atol=2e-4)


def attend64(segment, q, position, theta=10000.0):
    """Attention of q `[B, K, G, H]` over all blocks of layer 0 in float64; position `[B, 1]` from their first token."""
    k, v = (np.asarray(dequantize(fmt, jnp.int32(0)), np.float64).swapaxes(1, 2) for fmt in fused.formats(segment))
    k, v = (x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in (k, v))
    half = q.shape[-1] // 2
    angle = (position - np.arange(k.shape[2]))[:, None, None, :, None] * theta ** -(np.arange(half) / half)
    turned = rotate(q[..., None, :].astype(np.float64), angle)
    scores = np.einsum("bkgth,bkth->bkgt", turned, k)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bkgt,bkth->bkgh", p / p.sum(-1, keepdims=True), v)
