"""One block of a layer's storage, read and written where it stands, without a copy of the rest.

XLA on TPU has blocks of 8-bit numbers on sublanes, four to a word, where neither the heads nor the rows of a block fill
words: outlier slots on devices that have fewer than 4 of a model's heads. It updates whole tiles of such an array in
place, but for a single row copies all of it to another layout and back (Llama-3-8B, kvquant3, 10M tokens on 32 v5e, 1
head on each: 646 MB of temporaries, and 3.5 by tiles).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from kvjax.targets import split

_TILE = 32  # rows of 8-bit numbers


def in_tiles(x: jax.Array, target: str) -> bool:
    """Whether stored `[L, B, N, K, s, T]` has its blocks in tiles (`pallas_kernels.decode_attention.tpu_rows`)."""
    if split(target)[0] != "tpu" or x.ndim != 6 or x.dtype.itemsize != 1:
        return False
    return x.shape[2] % _TILE == 0 and x.shape[3] % 4 != 0 and x.shape[4] % 4 != 0


def read(x: jax.Array, layer: Any, row: Any, block: Any, target: str) -> jax.Array:
    """The block `[1, 1, ...]` at (layer, row, block) of storage `[L, B, N, ...]`."""
    if in_tiles(x, target):
        # Not by a slice of the tile: XLA makes one slice of both.
        tile = _tile(x, layer, row, block)
        return jnp.where(_in_tile(block), tile, jnp.zeros((), x.dtype)).max(2, keepdims=True)[0]
    rest = x.shape[3:]
    return jax.lax.dynamic_slice(x, (layer, row, block) + (0,) * len(rest), (1, 1, 1, *rest))[0]


def write(x: jax.Array, new: jax.Array, layer: Any, row: Any, block: Any, target: str) -> jax.Array:
    """The storage with `new` `[1, 1, ...]` there."""
    rest = (0,) * (x.ndim - 3)
    if not in_tiles(x, target):
        return jax.lax.dynamic_update_slice(x, new[None], (layer, row, block, *rest))
    tile = _as_stored(jnp.where(_in_tile(block), new[None], _tile(x, layer, row, block)))
    return _as_stored(jax.lax.dynamic_update_slice(_as_stored(x), tile, (layer, row, block // _TILE * _TILE, *rest)))


def _in_tile(block: Any) -> jax.Array:
    return jnp.arange(_TILE).reshape(1, 1, _TILE, 1, 1, 1) == block % _TILE


def _tile(x: jax.Array, layer: Any, row: Any, block: Any) -> jax.Array:
    start = (layer, row, block // _TILE * _TILE) + (0,) * (x.ndim - 3)
    return _as_stored(jax.lax.dynamic_slice(_as_stored(x), start, (1, 1, _TILE, *x.shape[3:])))


def _as_stored(x: jax.Array) -> jax.Array:
    return with_layout_constraint(x, Layout((0, 1, 3, 4, 2, 5)))
