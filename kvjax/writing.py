"""Writing to the cache: one operation for any number of new tokens, so the bits do not depend on how a text was cut."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from kvjax import places, sharding, striped
from kvjax.cache import KVCache, Segment
from kvjax.codecs.base import AbstractCodec
from kvjax.striped import SpreadTokens
from kvjax.targets import split

# Blocks encoded at a time: bounds the float32 temporaries of sealing a long prompt.
_SEAL_GROUP = 16


def span(
    old: jax.Array, new: jax.Array | SpreadTokens, old_tokens: jax.Array, first_new: jax.Array, start: Any, count: int
) -> jax.Array:
    """Tokens `start .. start + count` of a row's `old` tokens followed by its `new` ones.

    Args:
      old: `[B, K, R, H]`, of which `old_tokens[B]` are valid.
      new: `[B, K, S, H]`, an array or spread over a mesh, of which those from `first_new[B]` on follow.
      start: `[B]` or an integer; count: static.

    Returns:
      `[B, K, count, H]`; what lies beyond the new tokens is arbitrary but finite.
    """
    index = jnp.broadcast_to(jnp.asarray(start, jnp.int32), old_tokens.shape)[:, None] + jnp.arange(count)[None, :]
    pick = jax.vmap(lambda x, i: jnp.take(x, i, axis=1, mode="clip"))
    at = index - old_tokens[:, None] + first_new[:, None]
    from_new = new.take(at) if isinstance(new, SpreadTokens) else pick(new, at)
    if not old.shape[2]:
        return from_new
    return jnp.where((index < old_tokens[:, None])[:, None, :, None], pick(old, index), from_new)


def _put(codec: AbstractCodec, cache: KVCache, storage: Any, layer: Any, at: jax.Array, block: Any, full, kept) -> Any:
    """Puts new blocks, leaves `[B, n, ...]`, at `at[B, n]` of a layer's storage where they are `full[B, n]`.

    Block by block, and in the cache's own layout: for a scatter, or for a block computed in another layout, XLA on TPU
    copies the whole cache to that layout and back (bf16, Llama-3-8B, 131,072 tokens: 16 GB of temporaries).

    Args:
      kept: where the cache reopens blocks, the first `kept[B, n]` tokens keep the codes that are stored there.
      cache: for its settings.
    """
    rows, count = at.shape
    block = jax.tree.map(lambda x, leaf: places.like(x[None], leaf, cache.target)[0], block, storage)

    def one(i, storage):
        row, n = i // count, i % count
        to = jnp.minimum(at[row, n], jax.tree.leaves(storage)[0].shape[2] - 1)
        new = jax.tree.map(
            lambda x: jax.lax.dynamic_slice(x, (row, n) + (0,) * (x.ndim - 2), (1, 1, *x.shape[2:])), block
        )
        old = jax.tree.map(lambda x: places.read(x, layer, row, to, cache.target), storage)
        if cache.reopens:
            new = codec.keep(old, new, kept[row, n].reshape(1, 1))
        new = jax.tree.map(lambda a, b: jnp.where(full[row, n], a, b), new, old)
        return jax.tree.map(lambda x, a: places.write(x, a, layer, row, to, cache.target), storage, new)

    return jax.lax.fori_loop(0, rows * count, one, storage)


def write_layer(
    cache: KVCache,
    segment: Segment,
    layer: Any,
    k: jax.Array | SpreadTokens,
    v: jax.Array | SpreadTokens,
    counts: jax.Array,
) -> Segment:
    """Puts new tokens behind those of one layer: sinks, sealed blocks and what stays recent.

    Args:
      cache: gives length, frozen and the geometry, all from before the write.
      segment: the segment to write to, perhaps already written at other layers.
      layer: index within the segment, traced or not.
      k, v: `[B, K, S, H]`, arrays or spread over a mesh, of which `counts[B]` count; k as the codec wants it (before or
        after RoPE).
    """
    length = cache.length
    batch, _, new_tokens, _ = k.shape
    total = length + counts
    sealed, newly = cache.sealed(length), cache.sealed(total) - cache.sealed(length)
    recent_tokens = jnp.maximum(length - cache.recent_start(length), 0)
    first_new = jnp.maximum(cache.sinks - length, 0)
    out: dict[str, Any] = {}
    dropped = jnp.zeros(k.shape[:2], jnp.int32)

    for name, x in (("k", k), ("v", v)):
        codec = getattr(segment, f"{name}_codec")
        params = jax.tree.map(lambda p: p[layer], getattr(segment, f"{name}_params"))
        recent = getattr(segment, f"{name}_recent")[layer]
        x = x.astype(recent.dtype)
        sinks = getattr(segment, f"{name}_sinks")
        if cache.sinks:
            now = span(sinks[layer], x, jnp.minimum(length, cache.sinks), jnp.zeros_like(length), 0, cache.sinks)
            out[f"{name}_sinks"] = sinks.at[layer].set(now)

        def seal(first, blocks, carry, codec=codec, params=params, recent=recent, x=x):
            """Encodes blocks `first .. first + blocks` of this write and stores those that are full."""
            storage, dropped = carry
            tokens = span(recent, x, recent_tokens, first_new, first * cache.block, blocks * cache.block)
            tokens = tokens.reshape(batch, tokens.shape[1], blocks, cache.block, -1).swapaxes(1, 2)
            index = first + jnp.arange(blocks)[None, :]
            full = index < newly[:, None]
            kept = jnp.clip(cache.frozen[:, None] - index * cache.block, 0, cache.block)
            put = functools.partial(_put, codec, cache)
            storage = striped.store(
                put, cache, storage, layer, sealed[:, None] + index, codec.encode(tokens, params), full, kept
            )
            # What keeps its codes was counted when it was first sealed.
            fresh = full[..., None] & (jnp.arange(cache.block)[None, None] >= kept[..., None])
            beyond = jnp.where(fresh[:, :, None], codec.dropped(tokens, params), 0)
            return storage, dropped + beyond.sum((1, 3), dtype=jnp.int32)

        most = (recent.shape[2] + new_tokens) // cache.block  # static bound on the blocks that can fill
        group = min(most, _SEAL_GROUP)
        carry = (getattr(segment, name), dropped)
        if most <= 2:  # a decode step: all at once, without a loop to compile
            out[name], dropped = seal(0, most, carry)
        else:
            groups = (newly.max() + group - 1) // group
            out[name], dropped = jax.lax.fori_loop(
                0, groups, lambda i, c, seal=seal, group=group: seal(i * group, group, c), carry
            )
        rest = span(recent, x, recent_tokens, first_new, newly * cache.block, recent.shape[2])
        out[f"{name}_recent"] = getattr(segment, f"{name}_recent").at[layer].set(rest)
    return dataclasses.replace(segment, dropped=segment.dropped.at[layer].add(dropped), **out)


def _write_recent(cache: KVCache, segment: Segment, k: jax.Array, v: jax.Array, counts: jax.Array) -> Segment:
    """`write_layer` for all layers of a segment where no block fills: a scatter of the new tokens."""
    i = jnp.arange(k.shape[3])[None, :]
    position = cache.length[:, None] + i
    valid = i < counts[:, None]
    capacity = segment.k_recent.shape[3]
    slot = jnp.where(valid & (position >= cache.sinks), position - cache.recent_start(cache.length)[:, None], capacity)
    sink = jnp.where(valid & (position < cache.sinks), position, cache.sinks)

    def put(held: jax.Array, values: jax.Array, at: jax.Array) -> jax.Array:
        values = values.astype(held.dtype).transpose(1, 3, 0, 2, 4)  # advanced indices come first: [B, S, L, K, H]
        return held.at[:, jnp.arange(at.shape[0])[:, None], :, at].set(values, mode="drop")

    out = {}
    for name, x in (("k", k), ("v", v)):
        recent, sinks = getattr(segment, f"{name}_recent"), getattr(segment, f"{name}_sinks")
        out[f"{name}_recent"] = striped.write_rows(put, cache, recent, x, slot)
        if cache.sinks:
            out[f"{name}_sinks"] = striped.write_rows(put, cache, sinks, x, sink)
    return dataclasses.replace(segment, **out)


def write(cache: KVCache, k: jax.Array, v: jax.Array, counts: jax.Array) -> KVCache:
    """Appends `counts[B]` of the new tokens `k, v [L, B, K, S, H]` to every layer and moves the lengths.

    Rows for which the tokens do not fit are left as they are and the tokens counted in `overrun`.
    """
    fitting = _that_fit(cache, counts)
    seals = (cache.sealed(cache.length + fitting) > cache.sealed(cache.length)).any()
    segments = []
    for segment in cache.segments:
        ks, vs = (take_layers(x, segment.layer_ids) for x in (k, v))

        def with_seal(segment, ks=ks, vs=vs):
            def body(layer, segment):
                return write_layer(cache, segment, layer, ks[layer], vs[layer], fitting)

            return jax.lax.fori_loop(0, segment.layers, body, segment)

        def without(segment, ks=ks, vs=vs):
            return _write_recent(cache, segment, ks, vs, fitting)

        segments.append(_as_stored(cache, jax.lax.cond(seals, with_seal, without, segment)))
    return advance_lengths(dataclasses.replace(cache, segments=tuple(segments)), counts)


def _as_stored(cache: KVCache, segment: Segment) -> Segment:
    """The segment, its sealed blocks in the layout of an argument.

    On TPU what leaves a conditional has another, and so has a loop that carries it: prefill copied outlier slots.
    """
    if split(cache.target)[0] != "tpu":
        return segment

    def pin(storage: Any) -> Any:
        return jax.tree.map(lambda leaf: places.as_stored(leaf, cache.target), storage)

    def on_devices(storage: Any) -> Any:
        if cache.mesh is None:
            return pin(storage)
        specs = sharding.specs("sealed", storage)
        return striped.manual(pin, cache.mesh, (specs,), specs)(storage)

    return dataclasses.replace(segment, k=on_devices(segment.k), v=on_devices(segment.v))


def take_layers(x: jax.Array, layer_ids: tuple[int, ...]) -> jax.Array:
    """The rows of `x[L, ...]` that belong to a segment; a slice where they are consecutive."""
    first, last = layer_ids[0], layer_ids[-1]
    if last - first + 1 == len(layer_ids):
        return x[first : last + 1]
    return x[jnp.asarray(layer_ids)]


def _that_fit(cache: KVCache, counts: jax.Array) -> jax.Array:
    """`counts`, 0 for the rows in which they would overrun the capacity."""
    return jnp.where(cache.length + counts <= cache.capacity, counts, 0).astype(jnp.int32)


def advance_lengths(cache: KVCache, counts: jax.Array) -> KVCache:
    """The bookkeeping of a write, once for all layers."""
    fitting = _that_fit(cache, counts)
    total = cache.length + fitting
    newly = cache.sealed(total) - cache.sealed(cache.length)
    return dataclasses.replace(
        cache,
        length=total,
        frozen=jnp.maximum(cache.frozen - newly * cache.block, 0),
        overrun=cache.overrun + counts.astype(jnp.int32) - fitting,
    )
