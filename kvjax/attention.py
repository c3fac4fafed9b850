"""Attention over a compressed cache: sinks, sealed blocks and recent tokens as partial softmaxes, merged.

The reference here is plain jnp, decodes a chunk of blocks at a time and works for every codec; it is the definition.
Sealed blocks of a decode step are read by a kernel where `FAST` has one for the storage and the platform
(`kvjax.fused`); `explain` says which path each segment takes.

Which of a token's two faces a query sees (design.md section 3), for a query at position p_i and a token at p_j <= p_i:

    sinks                    always exact
    token-local codecs       as stored if p_j <= p_i - w (w = exact window; 0: every token, the query's own included)
    codecs over groups       as stored once the token's run of w tokens was full before the query's step (0: its block)
    attention="exact"        the tokens of this call see each other exactly, and earlier ones as above
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from kvjax.cache import KVCache, Segment
from kvjax.fused import FAST, explain
from kvjax.queries import (
    NewTokens,
    Queries,
    in_window,
    layer_inputs,
    new_tokens,
    queries,
    rotate_tokens,
    seen_stored,
)  # fmt: skip
from kvjax.sealed import CHUNK_TOKENS, attend_sealed
from kvjax.softmax import Partial, dense_partial, empty_partial, finish, merge, softmax_part
from kvjax.writing import span

__all__ = [
    "FAST", "NewTokens", "Partial", "Queries", "attend_layer", "dense_partial", "empty_partial", "explain", "finish",
    "layer_inputs", "merge", "new_tokens", "queries", "rotate_tokens",
]  # fmt: skip

Mode = Literal["exact", "cached"]
QUERY_CHUNK = 256  # queries of a long call that attend at a time


def attend_layer(
    cache: KVCache, segment: Segment, layer: Any, qs: Queries, new: NewTokens, mode: Mode
) -> tuple[jax.Array, jax.Array | None]:
    """Attention of one layer's queries over everything before them.

    Args:
      layer: index within the segment, traced or not.
      qs: queries; new: this call's keys and values, not yet written to the cache.
      mode: "cached": each token sees what a decode step at its position would; "exact": the call's tokens see each
        other uncompressed.

    Returns:
      `[B, S, K, G, H]` float32; and what was read, `[B, n]` float32, where the codecs are read in part, else None.
    """
    if segment.reads is not None:
        from kvjax import aligned  # made of the parts here

        part, counts = aligned.attend(cache, segment, layer, qs, new, mode)
        return finish(part).transpose(0, 3, 1, 2, 4), counts
    part = through_cache(cache, segment, layer, qs, new, mode)
    if mode == "exact":
        part = merge(part, this_call(cache, qs, new))
    return finish(part).transpose(0, 3, 1, 2, 4), None


def through_cache(cache: KVCache, segment: Segment, layer: Any, qs: Queries, new: NewTokens, mode: Mode) -> Partial:
    """What the queries see of the cache: sealed blocks, sinks and recent tokens; in "cached" mode this call's too."""
    part = attend_sealed(cache, segment, layer, qs)
    part = merge(part, sinks_partial(cache, segment, layer, qs, new, mode))
    return merge(part, _recent(cache, segment, layer, qs, new, mode))


def sinks_partial(cache: KVCache, segment: Segment, layer: Any, qs: Queries, new: NewTokens, mode: Mode) -> Partial:
    """The first tokens, exact; those of this call too, unless `this_call` sees them."""
    if not cache.sinks:
        return empty_partial(qs.raw)
    held, zeros = jnp.minimum(cache.length, cache.sinks), jnp.zeros_like(cache.length)
    k = span(segment.k_sinks[layer], new.k_stored, held, zeros, 0, cache.sinks)
    v = span(segment.v_sinks[layer], new.v, held, zeros, 0, cache.sinks)
    position = jnp.broadcast_to(jnp.arange(cache.sinks, dtype=jnp.int32)[None, :], (cache.batch, cache.sinks))
    if segment.k_codec.pre_rope:
        k = rotate_tokens(cache.shape, k, position, qs.total)
    end = cache.length + new.counts if mode == "cached" else cache.length
    visible = in_window(cache.shape, qs.position[:, :, None], position[:, None, :]) & (position < end[:, None])[:, None]
    return dense_partial(qs.rotated, k.astype(jnp.float32), v.astype(jnp.float32), visible)


