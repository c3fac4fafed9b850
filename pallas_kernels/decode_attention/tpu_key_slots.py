"""What the outlier slots of keys add to scores on TPU.

`score[g, t] += r_t (q_c cos_ct + J(q)_c sin_ct)` for the slot's channel c, with q rotated to where the block starts and
J(q) = [b, -a] for q = [a, b]. Eight blocks at a time, a row of a register each: cos and sin are gathered along
sublanes, numbers of the query along lanes, from a row of its own for each block. Nothing passes through the matrix
units, which keys and values need.

Gathers along lanes take long, so they are part of the loop over keys, which has the time; all that is the same for all
queries is made before, in a loop that is nothing but arithmetic: in one loop with the keys it would fill registers.
"""

import dataclasses
from collections.abc import Callable
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
        """What slots add to scores; residuals times cos, and times sin; queries where each block starts; words."""
        words, plan = self.words, self.words.plan
        scores = pltpu.VMEM((words.tiles, words.blocks * plan.rows, LANES), jnp.float32)
        turned = pltpu.VMEM((words.fmt.slots, words.tiles, words.blocks, LANES), jnp.float32)
        queries = pltpu.VMEM((self._queries, words.blocks, plan.channels), jnp.float32)
        return [scores, turned, turned, queries, *words.scratch()]

    @property
    def _queries(self) -> int:
        return self.words.plan.rows // self.words.plan.copies

    @property
    def _with_keys(self) -> bool:
        """Whether scores are made in the loop over keys: where queries are few, and heads not wide."""
        return self.words.plan.copies > 1 and self.words.plan.channels <= LANES

    def chunk(self, operands: Refs, scratch: Refs, step: Step, queries: Refs) -> None:
        """What comes before the scores of a chunk. Words are left as their channels, in the order of keys.

        Args:
          queries: two of float32 `[R, H]`, the queries at the chunk's start and J of them.
        """
        words, plan = self.words, self.words.plan
        words.chunk(operands, scratch[4:], step)

        def turn_slots(first):
            rows = pl.ds(first, SUBLANES)
            for slot in range(words.fmt.slots):
                ordered = [words.rows(operands, scratch[4:], slot, n, first) for n in range(words.tiles)]
                for n, word in enumerate(ordered):
                    angles = read_anew(operands[words.count].at[n], first, plan)
                    for ref, x in zip((*scratch[1:3], scratch[4]), self._turned(word, angles)):
                        ref[slot, n, rows] = x

        def turn_queries(first):
            self._turn_queries(operands, scratch[3], first, queries)

        def add(first):
            self._add(scratch, first)

        together = eights_together(plan)
        loops: list[tuple[Callable[[jax.Array], None], ...]] = [(turn_slots, turn_queries)]
        if not self._with_keys:
            together = together * 4 // (self._queries * (plan.channels // LANES))
            many = self._queries_together < self._queries  # one loop would spill
            loops = [(turn_slots,), (turn_queries, add)] if many else [(turn_slots, turn_queries, add)]
        for bodies in loops:
            over_eights(plan.chunk_blocks, together, lambda first, bodies=bodies: [body(first) for body in bodies])

    def _turn_queries(self, operands: Refs, out: Any, first: jax.Array, queries: Refs) -> None:
        plan = self.words.plan
        cos, sin = (x[pl.ds(first, SUBLANES)] for x in operands[self.words.count + 1 :])
        for g in range(self._queries):
            q, back = (read_anew(x, first, plan, g, 1) for x in queries)
            out[g, pl.ds(first, SUBLANES)] = q * cos + back * sin

    def _turned(self, word: jax.Array, angles: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of one slot and eight blocks, `[8, 128]`: residuals times cos, and times sin with its sign; channels."""
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
        return a, pltpu.bitcast(pltpu.bitcast(b, jnp.int32) ^ sign, jnp.float32), channel

    def prepare(self, scratch: Refs, run: jax.Array, place: int) -> None:
        """Before the scores of a run, at its place in the iteration."""
        plan = self.words.plan
        if self._with_keys and place * plan.unit % SUBLANES == 0:
            self._add(scratch, run * plan.unit)

    def _add(self, scratch: Refs, first: jax.Array) -> None:
        """Makes what slots add to the scores of eight blocks."""
        words, plan = self.words, self.words.plan
        rows, together = pl.ds(first, SUBLANES), self._queries_together
        for n in range(words.tiles):
            sums = []
            for at in range(0, self._queries, together):
                queries = [scratch[3][g, rows] for g in range(at, at + together)]
                part = [jnp.zeros((SUBLANES, LANES), jnp.float32)] * together
                for slot in range(words.fmt.slots):
                    a, b, channel = (x[slot, n, rows] for x in (*scratch[1:3], scratch[4]))
                    other = channel ^ (plan.channels // 2)
                    part = [x + (a * _at(q, channel) + b * _at(q, other)) for x, q in zip(part, queries)]
                sums += part
            for at in range(plan.rows):
                scratch[0].at[n][pl.ds(first * plan.rows + at, SUBLANES, stride=plan.rows)] = sums[at % len(sums)]

    @property
    def _queries_together(self) -> int:
        """All, for gathers by the same index follow each other faster, unless queries fill too many registers.

        kvquant4 with 16 queries and heads of 256 on v6e: 244.1 bundles and 379 spills with all, 236.0 and 284 with 8,
        237.3 and 280 with 4. With heads of 128: 107.8 and 29 with all, 109.9 and 29 with 8.
        """
        return self._queries if self._queries * (self.words.plan.channels // LANES) <= 16 else 8

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
