"""A Llama model over a compressed cache: the compiled functions behind `kvjax.decode`.

All of them consume the cache (its buffers are donated) and check nothing; `kvjax.decode` does.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from kvjax import attention, sharding, striped, writing
from kvjax.cache import KVCache, Segment
from kvjax.model import spread
from kvjax.reads import FIELDS
from kvjax.targets import split


def forward_chunk(model: Any, cache: KVCache, tokens: jax.Array, counts: jax.Array) -> tuple[jax.Array, KVCache]:
    """S tokens per row through all layers, each seeing what a decode step would: hidden states `[B, S, D]`.

    The cache is only read inside the scan over layers; the new keys and values leave it as outputs and are written
    once, so no loop carries the cache.
    """
    module = model.module()
    shared = tokens.shape[1] > 1 and tokens.shape[1] % cache.stripes == 0

    def body(x, absolute, pick):
        def attend(segment, layer, q, k, v):
            if shared:
                k, v = (spread.whole(cache, y, heads=2) for y in (k, v))
            qs, new = attention.layer_inputs(cache, segment, q, k, v, counts)
            out, reads = attention.attend_layer(cache, segment, layer, qs, new, "cached")
            if counting and reads is None:
                reads = jnp.zeros((cache.batch, len(FIELDS)), jnp.float32)
            return out, (new.k_stored, new.v, reads)

        out, new = pick(attend, *module.qkv(absolute, x))
        return module.finish(absolute, x, out.astype(x.dtype)), new

    counting = any(segment.reads is not None for segment in cache.segments)
    x = striped.embed(module, cache.mesh, tokens, seq_axis=1 if shared else None)
    x, (k, v, reads) = _scan_layers(cache.segments, body, spread.split(cache, x, axis=1) if shared else x)
    if counting:
        cache = dataclasses.replace(cache, segments=tuple(_counted(segment, reads) for segment in cache.segments))
    return x, sharding.constrain(writing.write(cache, k, v, counts))


def _counted(segment: Segment, reads: jax.Array) -> Segment:
    """The segment with what its layers read, of `reads[L, B, n]`, added to its counters."""
    if segment.reads is None:
        return segment
    return dataclasses.replace(segment, reads=segment.reads + writing.take_layers(reads, segment.layer_ids))


def _scan_layers(segments: tuple[Segment, ...], body: Any, x: Any) -> tuple[Any, Any]:
    """`lax.scan` of `body(x, layer, pick) -> x, out` over all layers; `pick(f, ...)` is `f(segment, index in it, ...)`.

    Segments of consecutive layers are scanned one after the other. Where layers alternate between codec pairs, one
    scan picks the segment with `lax.switch`: compile time follows the number of pairs, not that of changes.
    """
    if _in_order(segments):
        outs = []
        for segment in segments:

            def of_segment(x, layer, segment=segment):
                return body(x, segment.layer_ids[0] + layer, lambda f, *args: f(segment, layer, *args))

            x, out = jax.lax.scan(of_segment, x, jnp.arange(segment.layers, dtype=jnp.int32))
            outs.append(out)
        return x, jax.tree.map(lambda *parts: jnp.concatenate(parts), *outs)

    def of_any(x, row):
        which, at, layer = row

        def pick(f, *args):
            return jax.lax.switch(which, [functools.partial(f, segment) for segment in segments], at, *args)

        return body(x, layer, pick)

    return jax.lax.scan(of_any, x, _table(segments))


def _in_order(segments: tuple[Segment, ...]) -> bool:
    ids = [i for segment in segments for i in segment.layer_ids]
    return ids == list(range(len(ids)))


def _table(segments: tuple[Segment, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of each layer of the model: its segment, its index in it, and its own number; `[L]` int32 each."""
    rows = sorted((i, n, at) for n, segment in enumerate(segments) for at, i in enumerate(segment.layer_ids))
    layer, which, at = jnp.asarray(rows, jnp.int32).T
    return which, at, layer


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
    size = spread.chunk_tokens(cache, width, cache.block, at_most=4096)
    tokens = jnp.pad(tokens, ((0, 0), (0, -width % size)))

    def body(chunk, carry):
        cache, last = carry
        here = jnp.clip(counts - chunk * size, 0, size)
        x, cache = forward_chunk(model, cache, jax.lax.dynamic_slice_in_dim(tokens, chunk * size, size, axis=1), here)
        at_end = _rows(x, jnp.maximum(here - 1, 0))
        return cache, jnp.where((here > 0)[:, None], at_end, last)

    module = model.module()
    last = jnp.zeros((batch, model.config.width), model.dtype)
    cache, last = jax.lax.fori_loop(0, (counts.max() + size - 1) // size, body, (cache, last))
    return module.logits(last), cache


@functools.partial(jax.jit, donate_argnames="cache")
def prefill_exact(model, cache, tokens, counts):
    """Layer by layer over the whole call, with everything but hidden states and one layer's K/V in chunks."""
    module = model.module()
    size = spread.chunk_tokens(cache, tokens.shape[1], attention.QUERY_CHUNK)
    chunks = (counts.max() + size - 1) // size
    x = spread.embed(module, cache, tokens, size) if cache.stripes > 1 else striped.embed(module, cache.mesh, tokens)

    def attend(x, segment, layer, absolute):
        if cache.stripes > 1:
            return spread.exact_layer(module, cache, segment, layer, absolute, x, counts)
        return _exact_layer(module, cache, segment, layer, absolute, x, counts, size, chunks)

    def write(segment, layer, new):
        return writing.write_layer(cache, segment, layer, new.k_stored, new.v, counts)

    if _in_order(cache.segments):
        segments = []
        for segment in cache.segments:

            def body(layer, carry, first=segment.layer_ids[0]):
                x, segment = carry
                x, new = attend(x, segment, layer, first + layer)
                x, new, segment = _read_first(cache, (x, new, segment))
                return x, write(segment, layer, new)

            x, segment = jax.lax.fori_loop(0, segment.layers, body, (x, segment))
            segments.append(segment)
    else:
        x, segments = _alternate(cache, attend, write, x)
    cache = writing.advance_lengths(dataclasses.replace(cache, segments=tuple(segments)), counts)
    last = _rows(x, counts - 1) if cache.stripes == 1 else spread.last_rows(cache, x, counts)
    return module.logits(last), sharding.constrain(cache)


def _alternate(cache: KVCache, attend: Any, write: Any, x: jax.Array) -> tuple[jax.Array, list[Segment]]:
    """Layers in order where they alternate between segments: attention reads one of them, then that one is written."""
    table = _table(cache.segments)

    def body(i, carry):
        x, segments = carry
        which, at, absolute = (column[i] for column in table)
        branches = [
            functools.partial(lambda n, x, segments, *at: attend(x, segments[n], *at), n) for n in range(len(segments))
        ]
        x, new = jax.lax.switch(which, branches, x, segments, at, absolute)
        x, new, segments = _read_first(cache, (x, new, segments))
        # A loop of one turn or none: unlike the branch of a conditional it updates the cache in place.
        return x, [
            jax.lax.fori_loop(0, (which == n).astype(jnp.int32), lambda _, s: write(s, at, new), segment)
            for n, segment in enumerate(segments)
        ]

    return jax.lax.fori_loop(0, len(table[0]), body, (x, list(cache.segments)))


def _read_first(cache: KVCache, x: Any) -> Any:
    """`x`: hidden states, new tokens and the segments, with all reading of the cache before what follows.

    Without it XLA on CPU copies the whole cache twice per layer. On TPU hidden states and new tokens alone pass the
    barrier, to be as late as attention: the cache would change its layout there.
    """
    if split(cache.target)[0] == "tpu":
        return (*jax.lax.optimization_barrier(x[:2]), x[2])
    return jax.lax.optimization_barrier(x)


def _exact_layer(module, cache, segment, layer, absolute, x, counts, size, chunks):
    """One layer over `x[B, S, D]`: all keys and values first, then attention and MLP, `size` tokens at a time."""
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
        out, _ = attention.attend_layer(cache, segment, layer, qs, new, "exact")
        here = jax.lax.dynamic_slice_in_dim(x, chunk * size, size, axis=1)
        here = module.finish(absolute, here, out.astype(x.dtype))
        return jax.lax.dynamic_update_slice_in_dim(x, here, chunk * size, axis=1)

    return jax.lax.fori_loop(0, chunks, attend, x), new


def _rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """`x[b, index[b]]` of `x[B, S, D]`."""
    return jnp.take_along_axis(x, index[:, None, None], axis=1)[:, 0]
