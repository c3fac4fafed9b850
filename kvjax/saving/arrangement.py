"""Saves of caches that keep heads side by side (`kvjax.codecs.joined`), loaded by such that do not, and the reverse."""

import functools
from typing import Any

import jax
from jax.sharding import NamedSharding

from kvjax import sharding
from kvjax.cache import KVCache
from kvjax.codecs.joined import JoinedCodec, inner


def as_saved(cache: KVCache, saved: list[list[int]]) -> dict[str, tuple[Any, Any]]:
    """Leaves of an abstract cache that stand otherwise in a save: by name the saved array, and what makes it theirs.

    Args:
      saved: heads side by side in the save, of keys and of values, by segment.
    """
    found = {}
    shape = cache.shape.kv_heads, cache.shape.head_dim
    for i, segment in enumerate(cache.segments):
        for side, before in zip(("k", "v"), saved[i]):
            codec = getattr(segment, f"{side}_codec")
            if getattr(codec, "heads", 1) == before:
                continue
            then = JoinedCodec(inner(codec), before)
            for name, leaf in vars(getattr(segment, side)).items():
                if leaf is None:
                    continue
                back = functools.partial(_moved, codec, then, name, *shape)
                was = jax.eval_shape(back, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
                move = jax.jit(functools.partial(_moved, then, codec, name, *shape), out_shardings=leaf.sharding)
                found[f"segments.{i}.{side}.{name}"] = (_placed(was, cache), move)
    return found


def _moved(now: Any, to: Any, name: str, kv_heads: int, channels: int, x: jax.Array) -> jax.Array:
    if isinstance(now, JoinedCodec) and now.heads > 1:
        x = now.separate_leaf(name, x, kv_heads, channels)
    if isinstance(to, JoinedCodec) and to.heads > 1:
        x = to.join_leaf(name, x, channels)
    return x


def _placed(x: jax.ShapeDtypeStruct, cache: KVCache) -> jax.ShapeDtypeStruct:
    """On the cache's mesh; whole where there are fewer heads than devices for them."""
    if cache.mesh is None:
        return x
    axes = list(sharding.spec("sealed", x))
    axes[3] = axes[3] if x.shape[3] % cache.mesh.shape["tensor"] == 0 else None
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(cache.mesh, jax.sharding.PartitionSpec(*axes)))
