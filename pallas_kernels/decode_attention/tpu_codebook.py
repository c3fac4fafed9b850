"""TPU decoders of codebook storage (KVQuant): keys per channel, rotated on the fly, and values per token."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention.formats import Codebook, Rotation, shape_of
from pallas_kernels.decode_attention.tpu_key_slots import KeySlots
from pallas_kernels.decode_attention.tpu_levels import Levels
from pallas_kernels.decode_attention.tpu_metadata import HIGH_HALF, by_pieces, halves
from pallas_kernels.decode_attention.tpu_plan import LANES, SUBLANES, Operand, Plan
from pallas_kernels.decode_attention.tpu_rows import LaneOrder, SharedRows, float16_of, row
from pallas_kernels.decode_attention.tpu_skeleton import CONTRACT_LANES, Loaded, Refs, Step, read_anew
from pallas_kernels.decode_attention.tpu_slots import SlotWords
from pallas_kernels.decode_attention.tpu_value_slots import ValueSlots


def check_codebook(fmt: Codebook) -> None:
    tokens = shape_of(fmt)[4]
    if fmt.bits == 3 and tokens % 256:
        raise NotImplementedError(
            f"3-bit codes of {tokens} tokens take {tokens * 3 // 32} rows, which XLA lays out in an order that the TPU "
            "kernel cannot read without a copy of the cache; use blocks of 256 tokens."
        )


def check_codebook_keys(fmt: Codebook, rotates: bool) -> None:
    check_codebook(fmt)
    if fmt.slots and not rotates:
        raise NotImplementedError("the TPU kernel reads outlier slots of keys that are stored before RoPE only.")
    if fmt.per == "token":
        raise NotImplementedError("the TPU kernel reads codebook keys with a scale per channel, not per token.")


def turned(x: jax.Array) -> jax.Array:
    """J(x) = [b, -a] for x = [a, b] along the last axis: a quarter turn back."""
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([b, -a], axis=-1)


PIECE = 64  # rows of 128 tokens


@dataclasses.dataclass(frozen=True)
class _Codebook:
    """What keys and values share: levels, and rows of numbers per token."""

    fmt: Codebook
    plan: Plan

    @property
    def levels(self) -> Levels:
        return Levels(self.fmt.bits, self.plan, rounded=self.per_token)

    @property
    def order(self) -> np.ndarray:
        return self.levels.order

    @property
    def per_token(self) -> bool:
        return self.fmt.per == "token"

    def _operands(self) -> list[Operand]:
        """Codes, levels, scale and zero per channel."""
        fmt, plan = self.fmt, self.plan
        out = [plan.stored(fmt.codes), _scalars(fmt.levels)]
        if fmt.per == "channel":
            out += [plan.per_head(fmt.scale), plan.per_head(fmt.zero)]
        return out

    @property
    def _count(self) -> int:
        """Of `_operands()`."""
        return 2 + 2 * (self.fmt.per == "channel")

    @property
    def _words(self) -> SlotWords:
        return SlotWords(self.fmt, self.plan, self.order)

    def _table_scratch(self) -> Any:
        rows, dtype = self.levels.table_shape
        return pltpu.VMEM((rows, self.plan.channels), dtype)

    def _make_table(self, refs: Refs, out) -> None:
        """The table of this layer and head; scale and zero per channel are part of it."""
        levels = [refs[1][0, i] for i in range(2**self.fmt.bits)]
        if self.fmt.per == "channel":
            rows = [x * refs[2][...] + refs[3][...] for x in levels]
        else:
            rows = [jnp.full((1, self.plan.channels), x, jnp.float32) for x in levels]
        out[...] = self.levels.table(rows)

    def _values(self, table, codes, run) -> list[jax.Array]:
        """`[run_tokens, lanes]` of the run, per register of channels."""
        unit = self.plan.unit
        out = []
        for at in range(0, self.plan.channels, LANES):
            lanes = slice(at, min(at + LANES, self.plan.channels))

            def load(block, row, rows, lanes=lanes):
                return codes[run * unit + block, row : row + rows, lanes]

            out.append(jnp.concatenate(self.levels.values(table[:, lanes], load), axis=0))
        return out


@dataclasses.dataclass(frozen=True)
class CodebookKeys(_Codebook):
    """Keys with a scale per channel; stored before RoPE where `rotation` is given.

    A run's scores are [q, J(q)] . [k cos, k sin]: q rotated to the run's start, cos and sin of the tokens within it.
    """

    rotation: Rotation | None
    first: jax.Array | None  # `[B]`, first token that is seen

    def operands(self) -> list[Operand]:
        out = self._operands()
        if self.rotation is None:
            return out
        plan = self.plan
        assert self.first is not None
        offsets = self.rotation.position[:, None] - self._place(plan.starts(jnp.maximum(self.first, 0)))
        start = jnp.concatenate(self.rotation.angles(offsets), axis=-1)[:, :, None]
        run = self._place(jnp.arange(plan.runs, dtype=jnp.int32) * plan.run_tokens)
        cos, sin = self.rotation.angles(self._place(jnp.asarray(self.order, jnp.int32)))  # of the tokens within a run
        wide = [jnp.concatenate([x, x], axis=-1).astype(self.levels.dtype) for x in (cos, sin)]
        out += [plan.per_chunk(start), *(plan.constant(x) for x in wide)]
        out += [plan.constant(jnp.concatenate([x, x], axis=-1)) for x in self.rotation.angles(run)]
        if self.fmt.slots:
            block = self._place(jnp.arange(plan.chunk_blocks, dtype=jnp.int32) * plan.tokens)
            out += self._slots.operands(cos[: plan.tokens], sin[: plan.tokens], *self.rotation.angles(block))
        return out

    @property
    def _slots(self) -> KeySlots:
        return KeySlots(self._words)

    def _place(self, token: jax.Array) -> jax.Array:
        assert self.rotation is not None
        return self.rotation.place(token, self.plan.tokens)

    def scratch(self) -> list[Any]:
        """Table; of q and J(q): halves for each run of an iteration, and float32 at the chunk's start; slots."""
        plan = self.plan
        rotated = [
            pltpu.VMEM((2, plan.unroll, 2 * plan.rows, plan.channels), jnp.bfloat16),
            *(pltpu.VMEM((plan.rows, plan.channels), jnp.float32) for _ in range(2)),
        ]
        return [self._table_scratch(), *rotated, *(self._slots.scratch() if self.fmt.slots else [])]

    def _split(self, refs: Refs) -> tuple[Refs, Refs, Refs, Refs]:
        """Refs of `_operands()`, of the rotation, of the slots, and scratch."""
        ends = [self._count]
        ends.append(ends[0] + (0 if self.rotation is None else 5))
        ends.append(ends[1] + (self._slots.count if self.fmt.slots else 0))
        return refs[: ends[0]], refs[ends[0] : ends[1]], refs[ends[1] : ends[2]], refs[ends[2] :]

    def start(self, refs: Refs, q: jax.Array) -> None:
        stored, _, _, scratch = self._split(refs)
        self._make_table(stored, scratch[0])
        if self.rotation is None:
            scratch[1][0, 0] = halves(q)

    def chunk(self, refs: Refs, step: Step, q: jax.Array) -> None:
        _, rotation, slots, scratch = self._split(refs)
        if not rotation:
            return
        cos, sin = _both_halves(rotation[0][...])
        q = q * cos - turned(q) * sin
        scratch[2][...], scratch[3][...] = q, turned(q)
        if self.fmt.slots:
            self._slots.chunk(slots, scratch[4:], step, scratch[2:4])

    def prepare(self, refs: Refs, i: jax.Array, q: jax.Array) -> None:
        """Queries rotated to the start of each run of an iteration."""
        _, rotation, _, scratch = self._split(refs)
        if not rotation:
            return
        plan = self.plan
        for place in range(plan.unroll):
            run = i * plan.unroll + place
            q, back = (read_anew(scratch[2 + n], run, plan) for n in range(2))
            cos, sin = (x[pl.ds(run, 1)] for x in rotation[3:])
            scratch[1][0, place] = halves(q * cos + back * sin)
            scratch[1][1, place] = halves(back * cos - q * sin)

    def _angle(self, ref: Any, run: jax.Array) -> jax.Array:
        """cos or sin of the tokens within a run.

        With heads of 256 they would fill all registers of a v6e if they stayed there: kvquant4 has 50 spills and takes
        150.6 bundles, not 384 and 152.1. (Not at 3 bits: kvquant3-dense would have none rather than 170, but take 96.4
        bundles and not 92.6. Nor on 7x, where few spill.)
        """
        anew = self.plan.chip == "v6e" and self.plan.channels > LANES and self.fmt.bits != 3
        return read_anew(ref, run, self.plan, always=anew)

    def scores(self, refs: Refs, run: jax.Array, place: int) -> jax.Array:
        stored, rotation, _, scratch = self._split(refs)
        plan = self.plan
        if self.fmt.slots:
            self._slots.prepare(scratch[4:], run, place)
        rows = [scratch[1][i, place] for i in range(2)] if rotation else [scratch[1][0, 0]]
        score = jnp.zeros((2 * plan.rows, plan.run_tokens), jnp.float32)
        for i, keys in enumerate(self._values(scratch[0], stored[0], run)):
            lanes = slice(i * LANES, min((i + 1) * LANES, plan.channels))
            turned_keys = [keys * self._angle(x, run)[:, lanes] for x in rotation[1:3]] if rotation else [keys]
            left, right = [a[:, lanes] for a in rows], [b.astype(jnp.bfloat16) for b in turned_keys]
            if self.levels.bytes and plan.channels % LANES == 0:  # one product of twice the depth
                left, right = [jnp.concatenate(left, axis=1)], [jnp.concatenate(right, axis=1)]
            for a, b in zip(left, right):
                score += lax.dot_general(a, b, CONTRACT_LANES, preferred_element_type=jnp.float32)
        score = score[: plan.rows] + score[plan.rows :]
        return score + self._slots.scores(scratch[4:], run) if self.fmt.slots else score


@dataclasses.dataclass(frozen=True)
class CodebookValues(_Codebook):
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


def _both_halves(angle: jax.Array) -> list[jax.Array]:
    """cos and sin `[1, H]`, which both halves of the channels share, from `[cos, sin]`."""
    return [jnp.concatenate([x, x], axis=1) for x in jnp.split(angle, 2, axis=1)]


def _scalars(array: jax.Array) -> Operand:
    """`array[layer]` of `[L, n]` as scalars, `[1, n]`."""
    array = array[:, None]
    spec = pl.BlockSpec((None, *array.shape[1:]), lambda b, k, c, layer, *_: (layer[0], 0, 0), memory_space=pltpu.SMEM)
    return Operand(array, spec)
