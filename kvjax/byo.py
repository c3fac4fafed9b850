"""Bring your own model: a compressed cache behind any attention layer.

Per layer `append` the new keys and values (before RoPE: the cache rotates where its codec wants it), then `attend`;
once after the last layer `advance`. Nothing is consumed; donate the cache at your own outermost jit.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import attention as _attention
from kvjax import checks
from kvjax import writing as _writing
from kvjax.cache import KVCache


def append(cache: KVCache, layer: Any, k: jax.Array, v: jax.Array, counts: Any = None) -> KVCache:
    """Adds new tokens of one layer; they are seen by `attend` and stored by `advance`.

    Until `advance` the tokens of all layers wait exactly in `cache.pending`. Its token axis is S: inside a `scan` or
    `while_loop` over calls every call must have the same S (1 after `init_cache`).

    Args:
      layer: index in the model, traced or not.
      k, v: `[B, S, K, H]`; k before RoPE.
      counts: `[B]`, how many of the S tokens each row takes, 0 to S; the same as in `attend` and `advance`.

    Raises:
      ValueError: for a layer that is not there, and for other shapes.
    """
    shape = cache.shape
    wanted = (cache.batch, k.shape[1], shape.kv_heads, shape.head_dim)
    for name, x in (("k", k), ("v", v)):
        if x.shape != wanted:
            raise ValueError(f"`{name}` of shape {x.shape} must be [B, S, K, H] = {wanted}, the cache's.")
    checks.layer(cache, layer)
    checks.counts(cache, counts, k.shape[1])
    pending = []
    for held, x in zip(cache.pending, (k, v), strict=True):
        x = x.astype(held.dtype).transpose(0, 2, 1, 3)
        if held.shape[3] != x.shape[2]:
            held = jnp.zeros((*held.shape[:3], x.shape[2], held.shape[4]), held.dtype)
        pending.append(held.at[layer].set(x))
    return dataclasses.replace(cache, pending=(pending[0], pending[1]))


def attend(
    cache: KVCache, layer: Any, q: jax.Array, counts: Any = None, attention: _attention.Mode = "cached"
) -> jax.Array:
    """Causal attention of the appended tokens over the cache and themselves.

    Args:
      layer: index in the model; traced only where all layers share one codec pair.
      q: `[B, S, K*G, H]` before RoPE; head h reads kv head h // G.
      counts: as in `append`.
      attention: "cached": each token sees what a decode step at its position would see; "exact": the appended tokens
        see each other uncompressed.

    Returns:
      `[B, S, K*G, H]` in q's type; rows beyond `counts` are arbitrary.
    """
    return _attend_layer(cache, layer, q, counts, attention)[0]


def attend_and_count(
    cache: KVCache, layer: Any, q: jax.Array, counts: Any = None, attention: _attention.Mode = "cached"
) -> tuple[jax.Array, KVCache]:
    """`attend`, and the cache with what was read added to its counters, for `kvjax.decode.bits_read`.

    Only methods that are read in part (AlignedKV) count; the others' caches come back as they are.
    """
    out, index, at, reads = _attend_layer(cache, layer, q, counts, attention)
    if reads is None:
        return out, cache
    segment = cache.segments[index]
    counted = dataclasses.replace(segment, reads=segment.reads.at[at].add(reads))
    segments = (*cache.segments[:index], counted, *cache.segments[index + 1 :])
    return out, dataclasses.replace(cache, segments=segments)


def _attend_layer(
    cache: KVCache, layer: Any, q: jax.Array, counts: Any, attention: _attention.Mode
) -> tuple[jax.Array, int, Any, jax.Array | None]:
    """The output, the segment's index, the layer's index in it, and what was read."""
    checks.mode(attention)
    checks.layer(cache, layer)
    shape = cache.shape
    wanted = (cache.batch, cache.pending[0].shape[3], shape.q_heads, shape.head_dim)
    if q.shape != wanted:
        raise ValueError(f"`q` of shape {q.shape} must be [B, S, K*G, H] = {wanted}, as appended.")
    counts = checks.counts(cache, counts, q.shape[1])
    index = _segment_of(cache, layer)
    ids = cache.segments[index].layer_ids
    at = layer if isinstance(layer, jax.core.Tracer) else ids.index(int(layer))  # one segment: they are the same
    out, reads = _attend(cache, index, jnp.asarray(at), jnp.asarray(layer), q, counts, attention)
    return out, index, at, reads


def advance(cache: KVCache, counts: Any = None) -> KVCache:
    """Stores what was appended to all layers: moves the lengths and seals full blocks.

    Args:
      counts: `[B]`, as in `append`; None for all S tokens.

    Raises:
      ValueError: for counts beyond S, and where a row would overrun its capacity. Under a trace that row is left as it
        is and the tokens are counted in `kvjax.decode.statistics`.
    """
    counts = checks.counts(cache, counts, cache.pending[0].shape[3])
    checks.room(cache, counts)
    return _advance(cache, counts)


def _segment_of(cache: KVCache, layer: Any) -> int:
    """Index of the segment that holds a layer of the model."""
    if len(cache.segments) == 1:
        return 0
    if isinstance(layer, jax.core.Tracer):
        raise ValueError(
            f"`layer` is traced, but the cache has {len(cache.segments)} segments of different codecs; "
            "pass a Python integer, or scan within a segment."
        )
    return next(index for index, segment in enumerate(cache.segments) if int(layer) in segment.layer_ids)


@functools.partial(jax.jit, static_argnames=("index", "mode"))
def _attend(cache, index, at, layer, q, counts, mode):
    segment, shape = cache.segments[index], cache.shape
    B, S, _, H = q.shape
    k, v = (jnp.take(x, layer, axis=0).swapaxes(1, 2) for x in cache.pending)
    q_grouped = q.reshape(B, S, shape.kv_heads, -1, H)
    qs, new = _attention.layer_inputs(cache, segment, q_grouped, k, v, counts)
    out, reads = _attention.attend_layer(cache, segment, at, qs, new, mode)
    return out.reshape(q.shape).astype(q.dtype), reads


@jax.jit
def _advance(cache, counts):
    position = cache.length[:, None] + jnp.arange(cache.pending[0].shape[3], dtype=jnp.int32)[None, :]
    k, v = cache.pending
    pre_rope = np.zeros(cache.shape.layers, bool)
    for segment in cache.segments:
        pre_rope[list(segment.layer_ids)] = segment.k_codec.pre_rope
    if not pre_rope.all():
        rotated = jax.vmap(lambda k: _attention.rotate_tokens(cache.shape, k, position, cache.length + counts))(k)
        k = jnp.where(pre_rope[:, None, None, None, None], k, rotated) if pre_rope.any() else rotated
    return _writing.write(cache, k, v, counts)
