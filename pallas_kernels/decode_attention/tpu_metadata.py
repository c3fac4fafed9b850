"""Scales and zeros on TPU: 16-bit floats by integer operations."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention.tpu_plan import LANES, SUBLANES, Plan

HIGH_HALF = -65536
MAGNITUDE = 0x7FFF0000
LARGEST_PIECE = 32  # blocks


def float_scratch(rows: int, width: int) -> Any:
    """Scratch for `[rows, width]` float32, in registers' widths: rows are written with a stride."""
    return pltpu.VMEM((pl.cdiv(width, LANES), rows, min(width, LANES)), jnp.float32)


def viewed(ref: Any) -> Any:
    """16-bit `ref[1, 1, blocks, n, rows, 128]` as int32 `[all rows / 2, 128]`: as pairs of rows lie in memory."""
    return ref.bitcast(jnp.int32).reshape(math.prod(ref.shape[2:5]) // 2, LANES)


def can_view(rows: int, width: int, plan: Plan) -> bool:
    """Whether 16-bit `[..., rows, width]` may be looked at as by `viewed`: the words of `rows` end no tile midway."""
    return plan.views and width == LANES and (SUBLANES % (rows // 2) == 0 or rows // 2 % SUBLANES == 0)


def words(ref: Any, first: Any, blocks: int, plan: Plan) -> jax.Array:
    """int32 `[all rows / 2, width]` of 16-bit `ref[1, 1, blocks, n, rows, width]`: rows 2i, 2i + 1 above them."""
    parts, rows, width = ref.shape[3:]
    if can_view(rows, width, plan):
        return viewed(ref)[pl.ds(first * (parts * rows // 2), blocks * parts * rows // 2)]
    return pltpu.bitcast(ref[0, 0, pl.ds(first, blocks)].reshape(blocks * parts * rows, width), jnp.int32)


def store_floats(source: Any, first: Any, plan: Plan, dtype: str, ref: Any) -> None:
    """Writes an iteration's 16-bit floats of `source[1, 1, blocks, 1, rows, width]` as float32 to `float_scratch`."""
    rows, width = source.shape[4:]
    blocks = plan.unroll * plan.unit
    if rows % 2:
        bits = source[0, 0, pl.ds(first, blocks), 0].reshape(blocks * rows, width)
        floats = [float32(bits.astype(jnp.int32) << 16, dtype)]
    else:
        pairs = words(source, first, blocks, plan)
        floats = [float32(pairs << 16, dtype), float32(pairs & HIGH_HALF, dtype)]
    for start, x in enumerate(floats):
        for n in range(pl.cdiv(width, LANES)):
            at = pl.ds(start, x.shape[0], stride=len(floats))
            ref.at[n][at] = x[:, n * LANES : (n + 1) * LANES]


def read_floats(ref: Any, rows: slice = slice(None)) -> jax.Array:
    """`[rows, width]` of `float_scratch`."""
    return jnp.concatenate([ref[n, rows] for n in range(ref.shape[0])], axis=1)


def float32(bits: jax.Array, dtype: str) -> jax.Array:
    """The 16-bit floats in the high halves of int32, whose low halves are 0, as float32.

    The exponent of a float16 is moved into place and 112 too small. Subnormal ones (below 6.2e-5) may come out as 0.
    """
    if dtype == "bfloat16":
        return pltpu.bitcast(bits, jnp.float32)
    assert dtype == "float16"
    # The arithmetic shift fills three bits below the sign with copies of it.
    return pltpu.bitcast((bits >> 3) & jnp.int32(~0x70000000), jnp.float32) * jnp.float32(2.0**112)


def by_pieces(rows: int, size: int, body: Callable[[Any, int], None]) -> None:
    """`body` of the first row of each piece of `size` rows or less: registers would not hold all at once."""
    size = math.gcd(rows, size)

    def piece(i, carry):
        body(i * size, size)
        return carry

    if rows == size:
        body(0, size)
    else:
        lax.fori_loop(0, rows // size, piece, 0)


def largest(ref: Any, dtype: str, plan: Plan) -> jax.Array:
    """`[1, width]` float32: the largest magnitude in each column of 16-bit `ref[1, 1, blocks, n, rows, width]`."""
    _, _, blocks, parts, rows, width = ref.shape
    if rows % 2:
        pairs = ref[0, 0].reshape(blocks * parts * rows, width).astype(jnp.int32)
        return float32(largest_half(pairs).max(axis=0, keepdims=True), dtype)
    size = math.gcd(blocks, LARGEST_PIECE)
    height = size * parts * rows // 2
    step = SUBLANES if height % SUBLANES == 0 else height

    def piece(i, top):
        halves = largest_half(words(ref, i * size, size, plan))
        return jnp.maximum(top, halves.reshape(-1, step, width).max(axis=0))

    top = lax.fori_loop(0, blocks // size, piece, jnp.zeros((step, width), jnp.int32))
    return float32(top.max(axis=0, keepdims=True), dtype)


def largest_half(pairs: jax.Array) -> jax.Array:
    """The larger magnitude of two 16-bit floats in each word, in the upper bits: ordered as the numbers are."""
    return jnp.maximum((pairs << 16) & MAGNITUDE, pairs & MAGNITUDE)


def split(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32 as a sum of two bfloat16, of 16 bits together: all of a float16."""
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


def halves(x: jax.Array) -> jax.Array:
    """bfloat16 `[2 * R, n]` of float32 `[R, n]`: the upper halves, and below them what they lack, 16 bits together."""
    high = pltpu.bitcast(pltpu.bitcast(x, jnp.int32) & HIGH_HALF, jnp.float32)
    return jnp.concatenate([high, x - high], axis=0).astype(jnp.bfloat16)


def by_copy(rows: list[jax.Array], height: int) -> jax.Array:
    """`[height, n]` of d rows `[1, n]`, each on `height / d` sublanes."""
    out = jnp.broadcast_to(rows[0], (height, rows[0].shape[1]))
    if len(rows) > 1:
        sublane = jax.lax.broadcasted_iota(jnp.int32, out.shape, 0)
        for c in range(1, len(rows)):
            out = jnp.where(sublane >= c * (height // len(rows)), rows[c], out)
    return out


def take_lanes(x: jax.Array, lane: jax.Array) -> jax.Array:
    """`x[i, lane[i, j]]` of `[rows, 128]`, rows in whole sublanes."""
    return jnp.take_along_axis(x, lane, axis=1, mode="promise_in_bounds", wrap_negative_indices=False)
