"""One block of a layer's storage, read and written where it stands, without a copy of the rest.

XLA on TPU lays out what is passed in by its sizes (`kvjax.chips.tiled_order`), and slices, loops and conditionals as it
thinks best: a slice of outlier slots taken row-major has all slots copied to that and back. So what reads and writes
storage says which layout it has (Llama-3-8B, kvquant3, 10M tokens on 32 v5e, "cached" prefill of 8,192: 2.1 GB of
temporaries, and 0.36 with it).

It has blocks of 8-bit numbers on sublanes, four to a word, where neither the heads nor the rows of a block fill
words: outlier slots on devices that have fewer than 4 of a model's heads. It updates whole tiles of such an array in
place, but for a single row copies all of it to another layout and back (Llama-3-8B, kvquant3, 10M tokens on 32 v5e, 1
head on each: 646 MB of temporaries, and 3.5 by tiles).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from kvjax.chips import tiled_order
from kvjax.targets import split

_TILE = 32  # rows of 8-bit numbers


def in_tiles(x: jax.Array, target: str) -> bool:
    """Whether stored `[L, B, N, K, s, T]` has its blocks in tiles (`pallas_kernels.decode_attention.tpu_rows`)."""
    if split(target)[0] != "tpu" or x.ndim != 6 or x.dtype.itemsize != 1:
        return False
    return x.shape[2] % _TILE == 0 and x.shape[3] % 4 != 0 and x.shape[4] % 4 != 0


def like(x: jax.Array, stored: jax.Array, target: str) -> jax.Array:
    """`x` `[l, b, n, ...]`, some of the blocks of `stored` or all, in the layout in which `stored` is passed in.

    XLA on TPU would else choose one for what reads or writes it, and copy the storage to that and back.
    """
    tiled = split(target)[0] == "tpu"
    return _ordered(x, tiled_order(stored.shape, stored.dtype.itemsize) if tiled else tuple(range(stored.ndim)))


@functools.partial(jax.jit, static_argnames="order")
def _ordered(x: jax.Array, order: tuple[int, ...]) -> jax.Array:
    """`x` with its axes from major to minor.

    Under a `jit` of its own: a constraint on what a function returns JAX would take for the layout of its result, and
    refuse to donate to it (0.10.2).
    """
    return with_layout_constraint(x, Layout(order))


def as_stored(x: jax.Array, target: str) -> jax.Array:
    """Storage in the layout in which it is passed in; elsewhere than on TPU XLA keeps to that by itself."""
    return like(x, x, target) if split(target)[0] == "tpu" else x


def read(x: jax.Array, layer: Any, row: Any, block: Any, target: str) -> jax.Array:
    """The block `[1, 1, ...]` at (layer, row, block) of storage `[L, B, N, ...]`."""
    if in_tiles(x, target):
        # Not by a slice of the tile: XLA makes one slice of both.
        tile = _slice(x, layer, row, block // _TILE * _TILE, _TILE, target)
        return jnp.where(_in_tile(block), tile, jnp.zeros((), x.dtype)).max(2, keepdims=True)[0]
    return _slice(x, layer, row, block, 1, target)[0]


def write(x: jax.Array, new: jax.Array, layer: Any, row: Any, block: Any, target: str) -> jax.Array:
    """The storage with `new` `[1, 1, ...]` there."""
    new = new[None]
    if in_tiles(x, target):
        tile = block // _TILE * _TILE
        new, block = jnp.where(_in_tile(block), new, _slice(x, layer, row, tile, _TILE, target)), tile
    at = (layer, row, block) + (0,) * (x.ndim - 3)
    new = like(new, x, target)
    return as_stored(jax.lax.dynamic_update_slice(as_stored(x, target), new, at), target)


def _in_tile(block: Any) -> jax.Array:
    return jnp.arange(_TILE).reshape(1, 1, _TILE, 1, 1, 1) == block % _TILE


def _slice(x: jax.Array, layer: Any, row: Any, block: Any, count: int, target: str) -> jax.Array:
    at = (layer, row, block) + (0,) * (x.ndim - 3)
    return like(jax.lax.dynamic_slice(as_stored(x, target), at, (1, 1, count, *x.shape[3:])), x, target)
