"""Scales and zeros on TPU: 16-bit floats by integer operations, and per-token rows in the order of a decoder."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention import tpu_codes as codes
from pallas_kernels.decode_attention.formats import Affine
from pallas_kernels.decode_attention.tpu_plan import Operand, Plan
from pallas_kernels.decode_attention.tpu_skeleton import Refs


def to_float(bits: jax.Array, dtype: str) -> jax.Array:
    """16-bit patterns as float32; TPU has no float16.

    The exponent of a float16 is moved into place and 112 too small. Subnormal ones (below 6.2e-5) may come out as 0.
    """
    high = bits.astype(jnp.int32) << 16
    if dtype == "bfloat16":
        return pltpu.bitcast(high, jnp.float32)
    assert dtype == "float16"
    # The arithmetic shift fills three bits below the sign with copies of it.
    return pltpu.bitcast((high >> 3) & jnp.int32(~0x70000000), jnp.float32) * jnp.float32(2.0**112)


def split(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32 as a sum of two bfloat16, of 16 bits together: all of a float16."""
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


def permutation(order: np.ndarray) -> jax.Array:
    """`[tokens, tokens]` bfloat16 that takes rows of natural order to `order` from the right."""
    return jnp.asarray(np.arange(len(order))[:, None] == order[None, :], jnp.bfloat16)


def token_operands(fmt: Affine, plan: Plan, order: np.ndarray) -> list[Operand]:
    """Scale and zero per token, and what brings them to `order`."""
    return [plan.stored(fmt.scale), plan.stored(fmt.zero), plan.constant(permutation(order))]


def token_scratch(fmt: Affine, plan: Plan) -> list[Any]:
    groups = fmt.scale.shape[-2]
    return [pltpu.VMEM((plan.runs, 2 * groups, plan.run_tokens), jnp.float32)]


def token_chunk(fmt: Affine, plan: Plan, operands: Refs, scratch: Refs) -> None:
    """Scale, and zero plus the scale of the middle code, of all runs of a chunk into scratch."""
    scale_ref, zero_ref, matrix = operands
    groups = fmt.scale.shape[-2]
    several = plan.unroll

    def body(i, carry):
        rows = []
        for j in range(several):
            blocks = [(i * several + j) * plan.unit + n for n in range(plan.unit)]
            scale, zero = (
                jnp.concatenate([to_float(ref[n], fmt.dtype) for n in blocks], axis=1) for ref in (scale_ref, zero_ref)
            )
            rows += [scale, zero + jnp.float32(codes.middle(fmt.bits)) * scale]
        high, low = split(jnp.concatenate(rows, axis=0))
        both = jnp.dot(jnp.concatenate([high, low], axis=0), matrix[...], preferred_element_type=jnp.float32)
        count = both.shape[0] // 2
        scratch[0][pl.ds(i * several, several)] = (both[:count] + both[count:]).reshape(several, 2 * groups, -1)
        return carry

    lax.fori_loop(0, plan.runs // several, body, 0)


def token_rows(scratch: Refs, run: jax.Array, groups: int) -> tuple[jax.Array, jax.Array]:
    """Scale and zero `[groups, run_tokens]` of a run."""
    rows = scratch[0][run]
    return rows[:groups], rows[groups:]
