"""The K/V cache: blocks, a ring of recent tokens, sinks. Knows blocks and lengths, never formats or attention.

Positions and storage of a row with `s` sinks, blocks of `T` tokens and `w` tokens that must stay exact:

    position p < s            a sink, exact for ever
    token t = p - s           token t mod T of block t // T
    sealed = max(0, n - s - w) // T      blocks that are encoded once the row holds n tokens (a function of n alone)
    tokens t >= sealed * T    wait in `recent`, in the compute dtype, at index t - sealed * T

Keys and values have windows of their own (`kvjax.attention` says who sees what); w is what both of them need.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from kvjax import reads, sharding
from kvjax.codecs.base import AbstractCodec, Leaf
from kvjax.model.rope import Rope
from kvjax.targets import split

_DTYPES = ("bfloat16", "float16", "float32")


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
    """Cache of L layers that share one codec pair.

    Attributes:
      k, v: sealed blocks, every leaf `[L, B, N, K or 1, ...]`; on TPU small heads stand side by side
        (`kvjax.codecs.joined`).
      k_recent, v_recent: `[L, B, K, R, H]`, tokens not yet sealed, as they came; R is a multiple of T.
      k_sinks, v_sinks: `[L, B, K, s, H]`.
      k_params, v_params: the codecs' fitted constants, leaves `[L, ...]`, or None.
      dropped: `[L, B, K]` int32, elements of sealed blocks that saturated (`AbstractCodec.dropped`).
      reads: `[L, B, n]` float32, what attention read (`kvjax.reads.FIELDS`); None unless a codec is read in part.
      k_codec, v_codec: static.
      layer_ids: the layers of the model, ascending; static.
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
    reads: Leaf
    k_codec: AbstractCodec = dataclasses.field(metadata={"static": True})
    v_codec: AbstractCodec = dataclasses.field(metadata={"static": True})
    layer_ids: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def layers(self) -> int:
        return len(self.layer_ids)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """A model's whole cache; a pytree that is passed in and returned, and donated at the outermost jit.

    Attributes:
      segments: every layer is in one of them.
      length: `[B]` int32, tokens in each row.
      frozen: `[B]` int32, tokens at the start of `recent` that came back from a sealed block when the row was cropped:
        `recent` holds them decoded, and their codes are kept when the block seals again.
      overrun: `[B]` int32, tokens refused for want of capacity under a trace, where no error can be raised.
      pending: keys and values `[L, B, K, S, H]` of the tokens appended since the last `advance`.
      shape: the model's dimensions.
      block, sinks, window, capacity: T, s, w and the tokens that fit; static.
      k_window, v_window: as in `kvjax.policy.Preset`; static.
      policy: the policy's name, for reports; static.
      target: what attention is compiled for (`kvjax.targets`); static.
      mesh: the devices it is spread over (`kvjax.sharding`), or None; static.
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
    k_window: int = dataclasses.field(metadata={"static": True})
    v_window: int = dataclasses.field(metadata={"static": True})
    capacity: int = dataclasses.field(metadata={"static": True})
    policy: str = dataclasses.field(metadata={"static": True})
    target: str = dataclasses.field(metadata={"static": True})
    mesh: jax.sharding.Mesh | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def dtype(self) -> jnp.dtype:
        return self.pending[0].dtype

    @property
    def batch(self) -> int:
        return self.length.shape[0]

    @property
    def stripes(self) -> int:
        """Devices that blocks are dealt out to in turn (`kvjax.striped`)."""
        return sharding.stripes(self.mesh)

    @property
    def reopens(self) -> bool:
        """Whether `crop` may cut a sealed block: statistics over a group of tokens cannot be completed."""
        return all(codec.token_local for s in self.segments for codec in (s.k_codec, s.v_codec))

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
    target: str,
    block: int = 128,
    mesh: jax.sharding.Mesh | None = None,
) -> KVCache:
    """An empty cache; all its memory is allocated here, on a mesh every device's own part only.

    Args:
      shape: the model's dimensions.
      policy: a `kvjax.policy.Policy`: its segments (codec pairs with their params), sinks and windows.
      batch: rows.
      capacity: tokens per row that must fit; rounded up to whole blocks.
      dtype: compute dtype, in which recent tokens and sinks are held.
      target: what attention is compiled for, as in `kvjax.targets`.
      block: tokens per block, a multiple of 32.
      mesh: devices to spread the cache over, from `kvjax.sharding.make_mesh`; None for the default device.
    """
    if batch < 1:
        raise ValueError(f"`batch={batch}` must be at least 1.")
    if not 1 <= capacity < 1 << 30 or capacity != int(capacity):
        raise ValueError(f"`capacity={capacity}` must be a number of tokens from 1 to {(1 << 30) - 1}.")
    if dtype not in (*_DTYPES, *map(jnp.dtype, _DTYPES)):
        raise ValueError(f"`dtype={dtype}` must be one of {', '.join(_DTYPES)}.")
    if shape.q_heads % shape.kv_heads:
        raise ValueError(f"`q_heads={shape.q_heads}` must be a multiple of `kv_heads={shape.kv_heads}`.")
    turned = 2 * jax.tree.leaves(shape.rope)[0].shape[-1]
    if turned != shape.head_dim:
        raise ValueError(f"`rope` turns {turned} channels of a head, and `head_dim={shape.head_dim}`.")
    if block < 32 or block % 32:
        raise ValueError(f"`block={block}` must be a positive multiple of 32 tokens; the default is 128.")
    split(target)
    if mesh is not None:
        sharding.check(mesh, batch=batch, kv_heads=shape.kv_heads)

    def make() -> KVCache:
        return _allocate(shape, policy, batch, capacity, dtype, block, target, mesh)

    if mesh is None:
        return make()
    return jax.jit(make, out_shardings=sharding.cache_shardings(jax.eval_shape(make)))()


def _allocate(
    shape: CacheShape, policy: Any, batch: int, capacity: int, dtype: Any, block: int, target: str, mesh: Any
) -> KVCache:
    sinks, window = policy.sinks, _held_back(policy, block)
    blocks = max(1, -(-(capacity - sinks - window) // block))  # the newest `window` tokens are never in one
    blocks = _even(blocks, sharding.stripes(mesh), target)
    recent = -(-(block - 1 + window) // block) * block
    heads, head_dim = shape.kv_heads, shape.head_dim

    def dense(layers: int, tokens: int) -> jax.Array:
        return jnp.zeros((layers, batch, heads, tokens, head_dim), dtype)

    def storage(codec: AbstractCodec, params: Any, layers: int) -> Any:
        x = jax.ShapeDtypeStruct((heads, block, head_dim), jnp.float32)
        one = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape[1:], p.dtype), params)
        spec = _block_spec(codec, x, *_hashable(one))
        return jax.tree.map(lambda leaf: jnp.zeros((layers, batch, blocks, *leaf.shape), leaf.dtype), spec)

    def counters(part: Any) -> jax.Array | None:
        if not (part.k_codec.reads_in_part or part.v_codec.reads_in_part):
            return None
        return jnp.zeros((len(part.layer_ids), batch, len(reads.FIELDS)), jnp.float32)

    def own(params: Any) -> Any:
        # The cache is donated on every step: it must not share buffers with the policy or with another cache.
        return jax.tree.map(lambda p: jnp.array(p, copy=True), params)

    segments = tuple(
        Segment(
            k=storage(part.k_codec, part.k_params, len(part.layer_ids)),
            v=storage(part.v_codec, part.v_params, len(part.layer_ids)),
            k_recent=dense(len(part.layer_ids), recent),
            v_recent=dense(len(part.layer_ids), recent),
            k_sinks=dense(len(part.layer_ids), sinks),
            v_sinks=dense(len(part.layer_ids), sinks),
            k_params=own(part.k_params),
            v_params=own(part.v_params),
            dropped=jnp.zeros((len(part.layer_ids), batch, shape.kv_heads), jnp.int32),
            reads=counters(part),
            k_codec=part.k_codec,
            v_codec=part.v_codec,
            layer_ids=part.layer_ids,
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
        k_window=policy.k_window,
        v_window=policy.v_window,
        capacity=sinks + blocks * block + window,
        policy=policy.name,
        target=target,
        mesh=mesh,
    )


# XLA on TPU lays an array out by what pads least: with N not whole tiles of 8-bit rows it keeps layers or heads on
# sublanes, where kernels have blocks, and copies all scales and zeros in every step (LLaMA-7B, 10M tokens on 8 v5p,
# 78,125 blocks on each: 1.28 GB of temporaries; 78,144 blocks: 7 MB). Few blocks are not worth the room.
_TILE_BLOCKS, _MANY_BLOCKS = 32, 1024


def _even(blocks: int, stripes: int, target: str) -> int:
    """`blocks` rounded up to the same number on every device of `seq`, and there to whole tiles on TPU."""
    own = -(-blocks // stripes)
    if split(target)[0] == "tpu" and own >= _MANY_BLOCKS:
        own += -own % _TILE_BLOCKS
    return own * stripes


def _hashable(tree: Any) -> tuple[Any, tuple[jax.ShapeDtypeStruct, ...]]:
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple(leaves)


@functools.lru_cache(maxsize=512)
def _block_spec(codec: AbstractCodec, x: jax.ShapeDtypeStruct, structure: Any, params: tuple[Any, ...]) -> Any:
    """Shapes of an encoded block. Kept: tracing `encode` is most of an abstract cache, and plans make hundreds."""
    return jax.eval_shape(codec.encode, x, jax.tree.unflatten(structure, params))


def _held_back(policy: Any, block: int) -> int:
    """The newest tokens that no sealed block may hold, so that `kvjax.attention` can show them as they must be seen."""
    held = 0
    for name, window in (("k", policy.k_window), ("v", policy.v_window)):
        for part in policy.segments:
            codec = getattr(part, f"{name}_codec")
            if codec.token_local:
                held = max(held, window)
                continue
            run, shared = window or block, codec.shared_tokens(block)
            if block % shared:
                raise ValueError(
                    f"`group={shared}` of {codec.describe()} must divide `block={block}`, as 32, 64 and 128 do."
                )
            if run % shared or (run % block and block % run):
                raise ValueError(
                    f"`{name}_window={window}` of {codec.describe()} must be a multiple of the {shared} tokens that "
                    f"share a group, and divide `block={block}` or be a multiple of it; use {shared} or {block}."
                )
            # Runs end with blocks or inside them; a run of several blocks waits until all of it may be seen as stored.
            held = max(held, run - block)
    return held
