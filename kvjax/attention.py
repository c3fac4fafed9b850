"""Attention over a compressed cache: sinks, sealed blocks and recent tokens as partial softmaxes, merged.

The reference here is plain jnp, decodes a chunk of blocks at a time and works for every codec; it is the definition.
Sealed blocks of a decode step are read by a kernel where `FAST` has one for the storage and the platform
(`kvjax.fused`); `explain` says which path each segment takes.

Which of a token's two faces a query sees (design.md section 3), for a query at position p_i and a token at p_j <= p_i:

    sinks                    always exact
    token-local codecs       as stored if p_j <= p_i - w (w = exact window; 0: every token, the query's own included)
    codecs over groups       as stored once the token's run of w tokens was full before the query's step (0: its block)
    attention="exact"        the tokens of this call see each other exactly, and earlier ones as above

RoPE for keys stored before it: scores of a block are (R(p_i - base) q) . (R(t) k_t), so the key side needs one table of
T rows for all blocks (KVQuant's on-the-fly rotation, arXiv 2401.18079 section 3.2, made tile-relative).
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from kvjax import fused, striped
from kvjax.cache import CacheShape, KVCache, Segment
from kvjax.codecs.base import AbstractCodec, Leaf
from kvjax.fused import FAST, explain
from kvjax.model.rope import cos_sin, rotate
from kvjax.striped import Stripe
from kvjax.writing import row_major, span

__all__ = [
    "FAST", "NewTokens", "Partial", "Queries", "attend_layer", "dense_partial", "empty_partial", "explain", "finish",
    "layer_inputs", "merge", "new_tokens", "queries", "rotate_tokens",
]  # fmt: skip

Mode = Literal["exact", "cached"]
_EMPTY = -1e30  # finite: the maximum of no scores; exp(_EMPTY - _EMPTY) is masked, never NaN
CHUNK_TOKENS = 512  # sealed tokens decoded at a time: what fits a core's cache
QUERY_CHUNK = 256  # queries of a long call that attend at a time


class Partial(NamedTuple):
    """Softmax attention over some of the tokens, not yet normalised; float32.

    Attributes:
      acc: `[B, K, G, S, H]`, sum of exp(score - max) * value.
      max: `[B, K, G, S]`, the largest score, or -1e30 where there is none.
      sum: `[B, K, G, S]`, sum of exp(score - max).
    """

    acc: jax.Array
    max: jax.Array
    sum: jax.Array


def empty_partial(q: jax.Array) -> Partial:
    """The neutral element of `merge`, for queries `[B, K, G, S, H]`."""
    return Partial(jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:-1], _EMPTY), jnp.zeros(q.shape[:-1]))


def merge(a: Partial, b: Partial) -> Partial:
    """Attention over the union of two disjoint sets of tokens. Associative and commutative."""
    top = jnp.maximum(a.max, b.max)
    wa, wb = jnp.exp(a.max - top), jnp.exp(b.max - top)
    return Partial(a.acc * wa[..., None] + b.acc * wb[..., None], top, a.sum * wa + b.sum * wb)


def finish(partial: Partial) -> jax.Array:
    """The attention output `[B, K, G, S, H]`; zeros where no token was visible."""
    return partial.acc / jnp.maximum(partial.sum, 1e-30)[..., None]


def _softmax_part(scores: jax.Array, visible: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Unnormalised weights of `scores[B, K, G, S, t]` under `visible[B, S, t]`, their maximum and sum."""
    visible = visible[:, None, None]
    top = jnp.where(visible, scores, _EMPTY).max(-1)
    p = jnp.where(visible, jnp.exp(scores - top[..., None]), 0.0)
    return p, top, p.sum(-1)


