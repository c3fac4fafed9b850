"""What the outlier slots of keys add to scores on TPU.

`score[g, t] += r_t (q_c cos_ct + J(q)_c sin_ct)` for the slot's channel c, with q rotated to where the block starts and
J(q) = [b, -a] for q = [a, b]. Eight blocks at a time, a row of a register each: cos and sin are gathered along
sublanes, numbers of the query along lanes, from a row of its own for each block. Nothing passes through the matrix
units, which keys and values need.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention.tpu_metadata import take_lanes
from pallas_kernels.decode_attention.tpu_plan import LANES, SUBLANES, Operand
from pallas_kernels.decode_attention.tpu_skeleton import Refs, Step, read_anew
from pallas_kernels.decode_attention.tpu_slots import CHANNEL, SlotWords, eights_together, log2, over_eights, residual

FIXED = 32767.0  # 1 as a cosine of 16 bits


def take_sublanes(table: jax.Array, index: jax.Array) -> jax.Array:
    """`table[index[i, lane], lane]` of 8 rows (32 rows of bytes)."""
    return jnp.take_along_axis(table, index, axis=0, mode="promise_in_bounds", wrap_negative_indices=False)


@dataclasses.dataclass(frozen=True)
class KeySlots:
    """What slots add to the scores of a chunk."""

    words: SlotWords

    def operands(self, cos: jax.Array, sin: jax.Array, cos_block: jax.Array, sin_block: jax.Array) -> list[Operand]:
        """
        Args:
          cos, sin: `[T, H/2]`, of the tokens within a block, in order.
          cos_block, sin_block: `[chunk_blocks, H/2]`, of the starts of the chunk's blocks from the chunk's.
        """
        plan, missing = self.words.plan, self.words.blocks - self.words.plan.chunk_blocks
        high, low = (jnp.round(x.T * FIXED).astype(jnp.int32) for x in (cos, sin))
        both = ((high << 16) | (low & 0xFFFF)).reshape(-1, self.words.tiles, LANES).swapaxes(0, 1)
        wide = [jnp.pad(jnp.concatenate([x, x], axis=1), ((0, missing), (0, 0))) for x in (cos_block, sin_block)]
        return [*self.words.operands(), plan.constant(both), *(plan.constant(x) for x in wide)]

    @property
    def count(self) -> int:
        return self.words.count + 3

    def scratch(self) -> list[Any]:
        scores = pltpu.VMEM((self.words.tiles, self.words.blocks * self.words.plan.rows, LANES), jnp.float32)
        return [scores, *self.words.scratch()]

    def chunk(self, operands: Refs, scratch: Refs, step: Step, queries: Refs) -> None:
        """Makes the scores of a chunk.

        Args:
          queries: two of float32 `[R, H]`, the queries at the chunk's start and J of them.
        """
        self.words.chunk(operands, scratch[1:], step)
        plan = self.words.plan
        together = eights_together(plan) * 4 // (plan.rows // plan.copies * (plan.channels // LANES))
        over_eights(plan.chunk_blocks, together, lambda first: self._eight(operands, scratch, first, queries))

    def _eight(self, operands: Refs, scratch: Refs, first: jax.Array, query_refs: Refs) -> None:
        words, plan = self.words, self.words.plan
        angles, cos, sin = operands[words.count :]
        cos, sin = (x[pl.ds(first, SUBLANES)] for x in (cos, sin))
        queries = []
        for g in range(plan.rows // plan.copies):
            q, back = (read_anew(x, first, plan, g, 1) for x in query_refs)
            queries.append(q * cos + back * sin)
        together = self._queries_together(len(queries))
        for n in range(words.tiles):
            sums = []
            for at in range(0, len(queries), together):
                some = queries[at : at + together]
                part = [jnp.zeros((SUBLANES, LANES), jnp.float32)] * len(some)
                for slot in range(words.fmt.slots):
                    word = words.rows(operands, scratch[1:], slot, n, first)
                    part = [x + y for x, y in zip(part, self._terms(word, read_anew(angles.at[n], first, plan), some))]
                sums += part
            for at in range(plan.rows):
                rows = pl.ds(first * plan.rows + at, SUBLANES, stride=plan.rows)
                scratch[0].at[n][rows] = sums[at % len(queries)]

    def _queries_together(self, count: int) -> int:
        """All, for gathers by the same index follow each other faster, unless queries fill too many registers.

        kvquant4 with 16 queries and heads of 256 on v6e: 244.1 bundles and 379 spills with all, 236.0 and 284 with 8,
        237.3 and 280 with 4. With heads of 128: 107.8 and 29 with all, 109.9 and 29 with 8.
        """
        return count if count * (self.words.plan.channels // LANES) <= 16 else 8

    def _terms(self, word: jax.Array, angles: jax.Array, queries: list[jax.Array]) -> list[jax.Array]:
        """Per query, one slot's part of the scores of eight blocks: `[8, 128]`."""
        channels = self.words.plan.channels
        half, channel = channels // 2, word & CHANNEL
        angle = [take_sublanes(angles[i : i + SUBLANES], channel & (SUBLANES - 1)) for i in range(0, half, SUBLANES)]
        bit = SUBLANES
        while len(angle) > 1:
            odd = (channel & bit) != 0
            angle = [jnp.where(odd, b, a) for a, b in zip(angle[::2], angle[1::2])]
            bit *= 2
        r = residual(word) * jnp.float32(2.0**-16 / FIXED)
        a, b = (r * x.astype(jnp.float32) for x in (angle[0], angle[0] << 16))
        sign = (channel & half) << (31 - log2(half))  # J(q)_c is -q_{c - H/2} of upper channels
        b = pltpu.bitcast(pltpu.bitcast(b, jnp.int32) ^ sign, jnp.float32)
        return [a * _at(q, channel) + b * _at(q, channel ^ half) for q in queries]

    def scores(self, scratch: Refs, run: jax.Array) -> jax.Array:
        """`[R, run_tokens]`."""
        plan, ref = self.words.plan, scratch[0]
        parts = [
            ref.at[n][pl.ds((run * plan.unit + block) * plan.rows, plan.rows)]
            for block in range(plan.unit)
            for n in range(self.words.tiles)
        ]
        return jnp.concatenate(parts, axis=1)


def _at(x: jax.Array, channel: jax.Array) -> jax.Array:
    """`x[i, channel[i, j]]` of `[8, H]`."""
    out = take_lanes(x[:, :LANES], channel & (LANES - 1))
    for at in range(LANES, x.shape[1], LANES):
        out = jnp.where(channel < at, out, take_lanes(x[:, at : at + LANES], channel & (LANES - 1)))
    return out
