"""The K/V cache: blocks, a ring of recent tokens, sinks. Knows blocks and lengths, never formats or attention.

Positions and storage of a row with `s` sinks, blocks of `T` tokens and exact window `w`:

    position p < s            a sink, exact for ever
    token t = p - s           token t mod T of block t // T
    sealed = max(0, n - s - w) // T      blocks that are encoded once the row holds n tokens (a function of n alone)
    tokens t >= sealed * T    wait in `recent`, in the compute dtype, at index t - sealed * T

Writing is one operation for any number of new tokens, so the bits do not depend on how a text was cut (`write`).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.codecs.base import AbstractCodec, Leaf
from kvjax.model.rope import Rope

# Blocks encoded at a time: bounds the float32 temporaries of sealing a long prompt.
_SEAL_GROUP = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CacheShape:
    """What a cache must know of the model it serves.

    Attributes:
      layers, q_heads, kv_heads, head_dim: static.
      rope: the rotary embedding (`kvjax.model.rope.Rope`): codecs that store keys before RoPE rotate on read.
      sliding_window: a token attends to the newest `sliding_window` tokens, itself included; None for all. Static.
    """

    layers: int = dataclasses.field(metadata={"static": True})
    q_heads: int = dataclasses.field(metadata={"static": True})
    kv_heads: int = dataclasses.field(metadata={"static": True})
    head_dim: int = dataclasses.field(metadata={"static": True})
    rope: Rope
    sliding_window: int | None = dataclasses.field(default=None, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Segment:
    """Cache of L consecutive layers that share one codec pair.

    Attributes:
      k, v: sealed blocks, every leaf `[L, B, N, K or 1, ...]`.
      k_recent, v_recent: `[L, B, K, R, H]`, tokens not yet sealed, as they came; R is a multiple of T.
      k_sinks, v_sinks: `[L, B, K, s, H]`.
      k_params, v_params: the codecs' fitted constants, leaves `[L, ...]`, or None.
      dropped: `[L, B]` int32, outliers of sealed blocks that found no slot.
      k_codec, v_codec, first_layer: static.
    """

    k: Leaf
    v: Leaf
    k_recent: Leaf
    v_recent: Leaf
    k_sinks: Leaf
    v_sinks: Leaf
    k_params: Leaf
    v_params: Leaf
    dropped: Leaf
    k_codec: AbstractCodec = dataclasses.field(metadata={"static": True})
    v_codec: AbstractCodec = dataclasses.field(metadata={"static": True})
    first_layer: int = dataclasses.field(metadata={"static": True})

    @property
    def layers(self) -> int:
        return self.dropped.shape[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """A model's whole cache; a pytree that is passed in and returned, and donated at the outermost jit.

    Attributes:
      segments: layers in order.
      length: `[B]` int32, tokens in each row.
      frozen: `[B]` int32, tokens at the start of `recent` that came back from a sealed block when the row was cropped:
        `recent` holds them decoded, and their codes are kept when the block seals again.
      overrun: `[B]` int32, tokens refused for want of capacity under a trace, where no error can be raised.
      pending: keys and values `[L, B, K, S, H]` of the tokens appended since the last `advance`.
      shape: the model's dimensions.
      block, sinks, window, capacity: T, s, w and the tokens that fit; static.
      policy: the policy's name, for reports; static.
    """

    segments: tuple[Segment, ...]
    length: Leaf
    frozen: Leaf
    overrun: Leaf
    pending: tuple[Leaf, Leaf]
    shape: CacheShape
    block: int = dataclasses.field(metadata={"static": True})
    sinks: int = dataclasses.field(metadata={"static": True})
    window: int = dataclasses.field(metadata={"static": True})
    capacity: int = dataclasses.field(metadata={"static": True})
    policy: str = dataclasses.field(metadata={"static": True})

    @property
    def dtype(self) -> jnp.dtype:
        return self.pending[0].dtype

    @property
    def batch(self) -> int:
        return self.length.shape[0]

    def sealed(self, length: jax.Array) -> jax.Array:
        """Sealed blocks of a row that holds `length` tokens."""
        return jnp.maximum(length - self.sinks - self.window, 0) // self.block

    def recent_start(self, length: jax.Array) -> jax.Array:
        """Position of the first token in `recent`."""
        return self.sinks + self.sealed(length) * self.block


def init(
    shape: CacheShape,
    policy: Any,
    *,
    batch: int,
    capacity: int,
    dtype: Any,
    block: int = 128,
) -> KVCache:
    """An empty cache; all its memory is allocated here.

    Args:
      shape: the model's dimensions.
      policy: a `kvjax.policy.Policy`: its segments (codec pairs with their params), sinks and exact window.
      batch: rows.
      capacity: tokens per row that must fit; rounded up to whole blocks.
      dtype: compute dtype, in which recent tokens and sinks are held.
      block: tokens per block, a multiple of 32.
    """
    if batch < 1:
        raise ValueError(f"`batch={batch}` must be at least 1.")
    if capacity < 1:
        raise ValueError(f"`capacity={capacity}` must be at least 1 token.")
    if block < 32 or block % 32:
        raise ValueError(f"`block={block}` must be a positive multiple of 32 tokens; the default is 128.")
    sinks, window = policy.sinks, policy.window
    blocks = max(1, -(-(capacity - sinks) // block))
    recent = -(-(block - 1 + window) // block) * block
    heads, head_dim = shape.kv_heads, shape.head_dim

    def dense(layers: int, tokens: int) -> jax.Array:
        return jnp.zeros((layers, batch, heads, tokens, head_dim), dtype)

    def storage(codec: AbstractCodec, params: Any, layers: int) -> Any:
        x = jax.ShapeDtypeStruct((heads, block, head_dim), jnp.float32)
        one = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape[1:], p.dtype), params)
        spec = jax.eval_shape(codec.encode, x, one)
        return jax.tree.map(lambda leaf: jnp.zeros((layers, batch, blocks, *leaf.shape), leaf.dtype), spec)

    def own(params: Any) -> Any:
        # The cache is donated on every step: it must not share buffers with the policy or with another cache.
        return jax.tree.map(lambda p: jnp.array(p, copy=True), params)

    segments = tuple(
        Segment(
            k=storage(part.k_codec, part.k_params, part.layers),
            v=storage(part.v_codec, part.v_params, part.layers),
            k_recent=dense(part.layers, recent),
            v_recent=dense(part.layers, recent),
            k_sinks=dense(part.layers, sinks),
            v_sinks=dense(part.layers, sinks),
            k_params=own(part.k_params),
            v_params=own(part.v_params),
            dropped=jnp.zeros((part.layers, batch), jnp.int32),
            k_codec=part.k_codec,
            v_codec=part.v_codec,
            first_layer=part.first_layer,
        )
        for part in policy.segments
    )
    rows = jnp.zeros((batch,), jnp.int32)
    return KVCache(
        segments=segments,
        length=rows,
        frozen=jnp.zeros_like(rows),
        overrun=jnp.zeros_like(rows),
        pending=(dense(shape.layers, 1), dense(shape.layers, 1)),
        shape=own(shape),
        block=block,
        sinks=sinks,
        window=window,
        capacity=sinks + blocks * block,
        policy=policy.name,
    )


def span(
    old: jax.Array, new: jax.Array, old_tokens: jax.Array, first_new: jax.Array, start: Any, count: int
) -> jax.Array:
    """Tokens `start .. start + count` of a row's `old` tokens followed by its `new` ones.

    Args:
      old: `[B, K, R, H]`, of which `old_tokens[B]` are valid.
      new: `[B, K, S, H]`, of which those from `first_new[B]` on follow.
      start: `[B]` or an integer; count: static.

    Returns:
      `[B, K, count, H]`; what lies beyond the new tokens is arbitrary but finite.
    """
    index = jnp.broadcast_to(jnp.asarray(start, jnp.int32), old_tokens.shape)[:, None] + jnp.arange(count)[None, :]
    pick = jax.vmap(lambda x, i: jnp.take(x, i, axis=1, mode="clip"))
    from_new = pick(new, index - old_tokens[:, None] + first_new[:, None])
    if not old.shape[2]:
        return from_new
    return jnp.where((index < old_tokens[:, None])[:, None, :, None], pick(old, index), from_new)


def write_layer(cache: KVCache, segment: Segment, layer: Any, k: jax.Array, v: jax.Array, counts: jax.Array) -> Segment:
    """Puts new tokens behind those of one layer: sinks, sealed blocks and what stays recent.

    Args:
      cache: gives length, frozen and the geometry, all from before the write.
      segment: the segment to write to, perhaps already written at other layers.
      layer: index within the segment, traced or not.
      k, v: `[B, K, S, H]`, of which `counts[B]` count; k as the codec wants it (before or after RoPE).
    """
    length = cache.length
    batch, _, new_tokens, _ = k.shape
    rows = jnp.arange(batch)
    total = length + counts
    sealed, newly = cache.sealed(length), cache.sealed(total) - cache.sealed(length)
    recent_tokens = jnp.maximum(length - cache.recent_start(length), 0)
    first_new = jnp.maximum(cache.sinks - length, 0)
    out: dict[str, Any] = {}
    dropped = jnp.zeros((batch,), jnp.int32)

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
            at = jnp.where(full, sealed[:, None] + index, jax.tree.leaves(storage)[0].shape[2])
            block = codec.encode(tokens, params)
            if codec.token_local:
                kept = jnp.clip(cache.frozen[:, None] - index * cache.block, 0, cache.block)
                clipped = jnp.minimum(at, jax.tree.leaves(storage)[0].shape[2] - 1)
                stored = jax.tree.map(lambda leaf: leaf[layer, rows[:, None], clipped], storage)
                block = codec.keep(stored, block, kept)
            storage = jax.tree.map(
                lambda leaf, b: leaf.at[layer, rows[:, None], at].set(b, mode="drop"), storage, block
            )
            return storage, dropped + jnp.where(full, codec.dropped(tokens, params), 0).sum(1, dtype=jnp.int32)

        most = (recent.shape[2] + new_tokens) // cache.block  # static bound on the blocks that can fill
        group = min(most, _SEAL_GROUP)
        groups = (newly.max() + group - 1) // group
        carry = (getattr(segment, name), dropped)
        out[name], dropped = jax.lax.fori_loop(
            0, groups, lambda i, c, seal=seal, group=group: seal(i * group, group, c), carry
        )
        rest = span(recent, x, recent_tokens, first_new, newly * cache.block, recent.shape[2])
        out[f"{name}_recent"] = getattr(segment, f"{name}_recent").at[layer].set(rest)
    return dataclasses.replace(segment, dropped=segment.dropped.at[layer].add(dropped), **out)


def _write_recent(cache: KVCache, segment: Segment, k: jax.Array, v: jax.Array, counts: jax.Array) -> Segment:
    """`write_layer` for all layers of a segment where no block fills: a scatter of the new tokens."""
    batch, new_tokens = k.shape[1], k.shape[3]
    rows = jnp.arange(batch)[:, None]
    i = jnp.arange(new_tokens)[None, :]
    position = cache.length[:, None] + i
    valid = i < counts[:, None]
    capacity = segment.k_recent.shape[3]
    slot = jnp.where(valid & (position >= cache.sinks), position - cache.recent_start(cache.length)[:, None], capacity)
    sink = jnp.where(valid & (position < cache.sinks), position, cache.sinks)
    out = {}
    for name, x in (("k", k), ("v", v)):
        recent, sinks = getattr(segment, f"{name}_recent"), getattr(segment, f"{name}_sinks")
        values = x.astype(recent.dtype).transpose(1, 3, 0, 2, 4)  # advanced indices come first: [B, S, L, K, H]
        out[f"{name}_recent"] = recent.at[:, rows, :, slot].set(values, mode="drop")
        if cache.sinks:
            out[f"{name}_sinks"] = sinks.at[:, rows, :, sink].set(values, mode="drop")
    return dataclasses.replace(segment, **out)


def write(cache: KVCache, k: jax.Array, v: jax.Array, counts: jax.Array) -> KVCache:
    """Appends `counts[B]` of the new tokens `k, v [L, B, K, S, H]` to every layer and moves the lengths.

    Rows for which the tokens do not fit are left as they are and the tokens counted in `overrun`.
    """
    fitting = _that_fit(cache, counts)
    seals = (cache.sealed(cache.length + fitting) > cache.sealed(cache.length)).any()
    segments = []
    for segment in cache.segments:
        part = slice(segment.first_layer, segment.first_layer + segment.layers)
        ks, vs = k[part], v[part]

        def with_seal(segment, ks=ks, vs=vs):
            def body(layer, segment):
                return write_layer(cache, segment, layer, ks[layer], vs[layer], fitting)

            return jax.lax.fori_loop(0, segment.layers, body, segment)

        def without(segment, ks=ks, vs=vs):
            return _write_recent(cache, segment, ks, vs, fitting)

        segments.append(jax.lax.cond(seals, with_seal, without, segment))
    return advance_lengths(dataclasses.replace(cache, segments=tuple(segments)), counts)


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


def check_room(cache: KVCache, counts: Any) -> None:
    """Raises before anything is touched where a row would overrun; a traced length can't be checked."""
    if isinstance(cache.length, jax.core.Tracer) or isinstance(counts, jax.core.Tracer):
        return
    need = np.asarray(cache.length) + np.asarray(counts)
    row = int(need.argmax())
    if need[row] > cache.capacity:
        raise ValueError(
            f"`capacity={cache.capacity}` tokens: row {row} holds {int(cache.length[row])} and would need "
            f"{int(need[row])}; "
            "make the cache with a larger `capacity`, or crop it."
        )
