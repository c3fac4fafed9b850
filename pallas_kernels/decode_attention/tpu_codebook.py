"""TPU decoders of codebook storage (KVQuant): keys per channel, rotated on the fly, and values per token."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention import tpu_slots
from pallas_kernels.decode_attention.formats import Codebook, Rotation, shape_of
from pallas_kernels.decode_attention.tpu_levels import Levels
from pallas_kernels.decode_attention.tpu_metadata import split
from pallas_kernels.decode_attention.tpu_plan import LANES, Operand, Plan
from pallas_kernels.decode_attention.tpu_rows import SharedRows, SlotRows, block_permutation, float16_of, permute, row
from pallas_kernels.decode_attention.tpu_skeleton import CONTRACT_LANES, Loaded, Refs, Step, over_runs

ROTATED_RUNS = 8  # whose queries one iteration rotates


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


@dataclasses.dataclass(frozen=True)
class _Codebook:
    """What keys and values share: levels, and rows of numbers per token."""

    fmt: Codebook
    plan: Plan

    @property
    def levels(self) -> Levels:
        return Levels(self.fmt.bits, self.plan)

    @property
    def order(self) -> np.ndarray:
        return self.levels.order

    @property
    def per_token(self) -> bool:
        return self.fmt.per == "token"

    def _operands(self) -> list[Operand]:
        """Codes, levels, scale and zero per channel; slots; what brings tokens to `order`."""
        fmt, plan = self.fmt, self.plan
        out = [plan.stored(fmt.codes), _scalars(fmt.levels)]
        if fmt.per == "channel":
            out += [plan.per_head(fmt.scale), plan.per_head(fmt.zero)]
        if fmt.slots:
            out += [SlotRows(x, plan).operand() for x in (fmt.slot_channel, fmt.slot_residual)]
        return [*out, plan.constant(jnp.asarray(block_permutation(self.order, plan.tokens), jnp.bfloat16))]

    @property
    def _counts(self) -> tuple[int, int]:
        """Operands before slots, and of `_operands()`."""
        start = 2 + 2 * (self.fmt.per == "channel")
        return start, start + 2 * bool(self.fmt.slots) + 1

    def _slot_scratch(self, rows: int) -> list[Any]:
        """Two of words, and one of `rows` numbers per slot and token."""
        if not self.fmt.slots:
            return []
        words = [SlotRows(x, self.plan).scratch() for x in (self.fmt.slot_channel, self.fmt.slot_residual)]
        shape = (rows * self.fmt.slots, self.plan.chunk_blocks, self.plan.tokens)
        return [*words, pltpu.VMEM(shape, jnp.int32)]

    def _slots(self, operands: Refs, scratch: Refs, step: Step) -> tuple[list[jax.Array], list[jax.Array]]:
        """Channel int32 and residual float32 of the chunk's slots in `order`, `[chunk_blocks, T]` each."""
        arrays = (self.fmt.slot_channel, self.fmt.slot_residual)
        channel, residual = (
            SlotRows(x, self.plan).read(ref, words, step) for x, ref, words in zip(arrays, operands[:2], scratch[:2])
        )
        channel = [lax.shift_right_logical(x, jnp.full_like(x, 24)) for x in channel]
        residual = [float16_of(x) for x in residual]
        if not self.levels.bytes:
            return channel, residual
        rows = permute([*(x.astype(jnp.float32) for x in channel), *residual], operands[2][...])
        return [x.astype(jnp.int32) for x in rows[: len(channel)]], rows[len(channel) :]

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
        out += [plan.per_chunk(start), plan.constant(jnp.concatenate(self.rotation.angles(run), axis=-1)[:, None])]
        out += [plan.constant(x) for x in wide]
        if self.fmt.slots:
            out += [plan.constant(x.T.astype(jnp.bfloat16)) for x in (cos, sin)]
        return out

    def _place(self, token: jax.Array) -> jax.Array:
        assert self.rotation is not None
        return self.rotation.place(token, self.plan.tokens)

    def scratch(self) -> list[Any]:
        plan = self.plan
        runs = plan.runs if self.rotation is not None else 1
        queries = pltpu.VMEM((runs, 4 * plan.rows, plan.channels), jnp.bfloat16)  # as `_query_rows` has them
        return [self._table_scratch(), queries, *self._slot_scratch(4)]

    @property
    def _joint_slots(self) -> int:
        """Slots that one product takes: as deep as the matrix unit is."""
        return 2 if self.plan.chip in ("v6e", "7x") and self.plan.channels <= LANES else 1

    def _split(self, refs: Refs) -> tuple[Refs, Refs, Refs]:
        """Refs of `_operands()`, of the rotation, and scratch."""
        count = self._counts[1]
        rotation = 0 if self.rotation is None else 4 + 2 * bool(self.fmt.slots)
        return refs[:count], refs[count : count + rotation], refs[count + rotation :]

    def start(self, refs: Refs, q: jax.Array) -> None:
        stored, _, scratch = self._split(refs)
        self._make_table(stored, scratch[0])
        if self.rotation is None:
            scratch[1][0] = _query_rows(q, turned(q))

    def chunk(self, refs: Refs, step: Step, q: jax.Array) -> None:
        stored, rotation, scratch = self._split(refs)
        if self.fmt.slots:
            channel, residual = self._slots(stored[self._counts[0] :], scratch[2:], step)
            for i, x in enumerate(tpu_slots.key_rows(channel, residual, self.plan.channels)):
                scratch[4][i] = x
        if not rotation:
            return
        cos, sin = _both_halves(rotation[0][...])
        q = q * cos - turned(q) * sin
        back = turned(q)

        def rotate(run, place, carry):
            cos, sin = _both_halves(rotation[1][run])
            scratch[1][run] = _query_rows(q * cos + back * sin, back * cos - q * sin)
            return carry

        over_runs(dataclasses.replace(self.plan, unroll=math.gcd(self.plan.runs, ROTATED_RUNS)), rotate, 0)

    def scores(self, refs: Refs, run: jax.Array) -> jax.Array:
        stored, rotation, scratch = self._split(refs)
        plan = self.plan
        q = scratch[1][run if rotation else 0]
        two = 2 * plan.rows
        rows = [q[:two], q[two:]] if rotation else [q[:two]]
        score = jnp.zeros((two, plan.run_tokens), jnp.float32)
        for i, keys in enumerate(self._values(scratch[0], stored[0], run)):
            lanes = slice(i * LANES, min((i + 1) * LANES, plan.channels))
            turned_keys = [keys * x[:, lanes] for x in rotation[2:4]] if rotation else [keys]
            left, right = [a[:, lanes] for a in rows], [b.astype(jnp.bfloat16) for b in turned_keys]
            if self.levels.bytes and plan.channels % LANES == 0:  # one product of twice the depth
                left, right = [jnp.concatenate(left, axis=1)], [jnp.concatenate(right, axis=1)]
            for a, b in zip(left, right):
                score += lax.dot_general(a, b, CONTRACT_LANES, preferred_element_type=jnp.float32)
        score = score[: plan.rows] + score[plan.rows :]
        if not self.fmt.slots:
            return score
        cos, sin = (pltpu.bitcast(x[...], jnp.int32) for x in rotation[4:6])
        numbers = [row(scratch[4], (i,), run * plan.unit, plan.unit) for i in range(4 * self.fmt.slots)]
        high = jnp.concatenate([q[: plan.rows], q[two : two + plan.rows]], axis=0)
        return score + tpu_slots.key_scores(numbers, high, cos, sin, self._joint_slots)


