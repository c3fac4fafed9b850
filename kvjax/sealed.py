"""Attention over sealed blocks: by a kernel where one fits, else a chunk of blocks at a time in plain jnp.

RoPE for keys stored before it: scores of a block are (R(p_i - base) q) . (R(t) k_t), so the key side needs one table of
T rows for all blocks (KVQuant's on-the-fly rotation, arXiv 2401.18079 section 3.2, made tile-relative).
"""

from typing import Any

import jax
import jax.numpy as jnp

from kvjax import fused, places, striped
from kvjax.cache import KVCache, Segment
from kvjax.model.rope import cos_sin, rotate
from kvjax.queries import Queries, in_window
from kvjax.softmax import Partial, empty_partial, merge, softmax_part
from kvjax.striped import Stripe

CHUNK_TOKENS = 512  # sealed tokens decoded at a time: what fits a core's cache


def attend_sealed(cache: KVCache, segment: Segment, layer: Any, qs: Queries) -> Partial:
    """The sealed blocks, on a mesh by the devices that own them."""
    return striped.attend(own_blocks, cache, segment, layer, qs)


def own_blocks(cache: KVCache, segment: Segment, layer: Any, qs: Queries, stripe: Stripe) -> Partial:
    """One device's sealed blocks: by a kernel for one query per row where there is one, else by the reference."""
    kernel = fused.kernel(cache, segment) if qs.raw.shape[3] == 1 else None
    if kernel is None:
        return in_chunks(cache, segment, layer, qs, stripe)
    part = kernel(layer, qs.raw[..., 0, :], qs.rotated[..., 0, :], qs.position[:, 0], stripe)
    return Partial(part.acc[..., None, :], part.max[..., None], part.sum[..., None])


def in_chunks(cache: KVCache, segment: Segment, layer: Any, qs: Queries, stripe: Stripe) -> Partial:
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
            here = jax.lax.dynamic_slice(leaf, at, (1, leaf.shape[1], per_chunk, *leaf.shape[3:]))
            return places.like(here, leaf, cache.target)[0]

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
        visible = in_window(shape, qs.position[:, :, None], token[:, None, :])
        p, top, total = softmax_part(scores.reshape(*scores.shape[:4], -1), visible)
        p = p.reshape(scores.shape)
        acc = jnp.einsum("bkgsnt,bnkth->bkgsh", p, v.astype(jnp.float32), preferred_element_type=jnp.float32)
        return merge(part, Partial(acc, top, total))

    return jax.lax.fori_loop(first, last, body, empty_partial(qs.raw))
