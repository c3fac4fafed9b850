"""Scales and zeros on TPU: 16-bit floats by integer operations."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention.tpu_plan import LANES

HIGH_HALF = -65536


def float_scratch(rows: int, width: int) -> Any:
    """Scratch for `[rows, width]` float32, in registers' widths: rows are written with a stride."""
    return pltpu.VMEM((pl.cdiv(width, LANES), rows, min(width, LANES)), jnp.float32)


def store_floats(bits: jax.Array, dtype: str, ref: Any) -> None:
    """Writes 16-bit floats `bits[rows, width]` as float32 to `float_scratch`; TPU has no float16."""
    rows, width = bits.shape
    if rows % 2:
        floats = [float32(bits.astype(jnp.int32) << 16, dtype)]
    else:
        pairs = pltpu.bitcast(bits, jnp.int32)  # rows 2i and 2i + 1
        floats = [float32(pairs << 16, dtype), float32(pairs & HIGH_HALF, dtype)]
    for start, x in enumerate(floats):
        for n in range(pl.cdiv(width, LANES)):
            ref.at[n][pl.ds(start, rows // len(floats), stride=len(floats))] = x[:, n * LANES : (n + 1) * LANES]


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


def split(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32 as a sum of two bfloat16, of 16 bits together: all of a float16."""
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


def by_copy(rows: list[jax.Array], height: int) -> jax.Array:
    """`[height, n]` of d rows `[1, n]`, each on `height / d` sublanes."""
    out = jnp.broadcast_to(rows[0], (height, rows[0].shape[1]))
    if len(rows) > 1:
        sublane = jax.lax.broadcasted_iota(jnp.int32, out.shape, 0)
        for c in range(1, len(rows)):
            out = jnp.where(sublane >= c * (height // len(rows)), rows[c], out)
    return out