@dataclasses.dataclass(frozen=True)
class CodebookValues(_Codebook):
    """Values with a scale and zero per token, which the weights take."""

    def scratch(self) -> list[Any]:
        plan = self.plan
        out = [self._table_scratch(), *self._slot_scratch(3)]
        if self.per_token:
            out += [pltpu.VMEM((SharedRows(plan).rows, plan.tokens), jnp.float32)] * 2 + [pltpu.SMEM((1,), jnp.int32)]
        return out

    def accumulators(self) -> list[tuple[int, int]]:
        """Weighted levels and slots; weights times zeros, not yet summed over tokens."""
        return [(self.plan.rows, self.plan.channels), (self.plan.rows, self.plan.run_tokens)]

    def operands(self) -> list[Operand]:
        out = self._operands()
        if self.per_token:
            shared = SharedRows(self.plan)
            out += [*shared.operands(self.fmt.scale), *shared.operands(self.fmt.zero)]
        return out

    def _split(self, refs: Refs) -> tuple[Refs, Refs, Refs, Refs]:
        """Refs of `_operands()`, of scale, of zero, and scratch."""
        count, windows = self._counts[1], SharedRows(self.plan).windows * self.per_token
        ends = (count, count + windows, count + 2 * windows)
        return refs[:count], refs[count : ends[1]], refs[ends[1] : ends[2]], refs[ends[2] :]

    def start(self, refs: Refs) -> None:
        self._make_table(refs, self._split(refs)[3][0])

    def chunk(self, refs: Refs, step: Step) -> None:
        stored, scale, zero, scratch = self._split(refs)
        if self.fmt.slots:
            channel, residual = self._slots(stored[self._counts[0] :], scratch[1:], step)
            for i, x in enumerate(tpu_slots.value_rows(channel, residual)):
                scratch[3][i] = x
        if self.per_token:
            shared = SharedRows(self.plan)
            rows = [float16_of(shared.read(x)) for x in (scale, zero)]
            if self.levels.bytes:
                rows = permute(rows, stored[-1][...])
            scratch[-3][...], scratch[-2][...] = rows
            scratch[-1][0] = shared.offset(step)

    def add(self, refs: Refs, run: jax.Array, p: jax.Array, sums: Loaded) -> Loaded:
        stored, _, _, scratch = self._split(refs)
        block, unit = run * self.plan.unit, self.plan.unit
        weights, zeros = p, sums[1]
        if self.per_token:
            scale, zero = (row(x, (), block + scratch[-1][0], unit) for x in scratch[-3:-1])
            weights, zeros = p * scale, zeros + p * zero
        weights, levels = weights.astype(jnp.bfloat16), self._values(scratch[0], stored[0], run)
        parts = [jnp.dot(weights, x.astype(jnp.bfloat16), preferred_element_type=jnp.float32) for x in levels]
        total = sums[0] + jnp.concatenate(parts, axis=1)
        if self.fmt.slots:
            numbers = [row(scratch[3], (i,), block, unit) for i in range(3 * self.fmt.slots)]
            total += tpu_slots.value_sums(numbers, p, self.plan.channels)
        return total, zeros

    def finish(self, refs: Refs, sums: Loaded) -> jax.Array:
        return sums[0] + jnp.sum(sums[1], axis=1, keepdims=True)


def _query_rows(q: jax.Array, back: jax.Array) -> jax.Array:
    """`[4 R, H]` bfloat16: q and J(q), each as a sum of two: rows of a matrix product cost nothing here."""
    return jnp.concatenate([*split(q), *split(back)], axis=0)


def _both_halves(angle: jax.Array) -> list[jax.Array]:
    """cos and sin `[1, H]`, which both halves of the channels share, from `[cos, sin]`."""
    return [jnp.concatenate([x, x], axis=1) for x in jnp.split(angle, 2, axis=1)]


def _scalars(array: jax.Array) -> Operand:
    """`array[layer]` of `[L, n]` as scalars, `[1, n]`."""
    array = array[:, None]
    spec = pl.BlockSpec((None, *array.shape[1:]), lambda b, k, c, layer, *_: (layer[0], 0, 0), memory_space=pltpu.SMEM)
    return Operand(array, spec)
