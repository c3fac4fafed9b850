"""Scales and zeros on TPU: 16-bit floats by integer operations, and per-token rows in the order of a decoder."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention.formats import Affine
from pallas_kernels.decode_attention.tpu_codes import Encoding
from pallas_kernels.decode_attention.tpu_plan import LANES, Operand, Plan
from pallas_kernels.decode_attention.tpu_skeleton import Refs

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


class TokenMetadata:
    """Scale and (centred) zero of each token, brought to the order of a decoder for several runs at once.

    A permutation of tokens is a product with a matrix of zeros and ones; scales and zeros go through it as two
    bfloat16 each. Where the order mixes the tokens of several blocks, each block has its own matrix and the results
    add up.
    """

    def __init__(self, fmt: Affine, plan: Plan, encoding: Encoding):
        self.fmt, self.plan, self.encoding = fmt, plan, encoding
        self.groups = fmt.scale.shape[-2]
        order = encoding.order(plan.unit, plan.tokens)
        self.together = plan.unit
        while (
            self.together > 1 and (order[: self.together * plan.tokens // 2] < self.together * plan.tokens // 2).all()
        ):
            self.together //= 2
        self.order = order[: self.together * plan.tokens]

    def operands(self) -> list[Operand]:
        tokens = self.plan.tokens
        matrix = np.arange(self.together * tokens)[:, None] == self.order[None, :]
        matrix = np.concatenate(np.split(matrix, self.together, axis=0), axis=1)
        stored = (self.plan.stored(x) for x in (self.fmt.scale, self.fmt.zero))
        return [*stored, self.plan.constant(jnp.asarray(matrix, jnp.bfloat16))]

    def scratch(self) -> list[Any]:
        rows, tokens = self.plan.unroll * self.plan.unit * self.groups, self.plan.tokens
        shape = (rows, self.together**2 * tokens)
        return [*(pltpu.VMEM(shape, jnp.float32) for _ in range(2)), *(float_scratch(rows, tokens) for _ in range(2))]

    def prepare(self, operands: Refs, scratch: Refs, i: jax.Array) -> None:
        """Scale, and zero plus the scale of the middle code, of an iteration's runs into scratch."""
        blocks = self.plan.unroll * self.plan.unit
        rows, tokens = blocks * self.groups, self.plan.tokens
        for ref, raw in zip(operands, scratch[2:]):
            store_floats(ref[pl.ds(i * blocks, blocks)].reshape(rows, tokens), self.fmt.dtype, raw)
        scale, zero = (read_floats(raw) for raw in scratch[2:])
        zero = zero + jnp.float32(self.encoding.middle) * scale
        parts = jnp.concatenate([*split(scale), *split(zero)], axis=0)
        parts = jnp.dot(parts, operands[2][...], preferred_element_type=jnp.float32)
        for n, out in enumerate(scratch[:2]):
            out[...] = parts[2 * n * rows : (2 * n + 1) * rows] + parts[(2 * n + 1) * rows : (2 * n + 2) * rows]

    def row(self, ref: Any, place: int, group: int) -> jax.Array:
        """`[1, run_tokens]` of one group of channels of a run that was prepared."""
        width = self.together * self.plan.tokens
        pieces = []
        for i in range(0, self.plan.unit, self.together):
            at = [(place * self.plan.unit + i + n) * self.groups + group for n in range(self.together)]
            parts = [ref[row : row + 1, n * width : (n + 1) * width] for n, row in enumerate(at)]
            pieces.append(sum(parts[1:], parts[0]))
        return jnp.concatenate(pieces, axis=1)


def by_copy(rows: list[jax.Array], height: int) -> jax.Array:
    """`[height, n]` of d rows `[1, n]`, each on `height / d` sublanes."""
    out = jnp.broadcast_to(rows[0], (height, rows[0].shape[1]))
    if len(rows) > 1:
        sublane = jax.lax.broadcasted_iota(jnp.int32, out.shape, 0)
        for c in range(1, len(rows)):
            out = jnp.where(sublane >= c * (height // len(rows)), rows[c], out)
    return out