def dense_partial(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> Partial:
    """Attention over exact tokens: q `[B, K, G, S, H]` scaled and rotated, k, v `[B, K, t, H]`, visible `[B, S, t]`."""
    scores = jnp.einsum("bkgsh,bkth->bkgst", q, k, preferred_element_type=jnp.float32)
    p, top, total = _softmax_part(scores, visible)
    return Partial(jnp.einsum("bkgst,bkth->bkgsh", p, v, preferred_element_type=jnp.float32), top, total)


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


def _in_window(shape: CacheShape, query: jax.Array, token: jax.Array) -> jax.Array:
    """Causal and sliding-window mask of positions that broadcast against each other."""
    visible = token <= query
    return visible if shape.sliding_window is None else visible & (query - token < shape.sliding_window)


def _seen_stored(
    cache: KVCache, codec: AbstractCodec, window: int, query: jax.Array, token: jax.Array
) -> jax.Array | None:
    """Mask of the pairs where the query sees the token as stored; None where it always does."""
    if codec.token_local:
        return None if window == 0 else token <= query - window
    run = window or cache.block
    full_at = ((token - cache.sinks) // run + 1) * run + cache.sinks
    return full_at <= query


def attend_layer(
    cache: KVCache, segment: Segment, layer: Any, qs: Queries, new: "NewTokens", mode: Mode
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
        part = merge(part, _this_call(cache, qs, new))
    return finish(part).transpose(0, 3, 1, 2, 4), None


def through_cache(cache: KVCache, segment: Segment, layer: Any, qs: Queries, new: "NewTokens", mode: Mode) -> Partial:
    """What the queries see of the cache: sealed blocks, sinks and recent tokens; in "cached" mode this call's too."""
    part = _sealed(cache, segment, layer, qs)
    part = merge(part, _sinks(cache, segment, layer, qs, new, mode))
    return merge(part, _recent(cache, segment, layer, qs, new, mode))


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
) -> "tuple[Queries, NewTokens]":
    """What `attend_layer` takes, from a layer's q `[B, S, K, G, H]`, k and v `[B, S, K, H]`, all before RoPE."""
    shape = cache.shape
    qs = queries(shape, q, cache.length, cache.length + counts)
    return qs, new_tokens(shape, segment.k_codec, k, v, cache.length, counts, cache.dtype)


def _sealed(cache: KVCache, segment: Segment, layer: Any, qs: Queries) -> Partial:
    """The sealed blocks, on a mesh by the devices that own them."""
    return striped.attend(_own_blocks, cache, segment, layer, qs)


def _own_blocks(cache: KVCache, segment: Segment, layer: Any, qs: Queries, stripe: Stripe) -> Partial:
    """One device's sealed blocks: by a kernel for one query per row where there is one, else by the reference."""
    kernel = fused.kernel(cache, segment) if qs.raw.shape[3] == 1 else None
    if kernel is None:
        return _in_chunks(cache, segment, layer, qs, stripe)
    part = kernel(layer, qs.raw[..., 0, :], qs.rotated[..., 0, :], qs.position[:, 0], stripe)
    return Partial(part.acc[..., None, :], part.max[..., None], part.sum[..., None])


def _in_chunks(cache: KVCache, segment: Segment, layer: Any, qs: Queries, stripe: Stripe) -> Partial:
    """The reference: a chunk of blocks at a time; only chunks that some row needs are decoded."""
    shape, T = cache.shape, cache.block
    k_params = jax.tree.map(lambda p: p[layer], segment.k_params)
    v_params = jax.tree.map(lambda p: p[layer], segment.v_params)
    N = jax.tree.leaves(segment.v)[0].shape[2]
    per_chunk = max(1, min(CHUNK_TOKENS // T, N))
    sealed = stripe.among(cache.sealed(cache.length))
    last = (sealed.max() + per_chunk - 1) // per_chunk
    first = jnp.int32(0)
    if shape.sliding_window is not None:
        oldest = qs.position.min(1) - shape.sliding_window + 1 - cache.sinks
        first = stripe.among(jnp.maximum(oldest, 0).min() // T) // per_chunk
    tile = jnp.arange(T, dtype=jnp.int32)
    nowhere = jnp.int32(jnp.iinfo(jnp.int32).max - T)  # the position of blocks that are not there: after any query
    pre_rope, many = segment.k_codec.pre_rope, qs.raw.shape[3] > T
    if pre_rope and not many:
        tile_cos, tile_sin = cos_sin(shape.rope, tile[None, :], qs.total[:, None])

    def body(chunk, part):
        start = jnp.minimum(chunk * per_chunk, N - per_chunk)  # the last chunk may overlap the one before

        def take(leaf):
            # One slice for layer and chunk: `leaf[layer]` alone would be hoisted and copy a layer.
            at = (layer, 0, start) + (0,) * (leaf.ndim - 3)
            return row_major(jax.lax.dynamic_slice(leaf, at, (1, leaf.shape[1], per_chunk, *leaf.shape[3:])))[0]

        block = start + jnp.arange(per_chunk, dtype=jnp.int32)
        base = cache.sinks + stripe.number(block) * T
        k = segment.k_codec.decode(jax.tree.map(take, segment.k), k_params).astype(cache.dtype)
        v = segment.v_codec.decode(jax.tree.map(take, segment.v), v_params).astype(cache.dtype)
        there = (block[None, :] < sealed[:, None]) & (block >= chunk * per_chunk)[None, :]
        token = jnp.where(there, base[None, :], nowhere)[:, :, None] + tile[None, None, :]
        # Without the barrier XLA on CPU decodes each key twice, once for each half of the rotation (1.3x slower), and
        # counts tokens anew for every score (prefill 3x slower).
        k, v, token = jax.lax.optimization_barrier((k, v, token.reshape(token.shape[0], -1)))
        k = k.astype(jnp.float32)
        if pre_rope and many:  # fewer keys than queries of each block: keys are turned, to where they are
            cos, sin = cos_sin(shape.rope, base[None, :, None] + tile[None, None, :], qs.total[:, None, None])
            k = rotate(k, cos[:, :, None], sin[:, :, None])
        if pre_rope and not many:
            cos, sin = cos_sin(shape.rope, qs.position[:, :, None] - base[None, None, :], qs.total[:, None, None])
            q = rotate(qs.raw[:, :, :, :, None], cos[:, None, None], sin[:, None, None])
            k = rotate(k, tile_cos[:, None, None], tile_sin[:, None, None])
            scores = jnp.einsum("bkgsnh,bnkth->bkgsnt", q, k, preferred_element_type=jnp.float32)
        else:
            scores = jnp.einsum("bkgsh,bnkth->bkgsnt", qs.rotated, k, preferred_element_type=jnp.float32)
        visible = _in_window(shape, qs.position[:, :, None], token[:, None, :])
        p, top, total = _softmax_part(scores.reshape(*scores.shape[:4], -1), visible)
        p = p.reshape(scores.shape)
        acc = jnp.einsum("bkgsnt,bnkth->bkgsh", p, v.astype(jnp.float32), preferred_element_type=jnp.float32)
        return merge(part, Partial(acc, top, total))

    return jax.lax.fori_loop(first, last, body, empty_partial(qs.raw))


def _sinks(cache: KVCache, segment: Segment, layer: Any, qs: Queries, new: NewTokens, mode: Mode) -> Partial:
    """The first tokens, exact; those of this call too, unless `_this_call` sees them."""
    if not cache.sinks:
        return empty_partial(qs.raw)
    held, zeros = jnp.minimum(cache.length, cache.sinks), jnp.zeros_like(cache.length)
    k = span(segment.k_sinks[layer], new.k_stored, held, zeros, 0, cache.sinks)
    v = span(segment.v_sinks[layer], new.v, held, zeros, 0, cache.sinks)
    position = jnp.broadcast_to(jnp.arange(cache.sinks, dtype=jnp.int32)[None, :], (cache.batch, cache.sinks))
    if segment.k_codec.pre_rope:
        k = rotate_tokens(cache.shape, k, position, qs.total)
    end = cache.length + new.counts if mode == "cached" else cache.length
    visible = (
        _in_window(cache.shape, qs.position[:, :, None], position[:, None, :]) & (position < end[:, None])[:, None]
    )
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
    visible = _in_window(shape, query, token) & (position < end[:, None])[:, None]
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
        mask = _seen_stored(cache, codec, getattr(cache, f"{name}_window"), query, token)
        return exact.astype(jnp.float32), stored.astype(jnp.float32), mask

    k_exact, k_stored, k_mask = faces("k", new.k_stored)
    v_exact, v_stored, v_mask = faces("v", new.v)

    scores = jnp.einsum("bkgsh,bkth->bkgst", qs.rotated, k_stored, preferred_element_type=jnp.float32)
    if k_mask is not None:
        exact_scores = jnp.einsum("bkgsh,bkth->bkgst", qs.rotated, k_exact, preferred_element_type=jnp.float32)
        scores = jnp.where(k_mask[:, None, None], scores, exact_scores)
    p, top, total = _softmax_part(scores, visible)
    if v_mask is None:
        acc = jnp.einsum("bkgst,bkth->bkgsh", p, v_stored, preferred_element_type=jnp.float32)
    else:
        p_stored = jnp.where(v_mask[:, None, None], p, 0.0)
        acc = jnp.einsum("bkgst,bkth->bkgsh", p_stored, v_stored, preferred_element_type=jnp.float32)
        acc = acc + jnp.einsum("bkgst,bkth->bkgsh", p - p_stored, v_exact, preferred_element_type=jnp.float32)
    return Partial(acc, top, total)


def _this_call(cache: KVCache, qs: Queries, new: NewTokens) -> Partial:
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
        visible = valid[:, None] & _in_window(cache.shape, qs.position[:, :, None], token)
        return merge(part, dense_partial(qs.rotated, ks, vs, visible))

    first = jnp.int32(0)
    if cache.shape.sliding_window is not None:
        first = jnp.maximum(ahead - cache.shape.sliding_window + 1, 0) // size
    return jax.lax.fori_loop(first, last, body, empty_partial(qs.raw))
