"""Decode attention in plain jnp, written for how XLA compiles for CPU (JAX 0.10.2 and 0.12).

A loop over chunks of a few blocks with online softmax: decode the keys of all heads into a float32 tile that stays in
the core's cache, one product with the queries, softmax, decode the values, one product with the weights. The layer is
indexed in the same slice as the chunk, chunks outside of `[first, last)` are not read, and temporaries do not depend
on the context. One structure serves all storages; what differs is in `cpu_decode`, except that keys stored before RoPE
are turned in a pass of their own.

What decides the speed (AVX-512 machine, JAX 0.10.2 and 0.12, 8 kv heads of 128 channels):

* The loops that XLA emits must be vectorised along channels: an element costs 0.2 ns then, and 2 ns or more otherwise.
  In one version or the other each of these prevented it: a concatenation of fields, a tile reshaped to one axis, a
  channel axis reversed, 16-bit tiles made from 32-bit words.
* Tiles in bfloat16 or int8 gained nothing in the products over float32, which keeps the accuracy.
* `keys @ queries` takes 0.5 to 0.8 of the time of `queries @ keys^T`.
* One product over all blocks of a chunk; with a query for each block it takes 1.5 times as long. So a query is turned
  to where the chunk starts, and the keys' table has a row for each token of a chunk.
* JAX 0.12 runs elementwise loops inside of a while loop on one thread, and only the products on all.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention.cpu_decode import decode, take
from pallas_kernels.decode_attention.formats import Format, Partial, Rotation, shape_of
from pallas_kernels.decode_attention.reference import EMPTY, rotate

CHUNK_ELEMENTS = 2**18  # decoded at a time, 1 MiB of float32: what stays in a core's second-level cache


def check(k: Format, v: Format, group: int, chip: str, rotates: bool) -> None:
    """Every storage and shape is taken."""


def decode_attention(
    q: jax.Array,
    k: Format,
    v: Format,
    layer: jax.Array,
    first: jax.Array,
    last: jax.Array,
    rotation: Rotation | None,
    *,
    chip: str = "",
    interpret: Any = False,
) -> Partial:
    """As `api.decode_attention`, in float32; `chip` and `interpret` are ignored."""
    _, B, N, K, T, H = shape_of(k)
    blocks = _blocks_at_a_time(k)
    span = blocks * T
    live = last > first
    begin = jnp.where(live, first, N * T).min() // span
    end = (jnp.where(live, last, 0).max() + span - 1) // span
    within = jnp.arange(span, dtype=jnp.int32)
    turns = None if rotation is None else rotation.angles(rotation.place(within, T))

    def body(chunk: jax.Array, part: Partial) -> Partial:
        start = jnp.minimum(chunk * blocks, N - blocks)  # the last chunk may overlap the one before
        if rotation is None or turns is None:
            scores = _products(q, _stored(decode(take(k, layer, start, blocks))).reshape(B, K, span, H))
        else:
            to_start = (x[:, None, None] for x in rotation.angles(rotation.position - rotation.place(start * T, T)))
            keys = _decoded_apart(k, layer, start, blocks, chunk < end)
            scores = _turned_products(rotate(q, *to_start), keys, *turns)
        token = (start * T + within)[None, :]
        seen = (token >= jnp.maximum(first, chunk * span)[:, None]) & (token < last[:, None])
        seen = seen[:, None, None]
        top = jnp.maximum(part.max, jnp.where(seen, scores, EMPTY).max(-1))
        p = jnp.where(seen, jnp.exp(scores - top[..., None]), 0.0)
        acc = jnp.einsum("bkgt,bkth->bkgh", p, _stored(decode(take(v, layer, start, blocks))).reshape(B, K, span, H))
        fade = jnp.exp(part.max - top)
        return Partial(part.acc * fade[..., None] + acc, top, part.sum * fade + p.sum(-1))

    empty = Partial(jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:-1], EMPTY), jnp.zeros(q.shape[:-1]))
    return jax.lax.fori_loop(begin, end, body, empty)


def _blocks_at_a_time(x: Format) -> int:
    """The largest power of two of blocks within `CHUNK_ELEMENTS` and the capacity, at least 1."""
    _, B, N, K, T, H = shape_of(x)
    return 2 ** int(math.log2(max(1, min(CHUNK_ELEMENTS // (B * K * T * H), N))))


def _products(q: jax.Array, keys: jax.Array) -> jax.Array:
    """Scores `[B, K, G, t]` of q `[B, K, G, H]` and keys `[B, K, t, H]`."""
    return jnp.einsum("bkth,bkhg->bktg", keys, q.swapaxes(-1, -2)).swapaxes(-1, -2)


def _turned_products(q: jax.Array, keys: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Scores `[B, K, G, t]` of q and keys `[B, K, n, T, H]` that the tables `[t, H/2]` turn."""
    B, K, n, T, H = keys.shape
    a, b = keys[..., : H // 2], keys[..., H // 2 :]
    cos, sin = (table.reshape(1, 1, n, T, H // 2) for table in (cos, sin))
    # The halves stay apart: put together, by any means, they cost three times as much.
    halves = _stored((a * cos - b * sin, b * cos + a * sin))
    a, b = (half.reshape(B, K, n * T, H // 2) for half in halves)
    return _products(q[..., : H // 2], a) + _products(q[..., H // 2 :], b)


def _decoded_apart(x: Format, layer: jax.Array, start: jax.Array, blocks: int, true: jax.Array) -> jax.Array:
    """Decoded blocks that what follows is not fused with; `true` is traced.

    Decoding must not be fused into both halves of the rotation. XLA fuses through an optimization barrier in 0.10.2,
    but not through a condition that it does not know.
    """

    def decoded(_):
        # The slice belongs inside: from copies, the loops reload what is constant along channels (1.5 times slower).
        return decode(take(x, layer, start, blocks))

    out = jax.eval_shape(decoded, None)
    return jax.lax.cond(true, decoded, lambda _: jnp.zeros(out.shape, out.dtype), None)


def _stored(x: Any) -> Any:
    """`x`, computed once and written to memory before it is used (see above for what this does not prevent)."""
    return jax.lax.optimization_barrier(x)
