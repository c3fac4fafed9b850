"""Outlier slots on TPU: a residual at one channel of a token, apart from the product with keys and values.

Keys and values are left as they are: their channels are on lanes, and a slot would cost a select in every register.

* keys: `score[g, t] += r_t (q_c cos_ct + J(q)_c sin_ct)` for the slot's channel c, with q rotated to where the block
  starts and J(q) = [b, -a] for q = [a, b]. Eight blocks at a time, a row of a register each: cos and sin are gathered
  along sublanes, numbers of the query along lanes, from a row of its own for each block. Nothing passes through the
  matrix units, which keys and values need.
* values: `out[g, c] += sum_t p_t r_t [c = c_t]`, a product with a table that is 1 in one row of each column and 0
  elsewhere. Making the table is what costs: so the channels are cut in PARTS, of which each has rows of weights of its
  own, and the table has as many rows as a part.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention.formats import Codebook
from pallas_kernels.decode_attention.tpu_metadata import HIGH_HALF, by_pieces, halves, take_lanes
from pallas_kernels.decode_attention.tpu_plan import LANES, SUBLANES, Operand, Plan
from pallas_kernels.decode_attention.tpu_rows import LaneOrder, SlotRows, float16_of
from pallas_kernels.decode_attention.tpu_skeleton import CONTRACT_LANES, Refs, Step, over_runs, read_anew

CHANNEL = 0xFF
ONE = 0x3F80  # in bfloat16
PARTS = 2
PIECE = 64  # rows of 128 tokens
EIGHTS = 4  # of blocks, whose look-ups overlap, with 4 query heads; on 7x half as many of 128 tokens: registers spill
OVERLAPPED = 4096  # tokens whose tables do
FIXED = 32767.0  # 1 as a cosine of 16 bits


def take_sublanes(table: jax.Array, index: jax.Array) -> jax.Array:
    """`table[index[i, lane], lane]` of 8 rows (32 rows of bytes)."""
    return jnp.take_along_axis(table, index, axis=0, mode="promise_in_bounds", wrap_negative_indices=False)


@dataclasses.dataclass(frozen=True)
class SlotWords:
    """The slots of a chunk as words, residual above channel: `[s, T/128, blocks, 128]`, with rows to spare.

    Attributes:
      order: `[run_tokens]`, as of a decoder; the same in every block.
    """

    fmt: Codebook
    plan: Plan
    order: np.ndarray

    @property
    def blocks(self) -> int:
        """Rows that are held: eight blocks are looked at together, from wherever an iteration begins."""
        return self.plan.chunk_blocks + SUBLANES

    @property
    def tiles(self) -> int:
        return self.plan.tokens // LANES

    @property
    def _stored(self) -> list[SlotRows]:
        return [SlotRows(x, self.plan) for x in (self.fmt.slot_channel, self.fmt.slot_residual)]

    @property
    def _lanes(self) -> LaneOrder:
        return LaneOrder(self.order, self.plan.tokens)

    def operands(self) -> list[Operand]:
        return [*(x.operand() for x in self._stored), *self._lanes.operands(self.plan)]

    @property
    def count(self) -> int:
        """Operands."""
        return 2 if self._lanes.natural else 3

    def scratch(self) -> list[Any]:
        words = pltpu.VMEM((self.fmt.slots, self.tiles, self.blocks, LANES), jnp.int32)
        return [words, *(x.scratch() for x in self._stored)]

    def chunk(self, operands: Refs, scratch: Refs, step: Step) -> None:
        stored = list(zip(self._stored, operands, scratch[1:]))
        for x, ref, words in stored:
            x.fill(ref, words)

        def piece(first, size):
            for s in range(self.fmt.slots):
                c, r = (x.rows(ref, words, step, s, first, size) for x, ref, words in stored)
                word = r | lax.shift_right_logical(c, jnp.full_like(c, 24))
                for n in range(self.tiles):
                    scratch[0][s, n, pl.ds(first, size)] = word[:, n * LANES : (n + 1) * LANES]

        by_pieces(self.plan.chunk_blocks, PIECE // self.tiles, piece)

    def rows(self, operands: Refs, scratch: Refs, slot: int, tile: int, first: Any) -> jax.Array:
        """`[8, 128]`: one register's width of the words of eight blocks from `first` on, in `order`."""
        return self._lanes.take(operands[2:], scratch[0].at[slot], tile, first, SUBLANES)


