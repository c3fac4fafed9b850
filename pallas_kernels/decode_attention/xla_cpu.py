"""Decode attention in plain jnp, written for how XLA compiles for CPU (JAX 0.10.2 and 0.12).

A loop over chunks of a few blocks with online softmax: decode the keys of all heads into a float32 tile that stays in
a core's cache, one product with the queries, softmax, decode the values, one product with the weights. The layer is
indexed in the same slice as the chunk, chunks outside of `[first, last)` are not read, and temporaries do not depend
on the context. One structure serves all storages; what differs is in `cpu_decode`, except that keys stored before RoPE
are turned in a pass of their own.

What decides the speed (AVX-512 machine, JAX 0.10.2 and 0.12, 8 kv heads of 128 channels):

* The loops that XLA emits must be vectorised along channels: an element costs 0.2 ns then, and 2 ns or more otherwise.
  In one version or the other each of these prevented it: a concatenation of fields, a tile reshaped to one axis, a
  channel axis reversed, 16-bit tiles made from 32-bit words.
* A pass that writes a float32 tile takes twice as long where a core's share of it leaves the second-level cache, and
  every pass that is spread over threads costs some microseconds. So a chunk grows with the number of cores.
* Tiles in bfloat16 or int8 gained nothing in the products over float32, which keeps the accuracy. Levels in int16, of
  which twice as many fit a vector, gained in the look-up what the further passes cost.
* `keys @ queries` takes 0.5 to 0.8 of the time of `queries @ keys^T`.
* One product over all blocks of a chunk; with a query for each block it takes 1.5 times as long. So a query is turned
  to where the chunk starts, and the keys' table has a row for each token of a chunk.
* Both halves of a key are turned in one pass, which reads the rows of either half in exchanged order. What keeps this
  from being vectorised: a result reshaped in the same loop (0.10.2), operands sliced at a traced index (0.12).
* JAX 0.12 runs a while loop without a product in it on one thread.
"""

import functools
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention.cpu_decode import decode, take
from pallas_kernels.decode_attention.formats import Format, Partial, Rotation, shape_of
from pallas_kernels.decode_attention.reference import EMPTY

CHUNK_ELEMENTS = 2**17  # decoded at a time by each core, 512 KiB of float32: half of its second-level cache


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
    table = None if rotation is None else _halves(*rotation.angles(rotation.place(within, T)))

    def body(chunk: jax.Array, part: Partial) -> Partial:
        start = jnp.minimum(chunk * blocks, N - blocks)  # the last chunk may overlap the one before
        apart = functools.partial(_apart, chunk < end)
        if rotation is None or table is None:
            scores = _products(q, _stored(decode(take(k, layer, start, blocks), apart)).reshape(B, K, span, H))
        else:
            # The slice belongs inside: from copies, the loops reload what is constant along channels and take half as
            # long again.
            keys = apart(lambda: decode(take(k, layer, start, blocks), apart)).reshape(B, K, span, 2, H // 2)
            keys = apart(lambda: _turned(keys, *(x[None, None] for x in table)))
            to_start = apart(lambda: _halves(*rotation.angles(rotation.position - rotation.place(start * T, T))))
            cos, sin = (x[:, None, None] for x in to_start)
            turned = _turned(q.reshape(*q.shape[:-1], 2, H // 2), cos, sin)
            scores = _products(turned.reshape(q.shape), keys.reshape(B, K, span, H))
        token = (start * T + within)[None, :]
        seen = (token >= jnp.maximum(first, chunk * span)[:, None]) & (token < last[:, None])
        seen = seen[:, None, None]
        top = jnp.maximum(part.max, jnp.where(seen, scores, EMPTY).max(-1))
        p = jnp.where(seen, jnp.exp(scores - top[..., None]), 0.0)
        acc = jnp.einsum(
            "bkgt,bkth->bkgh", p, _stored(decode(take(v, layer, start, blocks), apart)).reshape(B, K, span, H)
        )
        fade = jnp.exp(part.max - top)
        return Partial(part.acc * fade[..., None] + acc, top, part.sum * fade + p.sum(-1))

    empty = Partial(jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:-1], EMPTY), jnp.zeros(q.shape[:-1]))
    return jax.lax.fori_loop(begin, end, body, empty)


def _blocks_at_a_time(x: Format) -> int:
    """A power of two of blocks: `CHUNK_ELEMENTS` for each core, but no more than a quarter of the capacity, of which a
    short context would decode the rest in vain; for one core, if the capacity has them. At least 1."""
    _, B, N, K, T, H = shape_of(x)
    one = max(1, min(CHUNK_ELEMENTS // (B * K * T * H), N))
    # Chunks were measured to gain by growing with up to four cores.
    all_cores = min(min(4, cores()) * CHUNK_ELEMENTS // (B * K * T * H), N // 4)
    return 2 ** int(math.log2(max(one, all_cores)))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _products(q: jax.Array, keys: jax.Array) -> jax.Array:
    """Scores `[B, K, G, t]` of q `[B, K, G, H]` and keys `[B, K, t, H]`."""
    return jnp.einsum("bkth,bkhg->bktg", keys, q.swapaxes(-1, -2)).swapaxes(-1, -2)


def _halves(cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tables `[..., H/2]` as `_turned` takes them, `[..., 1, H/2]`."""
    return cos[..., None, :], sin[..., None, :]


def _turned(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """RoPE of `x[..., 2, H/2]`, its halves side by side. One pass, vectorised: whole rows of a half are exchanged."""
    # A table of half the size costs less than the product with the sign.
    sign = jnp.asarray([-1, 1], jnp.float32).reshape((1,) * (x.ndim - 2) + (2, 1))
    return x * cos + jax.lax.rev(x, (x.ndim - 2,)) * (sin * sign)


def _apart(true: jax.Array, make: Callable[[], Any]) -> Any:
    """`make()`, with which what follows is not fused; `true` is traced.

    XLA fuses through an optimization barrier in 0.10.2, but not through a condition that it does not know.
    """
    out = jax.eval_shape(make)
    return jax.lax.cond(true, make, lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), out))


def _stored(x: Any) -> Any:
    """`x`, computed once and written to memory before it is used (see above for what this does not prevent)."""
    return jax.lax.optimization_barrier(x)
