"""Queries turned to where a block starts, compiled by numba, for keys that are stored before RoPE."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numba

from pallas_kernels.decode_attention.formats import Rotation
from pallas_kernels.decode_attention.numba_constants import floats_at
from pallas_kernels.native_cpu import JIT

RADIX = 64  # blocks that a table of angles reaches


def digits(blocks: int) -> int:
    """Of a block's number, to the base `RADIX`."""
    return 1 if blocks <= RADIX else 1 + digits(-(-blocks // RADIX))


def rotation_angles(rotation: Rotation, blocks: int, tokens: int) -> list[jax.Array]:
    """cos and sin, side by side, `[.., H]`: of the query's position, of a block's tokens, and of blocks.

    The last for each digit of a block's number: so tables do not grow with the context.
    """
    places = [RADIX**digit * tokens * jnp.arange(RADIX, dtype=jnp.int32) for digit in range(digits(blocks))]
    starts = rotation.place(jnp.concatenate(places), tokens)
    offsets = (rotation.position, jnp.arange(tokens, dtype=jnp.int32), starts)
    return [jnp.concatenate(rotation.angles(x), axis=-1) for x in offsets]


@numba.njit(**JIT)
def leave_queries(out, queries, angle, row, block, count, buffers):
    """Keys are stored after RoPE, and so are the queries."""


@functools.cache
def turn_queries(group: int, channels: int) -> Callable:
    half = channels // 2

    @numba.njit(**JIT)
    def turn(out, queries, angle, row, block, count, buffers):
        """Queries as seen from where a block starts: turned by position - start."""
        position = floats_at(buffers, 5)[row * channels :]
        for h in range(channels):
            angle[h] = position[h]
        for d in range(count):
            start = floats_at(buffers, 7)[(d * RADIX + block % RADIX) * channels :]
            cos, sin = start[:half], start[half:channels]
            for h in range(half):
                c, s = angle[h], angle[half + h]
                angle[h], angle[half + h] = c * cos[h] + s * sin[h], s * cos[h] - c * sin[h]
            block //= RADIX
        for g in range(group):
            low, high = queries[g, :half], queries[g, half:]
            for h in range(half):
                c, s = angle[h], angle[half + h]
                out[g, h], out[g, half + h] = low[h] * c - high[h] * s, high[h] * c + low[h] * s

    return turn
