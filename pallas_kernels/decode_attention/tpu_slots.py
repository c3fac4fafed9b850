"""Outlier slots on TPU: a residual at one channel of a token, as products with tables that are zero elsewhere.

Keys and values are left as they are: their channels are on lanes, and a slot would cost a select in every register.
Instead tables with channels on sublanes and tokens on lanes keep one row of each column (kernels-guide section 5):

* keys: `score[g, t] += r_t (q_c cos_ct + J(q)_c sin_ct)` for the slot's channel c, J(q) = [b, -a] for q = [a, b]. Both
  halves of the channels have the same cos and sin: rows of [q; J(q)] serve the lower and the upper half.
* values: `out[g, c] += sum_t p_t r_t [c = c_t]`.

Tables are bfloat16, two channels to a 32-bit word.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention.tpu_metadata import split
from pallas_kernels.decode_attention.tpu_skeleton import CONTRACT_LANES

LOW, HIGH = 0xFFFF, -0x10000  # the halves of a word, as int32
ONE = 0x3F80  # in bfloat16


def key_rows(channel: list[jax.Array], residual: list[jax.Array], channels: int) -> list[jax.Array]:
    """What `key_scores` needs of each slot, int32 `[n, tokens]`: word, mask, residual of lower and of upper channels.

    Args:
      channel: int32 `[n, tokens]`, per slot.
      residual: float32.
      channels: H.
    """
    rows = []
    for c, r in zip(channel, residual):
        upper = c >= channels // 2
        c = jnp.where(upper, c - channels // 2, c)
        halves = [jnp.where(upper, 0.0, r), jnp.where(upper, r, 0.0)]
        rows += [c >> 1, jnp.where((c & 1) == 0, LOW, HIGH), *(pltpu.bitcast(x, jnp.int32) for x in halves)]
    return rows


def key_scores(rows: list[jax.Array], q: jax.Array, cos: jax.Array, sin: jax.Array, joint: int) -> jax.Array:
    """`[R, tokens]` float32, the slots' part of the scores.

    Args:
      rows: int32 `[1, tokens]` each, four per slot, of `key_rows`.
      q: `[2 R, H]` bfloat16, [q; J(q)] at the run's start.
      cos, sin: int32 `[H/4, tokens]`, words of two channels.
      joint: slots per matrix product.
    """
    slots = list(zip(*(rows[i::4] for i in range(4))))
    total = jnp.zeros((q.shape[0] // 2, cos.shape[1]), jnp.float32)
    for at in range(0, len(slots), joint):
        total += _joint_scores(slots[at : at + joint], q, cos, sin)
    return total


def _joint_scores(slots: list[tuple[jax.Array, ...]], q: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """As `key_scores`, by one product: tables below each other, the query once for each, zero elsewhere."""
    word = lax.broadcasted_iota(jnp.int32, cos.shape, 0)
    tables = []
    for at, mask, _, _ in slots:
        mask = jnp.where(word == at, mask, 0)
        tables += [cos & mask, sin & mask]
    none = jnp.zeros_like(q)
    queries = [jnp.concatenate([q if i == j else none for j in range(len(slots))], axis=1) for i in range(len(slots))]
    score = jnp.dot(
        jnp.concatenate(queries, axis=0),
        pltpu.bitcast(jnp.concatenate(tables, axis=0), jnp.bfloat16),
        preferred_element_type=jnp.float32,
    )
    total, count = jnp.zeros((q.shape[0] // 2, cos.shape[1]), jnp.float32), q.shape[0] // 2
    for i, (_, _, lower, upper) in enumerate(slots):
        parts = (score[(2 * i + n) * count : (2 * i + n + 1) * count] for n in range(2))
        total += sum(x * pltpu.bitcast(r, jnp.float32) for x, r in zip(parts, (lower, upper)))
    return total


def value_rows(channel: list[jax.Array], residual: list[jax.Array]) -> list[jax.Array]:
    """What `value_sums` needs of each slot, int32 `[n, tokens]`: its word, 1 in the half of its channel, residual."""
    rows = []
    for c, r in zip(channel, residual):
        rows += [c >> 1, jnp.where((c & 1) == 0, ONE, ONE << 16), pltpu.bitcast(r, jnp.int32)]
    return rows


def value_sums(rows: list[jax.Array], p: jax.Array, channels: int) -> jax.Array:
    """`[R, H]` float32, the slots' part of the weighted values.

    Weights times residuals are a sum of two bfloat16 each: an outlier is the largest part of what it is in, and
    rounding both it and its weight would show.

    Args:
      rows: int32 `[1, tokens]` each, three per slot, of `value_rows`.
      p: `[R, tokens]` float32.
    """
    word = lax.broadcasted_iota(jnp.int32, (channels // 2, p.shape[1]), 0)
    total = jnp.zeros((2 * p.shape[0], channels), jnp.float32)
    for at, one, residual in zip(*(rows[i::3] for i in range(3))):
        weights = jnp.concatenate(split(p * pltpu.bitcast(residual, jnp.float32)), axis=0)
        table = pltpu.bitcast(jnp.where(word == at, one, 0), jnp.bfloat16)
        total += lax.dot_general(weights, table, CONTRACT_LANES, preferred_element_type=jnp.float32)
    return total[: p.shape[0]] + total[p.shape[0] :]
