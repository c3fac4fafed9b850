"""TPU decoder of codebook values (KVQuant): a scale and zero per token."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention.tpu_codebook import CodebookStorage
from pallas_kernels.decode_attention.tpu_metadata import HIGH_HALF, by_pieces
from pallas_kernels.decode_attention.tpu_plan import LANES, SUBLANES, Operand
from pallas_kernels.decode_attention.tpu_rows import LaneOrder, SharedRows, float16_of, row
from pallas_kernels.decode_attention.tpu_skeleton import Loaded, Refs, Step
from pallas_kernels.decode_attention.tpu_value_slots import ValueSlots

PIECE = 64  # rows of 128 tokens


@dataclasses.dataclass(frozen=True)
class CodebookValues(CodebookStorage):
    """Values with a scale and zero per token, which the weights take."""

    def scratch(self) -> list[Any]:
        """Table; scale, zero, words of both on the way there, and where the chunk's first block is; slots."""
        plan, rows = self.plan, self._scale_rows
        out = [self._table_scratch()]
        if self.per_token:
            out += [pltpu.VMEM((rows, plan.tokens), jnp.float32)] * 2
            out += [pltpu.VMEM((plan.tokens // LANES, rows, LANES), jnp.int32), pltpu.SMEM((1,), jnp.int32)]
        return out + (self._slots.scratch() if self.fmt.slots else [])

    @property
    def _scale_rows(self) -> int:
        rows = SharedRows(self.plan).rows
        size = PIECE if rows > PIECE else SUBLANES
        return pl.cdiv(rows, size) * size

    @property
    def _lanes(self) -> LaneOrder:
        return LaneOrder(self.order, self.plan.tokens)

    @property
    def _slots(self) -> ValueSlots:
        return ValueSlots(self._words)

    def accumulators(self) -> list[tuple[int, int]]:
        """Weighted levels; weights times zeros, not yet summed over tokens; slots."""
        out = [(self.plan.rows, self.plan.channels), (self.plan.rows, self.plan.run_tokens)]
        return out + ([self._slots.shape] if self.fmt.slots else [])

    def zeros(self) -> Loaded:
        """What is carried: slots only where they are part of the loop."""
        carried = self.accumulators()
        if self.fmt.slots and not self._slots.with_values:
            carried = carried[:2]
        return tuple(jnp.zeros(shape, jnp.float32) for shape in carried)

    def operands(self) -> list[Operand]:
        out = self._operands()
        if self.per_token:
            shared = SharedRows(self.plan)
            out += [*shared.operands(self.fmt.scale), *shared.operands(self.fmt.zero)]
            out += self._lanes.operands(self.plan)
        return out + (self._words.operands() if self.fmt.slots else [])

    def _split(self, refs: Refs) -> tuple[Refs, ...]:
        """Refs of `_operands()`, of scale, zero, what brings them to `order`, slots; scratch, and that of slots."""
        windows = SharedRows(self.plan).windows * self.per_token
        lanes = int(self.per_token and not self._lanes.natural)
        sizes = [self._count, windows, windows, lanes, self._words.count if self.fmt.slots else 0]
        sizes.append(1 + 4 * self.per_token)
        parts, at = [], 0
        for size in sizes:
            parts.append(refs[at : at + size])
            at += size
        return (*parts, refs[at:])

    def start(self, refs: Refs) -> None:
        self._make_table(refs, self._split(refs)[5][0])

    def chunk(self, refs: Refs, step: Step) -> None:
        _, scale, zero, lanes, slots, scratch, slot_scratch = self._split(refs)
        if self.fmt.slots:
            self._slots.chunk(slots, slot_scratch, step)
        if self.per_token:
            self._scales(scale, zero, lanes, scratch, step)

    def _scales(self, scale: Refs, zero: Refs, lanes: Refs, scratch: Refs, step: Step) -> None:
        """Scale and zero of each token, in order, as float32 into scratch."""
        shared, words = SharedRows(self.plan), scratch[3]
        scratch[4][0] = shared.offset(step)
        low = shared.read(zero)
        both = shared.read(scale) | lax.shift_right_logical(low, jnp.full_like(low, 16))
        for n in range(words.shape[0]):
            words[n, : both.shape[0]] = both[:, n * LANES : (n + 1) * LANES]

        def piece(first, size):
            for n in range(words.shape[0]):
                word = self._lanes.take(lanes, words, n, first, size)
                for ref, bits in zip(scratch[1:3], (word & HIGH_HALF, word << 16)):
                    ref[pl.ds(first, size), n * LANES : (n + 1) * LANES] = float16_of(bits)

        by_pieces(self._scale_rows, PIECE // words.shape[0], piece)

    def add(self, refs: Refs, run: jax.Array, p: jax.Array, sums: Loaded) -> Loaded:
        stored, _, _, _, _, scratch, slot_scratch = self._split(refs)
        block, unit = run * self.plan.unit, self.plan.unit
        slots = sums[2:]
        if slots:  # before the levels: the scheduler goes by the order of the program, and would spill
            slots = (slots[0] + self._slots.sums(slot_scratch, run, p),)
        elif self.fmt.slots:
            self._slots.keep(slot_scratch, run, p)
        weights, zeros = p, sums[1]
        if self.per_token:
            scale, zero = (row(x, (), block + scratch[4][0], unit) for x in scratch[1:3])
            weights, zeros = p * scale, zeros + p * zero
        weights, levels = weights.astype(jnp.bfloat16), self._values(scratch[0], stored[0], run)
        parts = [jnp.dot(weights, x.astype(jnp.bfloat16), preferred_element_type=jnp.float32) for x in levels]
        return sums[0] + jnp.concatenate(parts, axis=1), zeros, *slots

    def collect(self, refs: Refs, sums: Loaded) -> Loaded:
        if len(sums) == len(self.accumulators()):
            return sums
        return (*sums, self._slots.kept_sums(self._split(refs)[-1]))

    def finish(self, refs: Refs, sums: Loaded) -> jax.Array:
        out = sums[0] + jnp.sum(sums[1], axis=1, keepdims=True)
        return out + self._slots.finish(sums[2]) if self.fmt.slots else out
