"""Sealed blocks on a mesh: each device reads and writes its own, and no block ever travels.

Blocks are dealt out in stripes: block n of the context belongs to device n mod P of the mesh axis `seq`, as its block
n // P. So the work is even at any fill, in prefill and under a sliding window. An array of N blocks, N a multiple of P,
holds block n at index (n mod P) * N/P + n // P.

`shard_map` stands here (`manual`; what moves saved blocks uses it too) and nowhere else: kernels cannot be partitioned
by XLA, and a slice of a sharded axis would be gathered. Attention of a decode step costs two all-reduces per layer,
whatever the context: of the maximum of the scores, and of the sums (kernels-guide section 2; ring attention's merge,
arXiv 2310.01889, section 3).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kvjax import sharding
from kvjax.cache import KVCache, Segment


@dataclasses.dataclass(frozen=True)
class Stripe:
    """The blocks of one device: number `index`, `index + count`, `index + 2 count`, ... of the context."""

    index: Any = 0
    count: int = 1

    def among(self, blocks: jax.Array) -> jax.Array:
        """How many of the first `blocks` of the context are own ones."""
        return (blocks - self.index + self.count - 1) // self.count

    def number(self, own: jax.Array) -> jax.Array:
        """The number in the context of own block `own`."""
        return own * self.count + self.index


def attend(partial: Callable, cache: KVCache, segment: Segment, layer: Any, qs: Any) -> Any:
    """Attention over all sealed blocks, from what each device has of its own.

    Args:
      partial: `(cache, segment, layer, qs, stripe) -> (acc, max, sum)`, as in `kvjax.attention.Partial`. The cache
        it is given has lengths and settings only, the segment sealed blocks and constants only, both of this device.
      qs: `kvjax.attention.Queries`.

    Returns:
      acc, max and sum over all blocks; where there are several queries and `seq` divides them, each device of `seq` has
      its share of the queries.
    """
    mesh = cache.mesh
    if mesh is None:
        return partial(cache, segment, layer, qs, Stripe())
    share = mesh.shape["seq"] > 1 and qs.raw.shape[3] > 1 and qs.raw.shape[3] % mesh.shape["seq"] == 0

    def own(cache, segment, layer, qs):
        part = partial(cache, segment, layer, qs, _own_stripe(mesh))
        return _join(part, share) if mesh.shape["seq"] > 1 else part

    out = P("data", "tensor", None, "seq" if share else None)
    return _over_devices(own, out, cache, segment, layer, qs)


def attend_in_part(partial: Callable, cache: KVCache, segment: Segment, layer: Any, qs: Any, known: jax.Array) -> Any:
    """As `attend`, of storage that is read in part, which `seq` does not split.

    Args:
      partial: `(cache, segment, layer, qs, known) -> (acc, max, sum), counts`, counts `[B, n]` of one device's heads.
      known: `[B, K, G, S]`.

    Returns:
      acc, max and sum, and the counts of all heads.
    """
    if cache.mesh is None:
        return partial(cache, segment, layer, qs, known)

    def own(cache, segment, layer, qs, known):
        part, counts = partial(cache, segment, layer, qs, known)
        return part, jax.lax.psum(counts, "tensor")

    heads = P("data", "tensor")
    return _over_devices(own, (heads, P("data")), cache, segment, layer, qs, (known, heads))


def _over_devices(
    own: Callable, out: Any, cache: KVCache, segment: Segment, layer: Any, qs: Any, *more: tuple[jax.Array, P]
) -> Any:
    """`own(cache, segment, layer, qs, ...)` on every device of the mesh, `more` being arrays and their specs."""
    assert cache.mesh is not None
    blocks = _blocks_only(segment)
    rows = jax.tree.map(lambda _: P("data"), qs)
    whole: KVCache = jax.tree.map(lambda _: P(), _facts(cache))
    row_specs: dict[str, Any] = dict.fromkeys(sharding.ROWS, P("data"))
    in_specs = (
        dataclasses.replace(whole, **row_specs),
        sharding.segment_specs(blocks, cache.shape.kv_heads),
        P(),
        dataclasses.replace(rows, raw=P("data", "tensor"), rotated=P("data", "tensor")),
        *(spec for _, spec in more),
    )
    arrays = (_facts(cache), blocks, jnp.asarray(layer, jnp.int32), qs, *(x for x, _ in more))
    return manual(own, cache.mesh, in_specs, out)(*arrays)


def _join(part: Any, share: bool) -> Any:
    """The log-sum-exp merge over `seq`: two all-reduces; a reduce-scatter for the second where queries are shared."""
    top = jax.lax.pmax(part.max, "seq")
    weight = jnp.exp(part.max - top)[..., None]
    packed = jnp.concatenate([part.acc, part.sum[..., None]], -1) * weight
    if share:
        packed = jax.lax.psum_scatter(packed, "seq", scatter_dimension=3, tiled=True)
        size = packed.shape[3]
        top = jax.lax.dynamic_slice_in_dim(top, jax.lax.axis_index("seq") * size, size, axis=3)
    else:
        packed = jax.lax.psum(packed, "seq")
    return part._replace(acc=packed[..., :-1], max=top, sum=packed[..., -1])


def store(put: Callable, cache: KVCache, storage: Any, layer: Any, at: jax.Array, block: Any, full, kept) -> Any:
    """Writes new blocks into the storage of their owners.

    Args:
      put: `(storage, layer, at[B, n], block, full[B, n], kept[B, n]) -> storage`, on one device, leaves `[B, n, ...]`
        of `block` that are `full` to index `at`.
      at: `[B, n]` numbers of blocks in the context.
    """
    mesh = cache.mesh
    if mesh is None:
        return put(storage, layer, at, block, full, kept)

    def own(storage, layer, at, block, full, kept):
        stripe = _own_stripe(mesh)
        full = full & (at % stripe.count == stripe.index)
        return put(storage, layer, at // stripe.count, block, full, kept)

    sealed = sharding.specs("sealed", storage)
    new = jax.tree.map(lambda leaf: P(*sharding.spec("blocks", leaf[None])[1:]), block)
    rows = P("data")
    return manual(own, mesh, (sealed, P(), rows, new, rows, rows), sealed)(storage, layer, at, block, full, kept)


def write_rows(write: Callable, cache: KVCache, arrays: Any, values: jax.Array, slot: jax.Array) -> Any:
    """Puts new tokens at places of their row: each device its rows and heads.

    Args:
      write: `(arrays, values, slot) -> arrays` on one device.
      arrays: `[L, B, K, R, H]`; values: `[L, B, K, S, H]`; slot: `[B, S]` integers.
    """
    mesh = cache.mesh
    if mesh is None:
        return write(arrays, values, slot)

    held, new = sharding.spec("recent", arrays), sharding.spec("recent", values)
    return manual(write, mesh, (held, new, P("data")), held)(arrays, values, slot)


def read(cache: KVCache, storage: Any, at: jax.Array) -> Any:
    """Blocks `at[B, n]` of the context, leaves `[L, B, n, K or 1, ...]`, whole on every device of `seq`."""

    def own(storage, at):
        stripe = Stripe() if cache.mesh is None else _own_stripe(cache.mesh)
        rows = jnp.arange(at.shape[0])[:, None]

        def take(leaf):
            found = leaf[:, rows, jnp.minimum(at // stripe.count, leaf.shape[2] - 1)]
            mine = (at % stripe.count == stripe.index).reshape((1, *at.shape) + (1,) * (leaf.ndim - 3))
            return found if stripe.count == 1 else _from_owner(found, mine)

        return jax.tree.map(take, storage)

    if cache.mesh is None:
        return own(storage, at)
    in_specs = (sharding.specs("sealed", storage), P("data"))
    return manual(own, cache.mesh, in_specs, sharding.specs("blocks", storage))(storage, at)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SpreadTokens:
    """Keys or values `[B, K, S, H]` of a long call, in chunks of C tokens, each chunk split over `seq`.

    Attributes:
      values: `[B, K, n, C, H]`.
      mesh: static.
    """

    values: Any
    mesh: Mesh = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        B, K, n, C, H = self.values.shape
        return B, K, n * C, H

    def astype(self, dtype: Any) -> "SpreadTokens":
        return dataclasses.replace(self, values=self.values.astype(dtype))

    def take(self, index: jax.Array) -> jax.Array:
        """Tokens `index[B, count]`, clipped to those there are: `[B, K, count, H]`, whole on every device of `seq`."""

        def own(values, index):
            B, K, n, c, H = values.shape
            count = self.mesh.shape["seq"]
            index = jnp.clip(index, 0, n * c * count - 1)
            here = index // (c * count) * c + index % c
            found = jax.vmap(lambda x, i: jnp.take(x, i, axis=1))(values.reshape(B, K, n * c, H), here)
            mine = index // c % count == jax.lax.axis_index("seq")
            return _from_owner(found, mine[:, None, :, None])

        heads = "tensor" if self.values.shape[1] > 1 else None
        spread = P("data", heads, None, "seq")
        return manual(own, self.mesh, (spread, P("data")), P("data", heads))(self.values, index)


def _from_owner(x: jax.Array, mine: jax.Array) -> jax.Array:
    """`x` of the device of `seq` where `mine` holds, to the bit: added as integers, for -0.0 + 0.0 is 0.0."""
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    return jax.lax.bitcast_convert_type(jax.lax.psum(jnp.where(mine, bits, jnp.zeros_like(bits)), "seq"), x.dtype)


def embed(module: Any, mesh: Mesh | None, tokens: jax.Array, seq_axis: int | None = None) -> jax.Array:
    """`module.embed(tokens[B, ...])` where the vocabulary is split over `tensor`: activations `[B, ..., D]`.

    Left to itself XLA on GPU gathers the whole table in every step (bfloat16, 128,256 tokens: 1 GB).

    Args:
      seq_axis: the axis of `tokens` that is split over `seq`.
    """
    if mesh is None or mesh.shape["tensor"] == 1:
        return module.embed(tokens)

    def own(table, tokens):
        at = tokens - jax.lax.axis_index("tensor") * table.shape[0]
        mine = (at >= 0) & (at < table.shape[0])
        return jax.lax.psum(
            jnp.where(mine[..., None], table[jnp.where(mine, at, 0)], jnp.zeros((), table.dtype)), "tensor"
        )

    axes = ["data", *(None,) * (tokens.ndim - 1)]
    if seq_axis is not None:
        axes[seq_axis] = "seq"
    return manual(own, mesh, (P("tensor"), P(*axes)), P(*axes))(module.embedding[...], tokens)


def order(blocks: int, stripes: int) -> np.ndarray:
    """Where an array of so many blocks holds each: `index[n]` of block n."""
    n = np.arange(blocks)
    return n % stripes * (blocks // stripes) + n // stripes


def _own_stripe(mesh: Mesh) -> Stripe:
    count = mesh.shape["seq"]
    return Stripe(jax.lax.axis_index("seq") if count > 1 else 0, count)


def manual(f: Callable, mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable:
    """`f` on every device's parts: `shard_map` over all axes."""
    # check_vma: kernels' results do not say over which axes they vary.
    return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _facts(cache: KVCache) -> KVCache:
    """The cache without its tokens, but for their type."""
    return dataclasses.replace(cache, segments=(), pending=(jnp.zeros((), cache.dtype),) * 2)


def _blocks_only(segment: Segment) -> Segment:
    rest: dict[str, Any] = dict.fromkeys(("k_recent", "v_recent", "k_sinks", "v_sinks", "dropped", "reads"))
    return dataclasses.replace(segment, **rest)
