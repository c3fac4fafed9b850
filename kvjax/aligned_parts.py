"""The parts of an aligned read: blocks, sealed or about to be, and products over rows read to different levels."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kvjax.codecs.planes import AlignedCodec
from kvjax.queries import in_window, seen_stored
from kvjax.softmax import Partial, softmax_part
from kvjax.writing import span


class Block(NamedTuple):
    """T tokens of every row, sealed or as if they were.

    Attributes:
      k, v: unpacked blocks of the codecs, leaves `[B, ...]`; None where not asked for.
      start: `[B]` number of the first token, counted from behind the sinks.
      seen: `[B, S, T]`, pairs of query and token that this block answers for.
      k_stored, v_stored: those that see the key, or the value, as stored.
      k_exact, v_exact: `[B, K, T, H]` for the pairs that do not; None where there are none.
    """

    k: Any
    v: Any
    start: jax.Array
    seen: jax.Array
    k_stored: jax.Array
    v_stored: jax.Array
    k_exact: Any = None
    v_exact: Any = None


class Recent:
    """Tokens that are not sealed yet and, in "cached" mode, this call's: exact, and as if sealed to later queries."""

    def __init__(self, a: Any):  # the attention it is part of
        cache, segment, new = a.cache, a.segment, a.new
        self.a, T = a, cache.block
        start = cache.recent_start(cache.length)
        held = jnp.maximum(cache.length - start, 0)
        extra = new.v.shape[2] if a.mode == "cached" else 0
        count = -(-(T - 1 + cache.window + extra) // T) * T
        first_new = jnp.maximum(cache.sinks - cache.length, 0)
        self.k_exact, self.v_exact = (
            span(recent[a.layer], x, held, first_new, 0, count)
            for recent, x in ((segment.k_recent, new.k_stored), (segment.v_recent, new.v))
        )
        end = cache.length + (new.counts if a.mode == "cached" else 0)
        self.position = start[:, None] + jnp.arange(count, dtype=jnp.int32)[None, :]
        query, token = a.qs.position[:, :, None], self.position[:, None, :]
        visible = in_window(cache.shape, query, token) & (self.position < end[:, None])[:, None]
        stored = (
            seen_stored(cache, codec, window, query, token)
            for codec, window in ((a.k_codec, cache.k_window), (a.v_codec, cache.v_window))
        )
        self.k_stored, self.v_stored = (visible if mask is None else visible & mask for mask in stored)
        self.in_blocks = self.v_stored | (self.k_stored if a.k_codec.reads_in_part else False)
        self.before = visible & ~self.in_blocks
        self.start = start - cache.sinks
        in_blocks = self.in_blocks.any((0, 1)).reshape(-1, T).any(-1)
        self.blocks = jnp.where(in_blocks, jnp.arange(1, count // T + 1), 0).max()

    def exact_part(self) -> Partial:
        """Attention over the pairs that see the value exactly, and the key too unless it is read entirely."""
        a, q = self.a, self.a.qs.rotated
        scores = dot(q, a.rotate(self.k_exact, self.position))
        if not a.k_codec.reads_in_part:
            B, K, count, H = self.k_exact.shape
            blocks = self.k_exact.reshape(B, K, -1, a.cache.block, H).swapaxes(1, 2)
            stored = (
                a.k_codec.roundtrip(blocks, a.k_params).swapaxes(1, 2).reshape(B, K, count, H).astype(a.cache.dtype)
            )
            scores = jnp.where(self.k_stored[:, None, None], dot(q, a.rotate(stored, self.position)), scores)
        p, top, total = softmax_part(scores, self.before)
        return Partial(mix(p, self.v_exact.astype(jnp.float32)), top, total)

    def block(self, n: jax.Array, sides: str) -> Block:
        T = self.a.cache.block

        def part(x: jax.Array, axis: int) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, n * T, T, axis)

        k, v = part(self.k_exact, 2), part(self.v_exact, 2)
        return Block(
            self.a.k_codec.quantize(k, self.a.k_params) if "k" in sides else None,
            self.a.v_codec.quantize(v, self.a.v_params) if "v" in sides else None,
            self.start + n * T,
            part(self.in_blocks, 2),
            part(self.k_stored, 2),
            part(self.v_stored, 2),
            self.a.rotate(k, part(self.position, 1)),
            v.astype(jnp.float32),
        )


def by_criterion(codec: Any) -> bool:
    return codec.reads_in_part and codec.read.mode == "criterion"


def dot(q: jax.Array, k: jax.Array) -> jax.Array:
    return jnp.einsum("bkgsh,bkth->bkgst", q, k, preferred_element_type=jnp.float32)


def mix(p: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.einsum("bkgst,bkth->bkgsh", p, v, preferred_element_type=jnp.float32)


def to_rank(x: jax.Array, rank: int) -> jax.Array:
    return x.reshape(x.shape + (1,) * (rank - x.ndim))


def contract(
    equation: str, x: jax.Array, codec: AlignedCodec, block: Any, level: jax.Array, shared_axis: int
) -> jax.Array:
    """`einsum(equation, x, values)`, where `level[B, K, S, R]` says how much each row of the block is read.

    Args:
      x: `[B, K, G, S, R]`, contracted with the rows.
      shared_axis: of the values `[B, K, T, H]`, along which a row lies.
    """
    faces = [codec.read_at(block, i) for i in range(1, len(codec.widths))]
    if level.shape[2] == 1:  # a decode step: one level per row, one product
        level = jnp.expand_dims(level[:, :, 0], shared_axis)
        values = jnp.select([level == i for i in range(1, len(faces))], faces[:-1], faces[-1])
        values = jnp.where(level == 0, 0.0, values)
        return jnp.einsum(equation, x, values, preferred_element_type=jnp.float32)
    level = level[:, :, None]
    parts = [
        jnp.einsum(equation, jnp.where(level == i, x, 0.0), face, preferred_element_type=jnp.float32)
        for i, face in enumerate(faces, start=1)
    ]
    return sum(parts[1:], parts[0])
