"""Random storage of any size, made on the device: a million tokens are gigabytes, too many to make on the host.

Packed words are fresh random bits. Every other array has rows drawn with replacement from those of a small storage
that `specs.make` (or a codec) made, so the values are as they should be and nothing is zero.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.decode_attention import specs
from pallas_kernels.decode_attention.formats import Dense, Format, Partial, shape_of

_PIECE = 1 << 24  # elements made at a time: their random bits are a temporary
_FEW = 1 << 18  # elements up to which a program is not worth compiling: made on the host


def fill(kind: str, shape: specs.Shape, seed: int) -> Format:
    """As `specs.make`, on the device."""
    few = specs.Shape(2, 1, 4, shape.heads, shape.group, shape.channels, shape.tokens)
    small = specs.make(kind, few, np.random.default_rng(seed))
    lead = (shape.layers, shape.batch, shape.blocks)
    leaves, structure = jax.tree.flatten(small)
    # What is fitted has no axes of rows and blocks: levels [L, n], ranges [L, K, 1, H].
    sizes = [(*lead, *x.shape[3:]) if x.ndim > 4 else (shape.layers, *x.shape[1:]) for x in leaves]
    return jax.tree.unflatten(structure, [draw((seed, i), *xs) for i, xs in enumerate(zip(leaves, sizes))])


def draw(seed: int | tuple[int, ...], sample: Any, shape: tuple[int, ...]) -> jax.Array:
    """Rows (along the last axis) of `sample` at random, or random words where it is uint32."""
    sample, size = sample.reshape(-1, sample.shape[-1]), math.prod(shape)
    rng = np.random.default_rng(seed)
    if size > _FEW:
        return _draw(jax.random.key(rng.integers(1 << 31), impl="rbg"), jnp.asarray(sample), shape)
    if sample.dtype == jnp.uint32:
        return jnp.asarray(rng.integers(0, 1 << 32, shape, np.uint32))
    return jnp.asarray(np.asarray(sample)[rng.integers(0, len(sample), shape[:-1])])


@functools.partial(jax.jit, static_argnames="shape")
def _draw(key, sample, shape):
    lead, last = math.prod(shape[:3]) if len(shape) > 3 else shape[0], shape[-1]
    if len(shape) == 1:
        lead = 1
    rows = math.prod(shape) // (lead * last)  # of one piece at least
    most = max(1, _PIECE // (rows * last))
    per = next(n for n in range(min(most, lead), 0, -1) if lead % n == 0) * rows

    def piece(key):
        if sample.dtype == jnp.uint32:
            return jax.random.bits(key, (per, last), jnp.uint32)
        index = jax.random.bits(key, (per,), jnp.uint32) % jnp.uint32(len(sample))
        return sample[index.astype(jnp.int32)]

    return jax.lax.map(piece, jax.random.split(key, lead * rows // per)).reshape(shape)


def cut(x: Format, layer: int, start: int, blocks: int) -> Format:
    """Blocks `start` to `start + blocks` of one layer, as storage of its own on the host."""

    def take(leaf):
        one = leaf[layer : layer + 1]
        return np.asarray(one[:, :, start : start + blocks] if leaf.ndim > 4 else one)

    return jax.tree.map(take, x)


def bytes_by_part(k: Format, v: Format, q: jax.Array, partial: Partial) -> dict[str, int]:
    """What one layer's attention must move: the whole of k and v, the query and the answer."""
    parts = dict.fromkeys(("keys", "values", "metadata", "slots"), 0)
    for side, x in (("keys", k), ("values", v)):
        layers = shape_of(x)[0]
        for path, leaf in jax.tree_util.tree_leaves_with_path(x):
            name = path[-1].name
            data = "values" if isinstance(x, Dense) else "codes"
            part = side if name == data else "slots" if name.startswith("slot_") else "metadata"
            parts[part] += leaf.nbytes // layers
    return parts | {"query": q.nbytes, "outputs": sum(x.nbytes for x in partial)}