def _recent(cache: KVCache, segment: Segment, layer: Any, qs: Queries, new: NewTokens, mode: Mode) -> Partial:
    """Tokens that wait to be sealed and, in "cached" mode, this call's: exact or as stored, by pair."""
    shape, T = cache.shape, cache.block
    start = cache.recent_start(cache.length)
    held = jnp.maximum(cache.length - start, 0)
    extra = new.v.shape[2] if mode == "cached" else 0
    count = -(-(T - 1 + cache.window + extra) // T) * T
    first_new = jnp.maximum(cache.sinks - cache.length, 0)
    end = cache.length + (new.counts if mode == "cached" else 0)
    position = start[:, None] + jnp.arange(count, dtype=jnp.int32)[None, :]
    query, token = qs.position[:, :, None], position[:, None, :]
    visible = in_window(shape, query, token) & (position < end[:, None])[:, None]
    still_frozen = jnp.arange(count)[None, :] < cache.frozen[:, None]

    def faces(name: str, x: jax.Array):
        """Tokens exact and as stored, `[B, K, count, H]` float32, and the mask of who sees which."""
        codec = getattr(segment, f"{name}_codec")
        params = jax.tree.map(lambda p: p[layer], getattr(segment, f"{name}_params"))
        exact = span(getattr(segment, f"{name}_recent")[layer], x, held, first_new, 0, count)
        blocks = exact.reshape(*exact.shape[:2], count // T, T, -1).swapaxes(1, 2)
        stored = codec.roundtrip(blocks, params).swapaxes(1, 2).reshape(exact.shape).astype(cache.dtype)
        if cache.reopens:
            stored = jnp.where(still_frozen[:, None, :, None], exact, stored)
        if name == "k" and codec.pre_rope:
            exact, stored = (rotate_tokens(shape, y, position, qs.total) for y in (exact, stored))
        mask = seen_stored(cache, codec, getattr(cache, f"{name}_window"), query, token)
        return exact.astype(jnp.float32), stored.astype(jnp.float32), mask

    k_exact, k_stored, k_mask = faces("k", new.k_stored)
    v_exact, v_stored, v_mask = faces("v", new.v)

    scores = jnp.einsum("bkgsh,bkth->bkgst", qs.rotated, k_stored, preferred_element_type=jnp.float32)
    if k_mask is not None:
        exact_scores = jnp.einsum("bkgsh,bkth->bkgst", qs.rotated, k_exact, preferred_element_type=jnp.float32)
        scores = jnp.where(k_mask[:, None, None], scores, exact_scores)
    p, top, total = softmax_part(scores, visible)
    if v_mask is None:
        acc = jnp.einsum("bkgst,bkth->bkgsh", p, v_stored, preferred_element_type=jnp.float32)
    else:
        p_stored = jnp.where(v_mask[:, None, None], p, 0.0)
        acc = jnp.einsum("bkgst,bkth->bkgsh", p_stored, v_stored, preferred_element_type=jnp.float32)
        acc = acc + jnp.einsum("bkgst,bkth->bkgsh", p - p_stored, v_exact, preferred_element_type=jnp.float32)
    return Partial(acc, top, total)


def this_call(cache: KVCache, qs: Queries, new: NewTokens) -> Partial:
    """The call's own tokens, uncompressed and causal."""
    first_query = (qs.position.min(1) - qs.call_start).max()  # the same in all rows
    return own_tokens(cache, qs, new.k_rotated, new.v, new.counts, first_query)


def own_tokens(
    cache: KVCache, qs: Queries, k: jax.Array, v: jax.Array, counts: jax.Array, first_query: Any, first_key: Any = 0
) -> Partial:
    """A run of the call's own tokens, uncompressed and causal, a chunk of keys at a time.

    Args:
      qs: queries of consecutive tokens.
      k, v: `[B, K, S, H]`, keys after RoPE and values, of consecutive tokens.
      counts: `[B]`, tokens of the call.
      first_query, first_key: numbers in the call of the first query and of the first key.
    """
    S = v.shape[2]
    size = min(CHUNK_TOKENS, S)
    ahead = first_query - first_key
    last = jnp.minimum((ahead + qs.position.shape[1] + size - 1) // size, -(-S // size))

    def body(chunk, part):
        start = jnp.minimum(chunk * size, S - size)
        ks, vs = (jax.lax.dynamic_slice_in_dim(x, start, size, axis=2).astype(jnp.float32) for x in (k, v))
        index = start + jnp.arange(size, dtype=jnp.int32)
        at = first_key + index
        valid = (at[None, :] < counts[:, None]) & (index >= chunk * size)[None, :]
        token = (qs.call_start[:, None] + at[None, :])[:, None, :]
        visible = valid[:, None] & in_window(cache.shape, qs.position[:, :, None], token)
        return merge(part, dense_partial(qs.rotated, ks, vs, visible))

    first = jnp.int32(0)
    if cache.shape.sliding_window is not None:
        first = jnp.maximum(ahead - cache.shape.sliding_window + 1, 0) // size
    return jax.lax.fori_loop(first, last, body, empty_partial(qs.raw))
