"""Queries, keys and values of a call as attention takes them, and which token a query sees, exact or as stored."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.cache import CacheShape, KVCache, Segment
from kvjax.codecs.base import AbstractCodec, Leaf
from kvjax.model.rope import cos_sin, rotate


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Queries:
    """Queries of one layer with what every part of the cache needs of them.

    Attributes:
      raw: `[B, K, G, S, H]` float32, before RoPE, times 1/sqrt(H).
      rotated: as `raw`, after RoPE at `position`.
      position: `[B, S]` int32.
      total: `[B]` int32, tokens of the row after this call (dynamic RoPE depends on it).
      call_start: `[B]` int32, tokens of the row before this call.
    """

    raw: Leaf
    rotated: Leaf
    position: Leaf
    total: Leaf
    call_start: Leaf


def queries(shape: CacheShape, q: jax.Array, call_start: jax.Array, total: jax.Array, offset: Any = 0) -> Queries:
    """Prepares q `[B, S, K, G, H]` (before RoPE), the call's tokens `offset .. offset + S`."""
    raw = q.astype(jnp.float32).transpose(0, 2, 3, 1, 4) * (shape.head_dim**-0.5)
    position = call_start[:, None] + offset + jnp.arange(q.shape[1], dtype=jnp.int32)[None, :]
    cos, sin = cos_sin(shape.rope, position, total[:, None])
    return Queries(raw, rotate(raw, cos[:, None, None], sin[:, None, None]), position, total, call_start)


def rotate_tokens(shape: CacheShape, k: jax.Array, position: jax.Array, total: jax.Array) -> jax.Array:
    """RoPE on k `[B, K, t, H]` at `position[B, t]`, in k's type."""
    cos, sin = cos_sin(shape.rope, position, total[:, None])
    return rotate(k, cos[:, None], sin[:, None])


def in_window(shape: CacheShape, query: jax.Array, token: jax.Array) -> jax.Array:
    """Causal and sliding-window mask of positions that broadcast against each other."""
    visible = token <= query
    return visible if shape.sliding_window is None else visible & (query - token < shape.sliding_window)


def seen_stored(
    cache: KVCache, codec: AbstractCodec, window: int, query: jax.Array, token: jax.Array
) -> jax.Array | None:
    """Mask of the pairs where the query sees the token as stored; None where it always does."""
    if codec.token_local:
        return None if window == 0 else token <= query - window
    run = window or cache.block
    full_at = ((token - cache.sinks) // run + 1) * run + cache.sinks
    return full_at <= query


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NewTokens:
    """Keys and values of a call, `[B, K, S, H]`, of which `counts[B]` count.

    Attributes:
      k_stored: keys as the codec stores them: before RoPE if its `pre_rope`, else after.
      k_rotated: keys after RoPE ("exact" attention reads them; may be None in "cached").
      v: values.
      counts: `[B]` int32.
    """

    k_stored: Leaf
    k_rotated: Leaf
    v: Leaf
    counts: Leaf


def new_tokens(
    shape: CacheShape,
    codec: AbstractCodec,
    k: jax.Array,
    v: jax.Array,
    start: jax.Array,
    counts: jax.Array,
    dtype: Any,
) -> NewTokens:
    """From k (before RoPE) and v, both `[B, S, K, H]`."""
    k, v = k.astype(dtype).transpose(0, 2, 1, 3), v.astype(dtype).transpose(0, 2, 1, 3)
    position = start[:, None] + jnp.arange(k.shape[2], dtype=jnp.int32)[None, :]
    rotated = rotate_tokens(shape, k, position, start + counts)
    return NewTokens(k if codec.pre_rope else rotated, rotated, v, counts)


def layer_inputs(
    cache: KVCache, segment: Segment, q: jax.Array, k: jax.Array, v: jax.Array, counts: jax.Array
) -> tuple[Queries, NewTokens]:
    """What `attend_layer` takes, from a layer's q `[B, S, K, G, H]`, k and v `[B, S, K, H]`, all before RoPE."""
    shape = cache.shape
    qs = queries(shape, q, cache.length, cache.length + counts)
    return qs, new_tokens(shape, segment.k_codec, k, v, cache.length, counts, cache.dtype)
