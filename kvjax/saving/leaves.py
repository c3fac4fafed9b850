"""Arrays of a save: their names, their checksums, and the order of their blocks.

A cache on P stripes holds block n of the context at index (n mod P) * N/P + n // P of the N axis (`kvjax.striped`).
With other N or P the blocks change places, in place and one layer of one array at a time. On a mesh a device gives all
others a share of every block that it holds, sorts what it got, and gives it back: two all-to-all messages, and no
device ever holds more of a layer than its own share, twice: as sent and as received.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kvjax.sharding import on_host
from kvjax.striped import manual, order

_PRIMES = (2654435761, 2246822519, 3266489917, 668265263, 374761393, 2860486313, 1500450271)


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by where they are in it, as in "segments.0.k.codes"."""
    return {
        ".".join(str(getattr(key, "name", getattr(key, "idx", getattr(key, "key", key)))) for key in path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def digests(leaves: Mapping[str, Any]) -> dict[str, int]:
    """A checksum of each array's bits: the same on any mesh, and with zeros behind the end of any axis.

    The sum over elements of bits * w1[i1] * w2[i2] * ..., modulo 2**32, with odd weights for the indices: one element
    that differs is always noticed, anything else with probability 1 - 2**-32.
    """
    sums = {name: _digest(leaf) for name, leaf in leaves.items()}
    return {name: int(on_host(value)) for name, value in sums.items()}


@jax.jit
def _digest(x: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    for axis in reversed(range(x.ndim)):  # the last first: then the others are of few numbers
        weights = 2 * (jnp.arange(x.shape[axis], dtype=jnp.uint32) * jnp.uint32(_PRIMES[axis])) + 1
        bits = (bits * weights.reshape((1,) * axis + (-1,))).sum(-1, dtype=jnp.uint32)
    return bits


def restripe(x: jax.Array, blocks: int, stripes: int, new_blocks: int, mesh: Mesh | None, spec: P) -> jax.Array:
    """Moves the blocks of one array of sealed storage to where a cache on `mesh` has them.

    Where x has N = `new_blocks` already the result takes its place; else both are there until the caller lets x go.

    Args:
      x: consumed, `[L, B, N, ...]`: the first `blocks` indices are of `stripes` stripes, the others empty (zeros).
      new_blocks: N of the result, a multiple of the mesh's `seq`; blocks beyond are forgotten, or empty.
      mesh, spec: how x and the result lie.
    """
    new_stripes = 1 if mesh is None else mesh.shape["seq"]
    source = np.full(new_blocks, x.shape[2], np.int32)  # out of bounds: there is no such block
    both = min(blocks, new_blocks)
    source[order(new_blocks, new_stripes)[:both]] = order(blocks, stripes)[:both]
    if x.shape[2] == new_blocks and (source[:both] == np.arange(both)).all():
        return x
    return (_move_in_place if x.shape[2] == new_blocks else _move)(x, source, mesh, spec)


def _moved(x: jax.Array, source: jax.Array, mesh: Mesh | None, spec: P) -> jax.Array:
    if mesh is None:
        return _layer_by_layer(x, source.shape[0], lambda layer: _pick(layer, source))
    count = mesh.shape["seq"]

    def own(x, source):
        return _layer_by_layer(x, source.shape[0] // count, lambda layer: _exchange(layer, source, count))

    return manual(own, mesh, (spec, P()), spec)(x, source)


_move = jax.jit(_moved, static_argnames=("mesh", "spec"))
_move_in_place = jax.jit(_moved, static_argnames=("mesh", "spec"), donate_argnames="x")


def _layer_by_layer(x: jax.Array, blocks: int, move: Any) -> jax.Array:
    """`move` of every layer of `x[L, B, N, ...]`, in place where N stays."""
    in_place = x.shape[2] == blocks
    out = x if in_place else jnp.zeros((*x.shape[:2], blocks, *x.shape[3:]), x.dtype)

    def body(layer, out):
        now = jax.lax.dynamic_index_in_dim(out if in_place else x, layer, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(out, move(now), layer, 0)

    return jax.lax.fori_loop(0, x.shape[0], body, out)


def _pick(layer: jax.Array, source: jax.Array) -> jax.Array:
    """Blocks `source[N']` of `layer[B, N, ...]`; zeros where there is none."""
    return jnp.take(layer, source, axis=1, mode="fill", fill_value=0)


def _exchange(layer: jax.Array, source: jax.Array, count: int) -> jax.Array:
    """`_pick` over `count` devices: `layer[B, N/count, ...]` to `[B, N'/count, ...]`."""
    inner = layer.shape[2:]
    # An axis as it is, for with a flattened one XLA on TPU compiles for a minute (reshaped tiles): one that divides,
    # else the longest, padded.
    axis = 2 + next((i for i, size in enumerate(inner) if size % count == 0), int(np.argmax(inner)))
    size = layer.shape[axis]
    padding = [(0, -size % count if i == axis else 0) for i in range(layer.ndim)]
    shares = jax.lax.all_to_all(jnp.pad(layer, padding), "seq", split_axis=axis, concat_axis=1, tiled=True)
    back = jax.lax.all_to_all(_pick(shares, source), "seq", split_axis=1, concat_axis=axis, tiled=True)
    return jax.lax.slice_in_dim(back, 0, size, axis=axis)
