"""Random storage of any size, made on the device: a million tokens are gigabytes, too many to make on the host.

Packed words are fresh random bits. Every other array has rows drawn with replacement from those of a small storage
that `specs.make` (or a codec) made, so the values are as they should be and nothing is zero.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.model import rope
from pallas_kernels.decode_attention import api, specs
from pallas_kernels.decode_attention.formats import Dense, Format, Partial, Planes, Rotation, shape_of

_FEW = 1 << 18  # elements up to which a program is not worth compiling: made on the host


def fill(kind: str, shape: specs.Shape, seed: int) -> Format:
    """As `specs.make`, on the device."""
    few = specs.Shape(2, 1, 4, shape.heads, shape.group, shape.channels, shape.tokens)
    with jax.ensure_compile_time_eval():
        small = specs.make(kind, few, np.random.default_rng(seed))
    lead = (shape.layers, shape.batch, shape.blocks)
    if isinstance(small, Planes):
        return _planes(small, shape, seed)
    leaves, structure = jax.tree.flatten(small)
    # What is fitted has no axes of rows and blocks: levels [L, n], ranges [L, K, 1, H].
    sizes = [(*lead, *x.shape[3:]) if x.ndim > 4 else (shape.layers, *x.shape[1:]) for x in leaves]
    return jax.tree.unflatten(structure, [draw((seed, i), *xs) for i, xs in enumerate(zip(leaves, sizes))])


def _planes(small: Planes, shape: specs.Shape, seed: int) -> Planes:
    """Random words but for the upper bit of exponents: numbers below 2. The level of the first block is that of all."""
    lead = (shape.layers, shape.batch, shape.blocks)
    first, *rest = (draw((seed, i), x, (*lead, *x.shape[3:])) for i, x in enumerate(small.planes))
    levels = jnp.full((shape.batch, shape.blocks, shape.heads), small.levels[0, 0, 0], jnp.int32)
    return dataclasses.replace(small, planes=(first & jnp.uint32(0xBFBFBFBF), *rest), levels=levels)


def in_runs(k: Format, v: Format, group: int, implementation: api.Implementation, chip: str) -> tuple[Format, Format]:
    """Planes with a level for each run of blocks that the implementation reads to one; other storage as it is."""
    if not (isinstance(k, Planes) and isinstance(v, Planes)):
        return k, v
    api.check(k, v, group, implementation, chip, False)
    run = api.run(k, implementation)
    k, v = (dataclasses.replace(x, run=run, levels=x.levels[:, ::run]) for x in (k, v))
    return k, v


def rotation(channels: int, position: Any) -> Rotation:
    """As `specs.rotation`, by the library's angles: float32 products, of which two do not add up, are off by 1e-3 rad
    at 32,768 tokens, more than what is checked."""
    angles = functools.partial(rope.cos_sin, rope.make_rope(channels, 2048))
    return Rotation(jnp.asarray(position, jnp.int32), angles)


def draw(seed: int | tuple[int, ...], sample: Any, shape: tuple[int, ...]) -> jax.Array:
    """Rows (along the last axis) of `sample` at random, or random words where it is uint32."""
    sample = sample.reshape(-1, sample.shape[-1])
    rng = np.random.default_rng(seed)
    if math.prod(shape) > _FEW:
        return _draw(jnp.uint32(rng.integers(1 << 32)), jnp.asarray(sample), shape)
    if sample.dtype == jnp.uint32:
        return jnp.asarray(rng.integers(0, 1 << 32, shape, np.uint32))
    return jnp.asarray(np.asarray(sample)[rng.integers(0, len(sample), shape[:-1])])


@functools.partial(jax.jit, static_argnames="shape")
def _draw(seed, sample, shape):
    # A hash of the place: nothing is kept beside the result, and on GPU it compiles six times faster than JAX's bits.
    rows, last = math.prod(shape[:-1]), shape[-1]
    row = _mixed(jax.lax.broadcasted_iota(jnp.uint32, (rows, 1), 0) ^ seed)
    if sample.dtype == jnp.uint32:
        return _mixed(row + jax.lax.broadcasted_iota(jnp.uint32, (1, last), 1)).reshape(shape)
    return sample[(row[:, 0] % jnp.uint32(len(sample))).astype(jnp.int32)].reshape(shape)


def _mixed(x: jax.Array) -> jax.Array:
    """MurmurHash3's finalizer (Appleby, public domain): every bit of uint32 `x` changes half of the result's."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> jnp.uint32(shift))) * jnp.uint32(factor)
    return x ^ (x >> jnp.uint32(16))


def cut(x: Format, layer: int, start: int, blocks: int) -> Format:
    """Blocks `start` to `start + blocks` of one layer, as storage of its own."""

    def take(leaf):
        return leaf[layer : layer + 1, :, start : start + blocks] if leaf.ndim > 4 else leaf[layer : layer + 1]

    if isinstance(x, Planes):
        planes = tuple(take(plane) for plane in x.planes)
        return dataclasses.replace(x, planes=planes, levels=x.levels[:, start : start + blocks])
    return jax.tree.map(take, x)


def bytes_by_part(k: Format, v: Format, q: jax.Array, partial: Partial) -> dict[str, int]:
    """What one layer's attention must move: the whole of k and v (of planes what is read), the query and the answer."""
    parts = dict.fromkeys(("keys", "values", "metadata", "slots"), 0)
    for side, x in (("keys", k), ("values", v)):
        layers = shape_of(x)[0]
        if isinstance(x, Planes):
            level = int(x.levels[0, 0, 0])
            parts[side] += sum(plane.nbytes for plane in x.planes[:level]) // layers
            parts["metadata"] += x.levels.nbytes
            continue
        for path, leaf in jax.tree_util.tree_leaves_with_path(x):
            name = path[-1].name
            data = "values" if isinstance(x, Dense) else "codes"
            part = side if name == data else "slots" if name.startswith("slot_") else "metadata"
            parts[part] += leaf.nbytes // layers
    return parts | {"query": q.nbytes, "outputs": sum(x.nbytes for x in partial)}