def residual(word: jax.Array) -> jax.Array:
    return float16_of(word & HIGH_HALF)


def _log2(n: int) -> int:
    return n.bit_length() - 1


def _eights(plan: Plan) -> int:
    return EIGHTS // 2 if plan.chip == "7x" and plan.tokens == LANES else EIGHTS


def over_eights(blocks: int, together: int, body) -> None:
    """`body(first)` for every eight of the chunk's blocks, so many in one iteration at most."""

    eights = pl.cdiv(blocks, SUBLANES)
    together = math.gcd(eights, max(1, together))

    def several(i, carry):
        for n in range(together):
            body((i * together + n) * SUBLANES)
        return carry

    lax.fori_loop(0, eights // together, several, 0)


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
        together = _eights(plan) * 4 // (plan.rows // plan.copies * (plan.channels // LANES))
        over_eights(plan.chunk_blocks, together, lambda first: self._eight(operands, scratch, first, queries))

    def _eight(self, operands: Refs, scratch: Refs, first: jax.Array, query_refs: Refs) -> None:
        words, plan = self.words, self.words.plan
        angles, cos, sin = operands[words.count :]
        cos, sin = (x[pl.ds(first, SUBLANES)] for x in (cos, sin))
        queries = []
        for g in range(plan.rows // plan.copies):
            q, back = (read_anew(x, first, plan, g, 1) for x in query_refs)
            queries.append(q * cos + back * sin)
        for n in range(words.tiles):
            sums = [jnp.zeros((SUBLANES, LANES), jnp.float32)] * len(queries)
            for slot in range(words.fmt.slots):
                word = words.rows(operands, scratch[1:], slot, n, first)
                sums = [x + y for x, y in zip(sums, self._terms(word, read_anew(angles.at[n], first, plan), queries))]
            for at in range(plan.rows):
                rows = pl.ds(first * plan.rows + at, SUBLANES, stride=plan.rows)
                scratch[0].at[n][rows] = sums[at % len(queries)]

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
        sign = (channel & half) << (31 - _log2(half))  # J(q)_c is -q_{c - H/2} of upper channels
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


@dataclasses.dataclass(frozen=True)
class ValueSlots:
    """What slots add to the weighted values.

    Weights times residuals are a sum of two bfloat16 each: an outlier is the largest part of what it is in, and
    rounding would show. Each slot has rows of weights and rows of the table of its own,
    and all are multiplied at once: what belongs together is picked out at the end.
    """

    words: SlotWords

    @property
    def _channels(self) -> int:
        """Of a part."""
        return self.words.plan.channels // PARTS

    @property
    def _repeats(self) -> int:
        """How often the weights are taken, so that each part has rows of its own."""
        return max(1, PARTS // self.words.plan.copies)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the sums."""
        slots = self.words.fmt.slots
        return slots * self._repeats * self.words.plan.rows, slots * self._channels

    @property
    def _numbers(self) -> int:
        """Rows of numbers per slot: the word and what is in it, and the residual where it is of a part."""
        return 2 + PARTS

    def scratch(self) -> list[Any]:
        words = self.words
        shape = (self._numbers * words.fmt.slots, words.tiles, words.blocks, LANES)
        kept = pltpu.VMEM((words.plan.runs, words.plan.rows, words.plan.run_tokens), jnp.float32)
        return [pltpu.VMEM(shape, jnp.int32), kept, *words.scratch()]

    def chunk(self, operands: Refs, scratch: Refs, step: Step) -> None:
        words = self.words
        words.chunk(operands, scratch[2:], step)

        def eight(first):
            for slot in range(words.fmt.slots):
                for n in range(words.tiles):
                    word = words.rows(operands, scratch[2:], slot, n, first)
                    for i, x in enumerate(self._of(word)):
                        scratch[0][slot * self._numbers + i, n, pl.ds(first, SUBLANES)] = x

        over_eights(words.plan.chunk_blocks, _eights(words.plan), eight)

    def _of(self, word: jax.Array) -> list[jax.Array]:
        channel, r = word & CHANNEL, pltpu.bitcast(residual(word), jnp.int32)
        part = channel >> _log2(self._channels)
        return [
            (channel & (self._channels - 1)) >> 1,
            jnp.where((channel & 1) == 0, ONE, ONE << 16),
            *(jnp.where(part == i, r, 0) for i in range(PARTS)),
        ]

    def sums(self, scratch: Refs) -> jax.Array:
        """Float32, of `shape`: of a chunk whose weights were `kept`.

        A loop of its own: within that of levels there are not registers enough to overlap as many runs.
        """
        plan = self.words.plan
        tokens = OVERLAPPED // (plan.rows // SUBLANES * (plan.channels // LANES))
        plan = dataclasses.replace(plan, unroll=math.gcd(plan.runs, max(1, tokens // plan.run_tokens)))

        def add(run, place, total):
            return total + self._sums(scratch, run, scratch[1][run])

        return over_runs(plan, add, jnp.zeros(self.shape, jnp.float32))

    def keep(self, scratch: Refs, run: jax.Array, p: jax.Array) -> None:
        """For `sums`: the weights `p[R, run_tokens]` of a run."""
        scratch[1][run] = p

    def _sums(self, scratch: Refs, run: jax.Array, p: jax.Array) -> jax.Array:
        weights, tables = [], []
        place = lax.broadcasted_iota(jnp.int32, (self._channels // 2, p.shape[1]), 0)
        for slot in range(self.words.fmt.slots):
            at, one, *parts = (self._row(scratch, slot * self._numbers + i, run) for i in range(self._numbers))
            tables.append(pltpu.bitcast(jnp.where(place == at, one, 0), jnp.bfloat16))
            weights += [p * x for x in self._residuals([pltpu.bitcast(x, jnp.float32) for x in parts], p.shape)]
        left, table = halves(jnp.concatenate(weights, axis=0)), jnp.concatenate(tables, axis=0)
        sums = lax.dot_general(left, table, CONTRACT_LANES, preferred_element_type=jnp.float32)
        return sums[: sums.shape[0] // 2] + sums[sums.shape[0] // 2 :]

    def _row(self, scratch: Refs, number: int, run: jax.Array) -> jax.Array:
        unit, ref = self.words.plan.unit, scratch[0]
        first = run * unit
        parts = [ref[number, n, pl.ds(first + i, 1)] for i in range(unit) for n in range(self.words.tiles)]
        return jnp.concatenate(parts, axis=1)

    def _residuals(self, parts: list[jax.Array], shape: tuple[int, ...]) -> list[jax.Array]:
        """Residuals `[R, run_tokens]` that each of the repeats is multiplied by: its copies are of several parts."""
        copies = min(self.words.plan.copies, PARTS)
        copy = lax.broadcasted_iota(jnp.int32, shape, 0) >> _log2(self.words.plan.rows // self.words.plan.copies)
        out = []
        for first in range(0, PARTS, copies):
            x = jnp.broadcast_to(parts[first], shape)
            for i in range(1, copies):
                x = jnp.where(copy < i, x, parts[first + i])
            out.append(x)
        return out

    def finish(self, sums: jax.Array) -> jax.Array:
        """`[R, H]`, of which the first copies count."""
        plan, slots, width = self.words.plan, self.words.fmt.slots, self._channels
        copies, rows = min(plan.copies, PARTS), self._repeats * plan.rows
        out = jnp.zeros((plan.rows, plan.channels), jnp.float32)
        for slot in range(slots):
            mine = sums[slot * rows : (slot + 1) * rows, slot * width : (slot + 1) * width]
            parts = []
            for part in range(PARTS):
                repeat, copy = divmod(part, copies)
                x = mine[repeat * plan.rows : (repeat + 1) * plan.rows]
                parts.append(jnp.roll(x, -copy * (plan.rows // plan.copies), axis=0) if copy else x)
            out += jnp.concatenate(parts, axis=1)
        return out
