"""A Llama model over a compressed cache: the compiled functions behind `kvjax.decode`.

All of them consume the cache (its buffers are donated) and check nothing; `kvjax.decode` does.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from kvjax import attention, writing
from kvjax.cache import KVCache


def forward_chunk(model: Any, cache: KVCache, tokens: jax.Array, counts: jax.Array) -> tuple[jax.Array, KVCache]:
    """S tokens per row through all layers, each seeing what a decode step would: hidden states `[B, S, D]`.

    The cache is only read inside the scan over layers; the new keys and values leave it as outputs and are written
    once, so no loop carries the cache.
    """
    module = model.module()
    x = module.embed(tokens)
    new_k, new_v = [], []
    for segment in cache.segments:

        def body(x, layer, segment=segment):
            absolute = segment.first_layer + layer
            q, k, v = module.qkv(absolute, x)
            qs, new = attention.layer_inputs(cache, segment, q, k, v, counts)
            out = attention.attend_layer(cache, segment, layer, qs, new, "cached")
            return module.finish(absolute, x, out.astype(x.dtype)), (new.k_stored, new.v)

        x, (k, v) = jax.lax.scan(body, x, jnp.arange(segment.layers, dtype=jnp.int32))
        new_k.append(k)
        new_v.append(v)
    return x, writing.write(cache, jnp.concatenate(new_k), jnp.concatenate(new_v), counts)


@functools.partial(jax.jit, donate_argnames="cache")
def step(model, cache, token, counts):
    x, cache = forward_chunk(model, cache, token[:, None], counts)
    return model.module().logits(x[:, 0]), cache


@functools.partial(jax.jit, donate_argnames="cache")
def score(model, cache, tokens):
    ones = jnp.ones((cache.batch,), jnp.int32)

    def body(cache, token):
        x, cache = forward_chunk(model, cache, token[:, None], ones)
        return cache, model.module().logits(x[:, 0])

    cache, logits = jax.lax.scan(body, cache, tokens.T)
    return logits.swapaxes(0, 1), cache


@functools.partial(jax.jit, donate_argnames="cache")
def prefill_cached(model, cache, tokens, counts):
    """A chunk of tokens at a time through all layers."""
    batch, width = tokens.shape
    size = min(cache.block, width)
    tokens = jnp.pad(tokens, ((0, 0), (0, -width % size)))

    def body(chunk, carry):
        cache, last = carry
        here = jnp.clip(counts - chunk * size, 0, size)
        x, cache = forward_chunk(model, cache, jax.lax.dynamic_slice_in_dim(tokens, chunk * size, size, axis=1), here)
        at_end = _rows(x, jnp.maximum(here - 1, 0))
        return cache, jnp.where((here > 0)[:, None], at_end, last)

    module = model.module()
    last = jnp.zeros((batch, model.config.width), module.embed(tokens[:, :1]).dtype)
    cache, last = jax.lax.fori_loop(0, (counts.max() + size - 1) // size, body, (cache, last))
    return module.logits(last), cache


@functools.partial(jax.jit, donate_argnames="cache")
def prefill_exact(model, cache, tokens, counts):
    """Layer by layer over the whole call, with everything but hidden states and one layer's K/V in chunks."""
    module = model.module()
    size = min(attention.QUERY_CHUNK, tokens.shape[1])
    chunks = (counts.max() + size - 1) // size
    x = module.embed(tokens)
    segments = []
    for segment in cache.segments:

        def body(layer, carry):
            x, segment = carry
            x, new = _exact_layer(module, cache, segment, layer, x, counts, size, chunks)
            return x, writing.write_layer(cache, segment, layer, new.k_stored, new.v, counts)

        x, segment = jax.lax.fori_loop(0, segment.layers, body, (x, segment))
        segments.append(segment)
    cache = writing.advance_lengths(dataclasses.replace(cache, segments=tuple(segments)), counts)
    return module.logits(_rows(x, counts - 1)), cache


def _exact_layer(module, cache, segment, layer, x, counts, size, chunks):
    """One layer over `x[B, S, D]`: all keys and values first, then attention and MLP, `size` tokens at a time."""
    absolute = segment.first_layer + layer
    total = cache.length + counts
    B, S, _ = x.shape
    empty = jnp.zeros((B, cache.shape.kv_heads, S, cache.shape.head_dim), cache.dtype)
    pre_rope = segment.k_codec.pre_rope

    def part(x, chunk):
        return module.qkv(absolute, jax.lax.dynamic_slice_in_dim(x, chunk * size, size, axis=1))

    def project(chunk, buffers):
        _, k, v = part(x, chunk)
        start = cache.length + chunk * size
        new = attention.new_tokens(cache.shape, segment.k_codec, k, v, start, total - start, cache.dtype)
        parts = (new.k_rotated, new.v, new.k_stored) if pre_rope else (new.k_rotated, new.v)
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(b, p, chunk * size, axis=2) for b, p in zip(buffers, parts, strict=True)
        )

    k_rotated, v, *k_stored = jax.lax.fori_loop(0, chunks, project, (empty,) * (3 if pre_rope else 2))
    new = attention.NewTokens(k_stored[0] if pre_rope else k_rotated, k_rotated, v, counts)

    def attend(chunk, x):
        q, _, _ = part(x, chunk)
        qs = attention.queries(cache.shape, q, cache.length, total, offset=chunk * size)
        out = attention.attend_layer(cache, segment, layer, qs, new, "exact")
        here = jax.lax.dynamic_slice_in_dim(x, chunk * size, size, axis=1)
        here = module.finish(absolute, here, out.astype(x.dtype))
        return jax.lax.dynamic_update_slice_in_dim(x, here, chunk * size, axis=1)

    return jax.lax.fori_loop(0, chunks, attend, x), new


def _rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """`x[b, index[b]]` of `x[B, S, D]`."""
    return jnp.take_along_axis(x, index[:, None, None], axis=1)[:, 0]
