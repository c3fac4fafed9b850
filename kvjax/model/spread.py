"""Prefill on a mesh whose axis `seq` is not 1: the tokens of the call are spread over it too.

The call's tokens are cut into chunks of C, and each chunk over the P devices of `seq`: device d has tokens
c * C + d * C/P ... of chunk c. So every device has early and late tokens, causal work is even, and what a device holds
of a call of S tokens is S/P hidden states and S/P keys and values of one layer. Projections and MLP see a device's own
tokens only. A chunk of queries meets the chunks of keys before it one after the other: the devices exchange the raw
keys and values of one chunk (an all-gather, which runs as a ring), and each attends with its own queries (blockwise
attention and its exchange, arXiv 2310.01889, section 3; the even cut, striped attention, arXiv 2311.09431, section 3).
Temporaries do not depend on S.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kvjax import attention, striped
from kvjax.attention import NewTokens, Partial
from kvjax.cache import KVCache, Segment
from kvjax.striped import SpreadTokens

CHUNK = 8192  # tokens of a chunk, at most: bounds the queries that every device holds while sealed blocks are read


def chunk_tokens(cache: KVCache, tokens: int, per_device: int, at_most: int = CHUNK) -> int:
    """C for a call of so many tokens: a multiple of P."""
    P_ = cache.stripes
    return P_ * max(1, min(per_device, at_most // P_, -(-tokens // P_)))


def split(cache: KVCache, x: jax.Array, axis: int) -> jax.Array:
    """`x[B, ...]` with an axis of tokens split over `seq`; as it is without a mesh."""
    return _place(cache, x, "data", *(None,) * (axis - 1), "seq")


def whole(cache: KVCache, x: jax.Array, heads: int) -> jax.Array:
    """Keys or values `[B, ...]`, heads on axis `heads`, with all tokens on every device of `seq`."""
    return _place(cache, x, "data", *(None,) * (heads - 1), "tensor")


def _place(cache: KVCache, x: jax.Array, *axes: str | None) -> jax.Array:
    if cache.mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(cache.mesh, P(*axes)))


def exact_layer(
    module: Any, cache: KVCache, segment: Segment, layer: Any, absolute: Any, x: jax.Array, counts: jax.Array
) -> tuple[jax.Array, NewTokens]:
    """One layer of prefill with attention "exact" over `x[B, n, C, D]`, C split over `seq`.

    Returns:
      the layer's output, and its keys and values as `SpreadTokens`.
    """
    B, n, C, _ = x.shape
    mesh = cache.mesh
    assert mesh is not None
    total = cache.length + counts
    pre_rope = segment.k_codec.pre_rope
    chunks = (counts.max() + C - 1) // C

    def project(chunk, buffers):
        _, k, v = module.qkv(absolute, x[:, chunk])
        start = cache.length + chunk * C
        new = attention.new_tokens(cache.shape, segment.k_codec, k, v, start, total - start, cache.dtype)
        parts = (new.k_rotated, new.v, new.k_stored) if pre_rope else (new.k_rotated, new.v)
        return tuple(
            _tokens(cache, jax.lax.dynamic_update_index_in_dim(b, p, chunk, axis=2)) for b, p in zip(buffers, parts)
        )

    empty = _tokens(cache, jnp.zeros((B, cache.shape.kv_heads, n, C, cache.shape.head_dim), cache.dtype))
    k, v, *k_stored = jax.lax.fori_loop(0, chunks, project, (empty,) * (3 if pre_rope else 2))
    # Sinks and recent tokens are all there is of earlier calls besides sealed blocks; this call's are seen below.
    none = jnp.zeros((B, cache.shape.kv_heads, 1, cache.shape.head_dim), cache.dtype)
    nothing = NewTokens(none, None, none, jnp.zeros_like(counts))

    def attend(chunk, x):
        here = x[:, chunk]
        q, _, _ = module.qkv(absolute, here)
        qs = attention.queries(cache.shape, q, cache.length, total, offset=chunk * C)
        part = jax.lax.cond(
            cache.length.max() > 0,
            lambda: attention.through_cache(cache, segment, layer, qs, nothing, "exact"),
            lambda: attention.empty_partial(qs.raw),
        )
        part = attention.merge(part, _this_call(cache, qs, k, v, counts, chunk))
        out = attention.finish(part).transpose(0, 3, 1, 2, 4)
        here = module.finish(absolute, here, out.astype(x.dtype))
        return split(cache, jax.lax.dynamic_update_index_in_dim(x, here, chunk, axis=1), axis=2)

    x = jax.lax.fori_loop(0, chunks, attend, x)
    stored = k_stored[0] if pre_rope else k
    return x, NewTokens(SpreadTokens(stored, mesh), None, SpreadTokens(v, mesh), counts)


def _tokens(cache: KVCache, x: jax.Array) -> jax.Array:
    return _place(cache, x, "data", "tensor", None, "seq")


def embed(module: Any, cache: KVCache, tokens: jax.Array, chunk: int) -> jax.Array:
    """Hidden states `[B, n, C, D]` of `tokens[B, S]`, padded to whole chunks."""
    tokens = jnp.pad(tokens, ((0, 0), (0, -tokens.shape[1] % chunk)))
    x = striped.embed(module, cache.mesh, tokens.reshape(tokens.shape[0], -1, chunk), seq_axis=2)
    return split(cache, x, axis=2)


def last_rows(cache: KVCache, x: jax.Array, counts: jax.Array) -> jax.Array:
    """The hidden state `[B, D]` of each row's last token, of `x[B, n, C, D]`."""
    assert cache.mesh is not None
    return SpreadTokens(x[:, None], cache.mesh).take(counts[:, None] - 1)[:, 0, 0]


def _this_call(cache: KVCache, qs: Any, k: jax.Array, v: jax.Array, counts: jax.Array, chunk: Any) -> Partial:
    """The call's own tokens, uncompressed and causal, of the chunks up to that of the queries."""
    C = k.shape[3]

    def of_chunk(i, part):
        keys, values = (
            whole(cache, jax.lax.dynamic_index_in_dim(x, i, axis=2, keepdims=False), heads=1) for x in (k, v)
        )
        return attention.merge(part, attention.own_tokens(cache, qs, keys, values, counts, chunk * C, i * C))

    first = jnp.int32(0)
    if cache.shape.sliding_window is not None:
        first = jnp.maximum(chunk * C - cache.shape.sliding_window + 1, 0) // C
    return jax.lax.fori_loop(first, chunk + 1, of_chunk, attention.empty_partial(qs.raw))
