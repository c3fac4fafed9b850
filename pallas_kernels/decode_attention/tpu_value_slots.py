"""What the outlier slots of values add to weighted values on TPU.

`out[g, c] += sum_t p_t r_t [c = c_t]`, a product with a table that is 1 in one row of each column and 0 elsewhere.
Making the table is what costs: so the channels are cut in PARTS, of which each has rows of weights of its own, and the
table has as many rows as a part.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention.tpu_metadata import halves
from pallas_kernels.decode_attention.tpu_plan import BF16_ARITHMETIC, LANES, SUBLANES
from pallas_kernels.decode_attention.tpu_skeleton import CONTRACT_LANES, Refs, Step, over_runs
from pallas_kernels.decode_attention.tpu_slots import CHANNEL, SlotWords, eights_together, log2, over_eights, residual

ONE = 0x3F80  # in bfloat16
PARTS = 2
OVERLAPPED = 8192  # tokens whose tables overlap in a loop of their own; on 7x half as many, 1.0 bundles less


@dataclasses.dataclass(frozen=True)
class ValueSlots:
    """What slots add to the weighted values.

    Weights times residuals are a sum of two bfloat16 each: an outlier is the largest part of what it is in, and
    rounding would show. Where the tables of all slots fill no more than a register's lanes and there are few queries,
    one product takes them: each slot has rows of weights and rows of the table of its own, and what belongs together is
    picked out at the end. With 4 queries kvquant4 takes 71.7 bundles on v6e so, and 73.6 with a product for each slot.
    With 16 on v5e a product for each has no spills rather than 160, in 166.9 bundles and not 167.3; with heads of 256
    104 rather than 806, in 343.0 and not 419.9.
    """

    words: SlotWords

    @property
    def _channels(self) -> int:
        """Of a part."""
        return self.words.plan.channels // PARTS

    @property
    def shape(self) -> tuple[int, int]:
        """Of the sums."""
        return self._together * self._repeats * self.words.plan.rows, self._together * self._channels

    @property
    def _together(self) -> int:
        """Slots of one product, side by side."""
        slots = self.words.fmt.slots
        few = self.words.plan.rows == SUBLANES and slots * self._channels <= LANES
        return slots if few else 1

    @property
    def _repeats(self) -> int:
        """How often the weights are taken, so that each part has rows of its own."""
        return max(1, PARTS // self.words.plan.copies)

    @property
    def with_values(self) -> bool:
        """Whether slots are part of the loop over values, which on v5 waits for arithmetic and slots for matrix units.

        Only where registers suffice. On later chips values wait for matrix units too: kvquant4 on v6e would take 1.4
        bundles more with 20 spills rather than none.
        """
        plan = self.words.plan
        return plan.chip not in BF16_ARITHMETIC and plan.copies > 1 and plan.channels <= LANES

    @property
    def _numbers(self) -> int:
        """Rows of numbers per slot: row and half of the table, and the residual where it is of a part."""
        return 2 + PARTS

    def scratch(self) -> list[Any]:
        words = self.words
        shape = (self._numbers * words.fmt.slots, words.tiles, words.blocks, LANES)
        kept = pltpu.VMEM((words.plan.runs, words.plan.rows, words.plan.run_tokens), jnp.float32)
        return [pltpu.VMEM(shape, jnp.int32), *words.scratch(), *([] if self.with_values else [kept])]

    def chunk(self, operands: Refs, scratch: Refs, step: Step) -> None:
        words = self.words
        words.chunk(operands, scratch[1:], step)

        def eight(first):
            for slot in range(words.fmt.slots):
                for n in range(words.tiles):
                    word = words.rows(operands, scratch[1:], slot, n, first)
                    for i, x in enumerate(self._of(word)):
                        scratch[0][slot * self._numbers + i, n, pl.ds(first, SUBLANES)] = x

        over_eights(words.plan.chunk_blocks, eights_together(words.plan), eight)

    def _of(self, word: jax.Array) -> list[jax.Array]:
        channel, r = word & CHANNEL, pltpu.bitcast(residual(word), jnp.int32)
        part = channel >> log2(self._channels)
        return [
            (channel & (self._channels - 1)) >> 1,
            jnp.where((channel & 1) == 0, ONE, ONE << 16),
            *(jnp.where(part == i, r, 0) for i in range(PARTS)),
        ]

    def keep(self, scratch: Refs, run: jax.Array, p: jax.Array) -> None:
        """For `kept_sums`: the weights `p[R, run_tokens]` of a run."""
        scratch[-1][run] = p

    def kept_sums(self, scratch: Refs) -> jax.Array:
        """As `sums`, of a chunk whose weights were kept: a loop of its own."""
        plan = self.words.plan
        tokens = OVERLAPPED // (plan.rows // SUBLANES * (plan.channels // LANES) * (2 if plan.chip == "7x" else 1))
        plan = dataclasses.replace(plan, unroll=math.gcd(plan.runs, max(1, tokens // plan.run_tokens)))

        def add(run, place, total):
            return total + self.sums(scratch, run, scratch[-1][run])

        return over_runs(plan, add, jnp.zeros(self.shape, jnp.float32))

    def sums(self, scratch: Refs, run: jax.Array, p: jax.Array) -> jax.Array:
        """Float32, of `shape`: of a run with weights `p[R, run_tokens]`."""
        place = lax.broadcasted_iota(jnp.int32, (self._channels // 2, p.shape[1]), 0)
        weights, tables, sums = [], [], jnp.zeros((2 * self.shape[0], self.shape[1]), jnp.float32)
        for slot in range(self.words.fmt.slots):
            at, one, *parts = (self._row(scratch, slot * self._numbers + i, run) for i in range(self._numbers))
            tables.append(pltpu.bitcast(jnp.where(place == at, one, 0), jnp.bfloat16))
            residuals = self._residuals([pltpu.bitcast(x, jnp.float32) for x in parts], p.shape)
            weights.append(jnp.concatenate([p * x for x in residuals], axis=0))
        for i in range(0, len(tables), self._together):
            left, table = (jnp.concatenate(x[i : i + self._together], axis=0) for x in (weights, tables))
            sums += lax.dot_general(halves(left), table, CONTRACT_LANES, preferred_element_type=jnp.float32)
        return sums[: self.shape[0]] + sums[self.shape[0] :]

    def _row(self, scratch: Refs, number: int, run: jax.Array) -> jax.Array:
        unit, ref = self.words.plan.unit, scratch[0]
        first = run * unit
        parts = [ref[number, n, pl.ds(first + i, 1)] for i in range(unit) for n in range(self.words.tiles)]
        return jnp.concatenate(parts, axis=1)

    def _residuals(self, parts: list[jax.Array], shape: tuple[int, ...]) -> list[jax.Array]:
        """Residuals `[R, run_tokens]` that each of the repeats is multiplied by: its copies are of several parts."""
        copies = min(self.words.plan.copies, PARTS)
        copy = lax.broadcasted_iota(jnp.int32, shape, 0) >> log2(self.words.plan.rows // self.words.plan.copies)
        out = []
        for first in range(0, PARTS, copies):
            x = jnp.broadcast_to(parts[first], shape)
            for i in range(1, copies):
                x = jnp.where(copy < i, x, parts[first + i])
            out.append(x)
        return out

    def finish(self, sums: jax.Array) -> jax.Array:
        """`[R, H]`, of which the first copies count."""
        plan, width = self.words.plan, self._channels
        copies, rows = min(plan.copies, PARTS), self._repeats * plan.rows
        out = jnp.zeros((plan.rows, plan.channels), jnp.float32)
        for n in range(self._together):
            mine = sums[n * rows : (n + 1) * rows, n * width : (n + 1) * width]
            parts = []
            for part in range(PARTS):
                repeat, copy = divmod(part, copies)
                x = mine[repeat * plan.rows : (repeat + 1) * plan.rows]
                parts.append(jnp.roll(x, -copy * (plan.rows // plan.copies), axis=0) if copy else x)
            out += jnp.concatenate(parts, axis=1)
        return out
