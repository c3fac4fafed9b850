"""Affine codes of 1, 2, 4 or 8 bits on Hopper, for decode attention: `formats.Affine`.

A 32-bit word of codes is cut into its 16-bit halves, and a field is left where it lies in its half: as a float16 it
is the subnormal number `code * 2**(shift - 24)`, exact, and the tensor cores take it. One AND per two codes is all the
arithmetic there is; scores and accumulators are multiplied by `2**(24 - shift)` in float32.

Whether `wgmma` honours float16 subnormals must be tested on a device before anything else: if it flushed them, every
score of a format with a scale per token and every sum of values would be zero.

Scales: of keys per channel, the codes become exact small float16 numbers and are multiplied; of keys per token, the
scores; of values per token, the weights, once per channel group, of which those that fit in 64 channels stand side by
side as columns. Zeros: of keys per channel, one more row of each group's tile; of values, sums of weight * zero.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_attention.formats import Affine
from pallas_kernels.decode_attention.gpu_answers import store_tile
from pallas_kernels.decode_attention.gpu_dense import normalised
from pallas_kernels.decode_attention.gpu_skeleton import At, Plan, flat, load_column
from pallas_kernels.decode_attention.gpu_tiles import (
    ROW,
    ROWS,
    full,
    gather,
    over_columns,
    over_rows,
    parts,
    snapshot,
    swizzled,
)
from pallas_kernels.decode_attention.gpu_wgmma import multiply, settle, store
from pallas_kernels.decode_attention.gpu_words import Words, contract, spread, value_channel

f32, f16, u16, u32 = jnp.float32, jnp.float16, jnp.uint16, jnp.uint32


def word_rows(fmt: Affine) -> int:
    return fmt.codes.shape[4]


def subnormal(field: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(field, f16)


def exact(field: jax.Array, shift: int) -> jax.Array:
    """Codes as float16: with the exponent of 2**(10 - shift) above them, a field adds exactly its code."""
    offset = 2.0 ** (10 - shift)
    return jax.lax.bitcast_convert_type(field | u16((25 - shift) << 10), f16) - f16(offset)


@dataclasses.dataclass(frozen=True)
class _Keys:
    plan: Plan
    bits: int
    group: int  # tokens (per channel) or channels (per token) that share a scale

    @property
    def codes(self) -> Words:
        return Words(self.plan, self.bits)

    def arrays(self, fmt: Affine, q: jax.Array) -> list:
        q, unit = normalised(q, f16)
        padding = self.plan.padded - self.plan.channels
        total = q.astype(f32).sum(-1) * unit
        q = jnp.pad(contract(q), ((0, 0),) * 3 + ((0, padding),))
        return [self.codes.array(fmt.codes), *(flat(self.plan, x) for x in (fmt.scale, fmt.zero)), q, unit, total]

    def scratch(self) -> list:
        p = self.plan
        meta = plgpu.SMEM((p.slots, *self.meta_shape()), u16)
        q = plgpu.SMEM((p.columns, p.padded), f16, transforms=swizzled(8, 16))
        return [self.codes.scratch(), meta, meta, q, *[plgpu.SMEM((p.columns,), f32)] * 2]

    def meta_shape(self) -> tuple[int, ...]:
        """Of the scales of one chunk."""
        raise NotImplementedError

    def copies(self) -> int:
        return self.codes.copies() + 2

    def begin_copies(self) -> int:
        return 3

    def begin(self, src, dst, at: At, barrier) -> None:
        for source, here in zip(src[3:], dst[3:]):
            plgpu.copy_gmem_to_smem(source.at[at.row, at.head], here, barrier)
        plgpu.barrier_wait(barrier)

    def fetch(self, src, dst, at: At, slot, barrier) -> None:
        self.codes.fetch(src[0], dst[0], at, slot, barrier)
        for source, here in zip(src[1:3], dst[1:3]):
            fetch_meta(self.plan, source, here, at, slot, barrier)

    def loaded(self, dst, slot, planes: Sequence[int], part: range) -> dict:
        """`(tile, half) -> [64, channels of part]` of the words that hold `planes`."""
        out: dict[tuple[int, int], Any] = {}
        for tile, halves in self.codes.halves(planes).items():
            out |= {(tile, x): y for x, y in zip(halves, self.codes.keys(dst[0].at[slot, tile], halves, part))}
        return out


def fetch_meta(plan: Plan, array, here, at: At, slot, barrier) -> None:
    """Scales or zeros `array[layer, row, block, head]` of a chunk's blocks, to `here[slot, block]`."""
    head = at.head if array.shape[1] > 1 else 0
    plgpu.copy_gmem_to_smem(array.at[at.blocks(plan), head], here.at[slot], barrier)


class KeysPerChannel(_Keys):
    """A scale and zero per channel and `group` tokens."""

    def meta_shape(self) -> tuple[int, ...]:
        return self.plan.run, self.plan.tokens // self.group, self.plan.channels

    def _order(self, planes: range):
        """(token group, half and tile of the words, number) of each plane: those that share most come together.

        Planes in the same tokens' group share scales, if a plane has no more tokens of a block than a group.
        """
        rows = self.plan.rows
        for i, p in enumerate(planes):
            place = self.codes.place(p)
            yield p * rows // self.group if rows <= self.group else p, place.half, place.tile, i

    def scores(self, dst, at: At, slot, planes: range) -> list:
        plan = self.plan
        dst = snapshot(plan, dst, (1, 2, 3))
        unit = over_rows(load_column(dst[4], plan.interpret), ROWS)
        scores: list[Any] = [None] * len(planes)
        for part in parts(plan.channels):
            loaded: dict[tuple[int, int], Any] = {}
            scale: Any = None
            zero: Any = None
            of: Any = None
            for here, half, tile, i in sorted(self._order(planes)):
                p = planes[i]
                if here != of:
                    of = here
                    scale, bias = (spread(plan, dst[x], slot, self.group, p, part) for x in (1, 2))
                    zero = multiply([(bias, 0)], dst[3], plan.columns, plan.interpret, part.start)
                place = self.codes.place(p)
                if (tile, half) not in loaded:  # one half of one tile's words at a time is in registers
                    loaded = self.loaded(dst, slot, [p], part)
                a = exact(self.codes.field(loaded[place.tile, place.half], place), place.shift) * scale
                s = multiply([(a, 0)], dst[3], plan.columns, plan.interpret, part.start) + zero
                scores[i] = s if scores[i] is None else scores[i] + s
        return [s * unit for s in scores]


class KeysPerToken(_Keys):
    """A scale and zero per token, of all its channels."""

    def meta_shape(self) -> tuple[int, ...]:
        return self.plan.run, 1, self.plan.tokens

    def scores(self, dst, at: At, slot, planes: range) -> list:
        plan = self.plan
        dst = snapshot(plan, dst, (1, 2, 3))
        unit, total = (over_rows(load_column(dst[i], plan.interpret), ROWS) for i in (4, 5))
        sums: list[Any] = [None] * len(planes)
        for part in parts(plan.channels):
            loaded = self.loaded(dst, slot, planes, part)
            for i, p in enumerate(planes):
                place = self.codes.place(p)
                a = subnormal(self.codes.field(loaded[place.tile, place.half], place))
                s = multiply([(a, 0)], dst[3], plan.columns, plan.interpret, part.start)
                sums[i] = s if sums[i] is None else sums[i] + s
        scores = []
        for p, s in zip(planes, sums):
            scale, zero = (token_row(plan, dst[i], slot, 0, p) for i in (1, 2))
            lifted = over_columns(scale, plan.columns) * (unit * f32(2.0 ** (24 - self.codes.place(p).shift)))
            scores.append(s * lifted + over_columns(zero, plan.columns) * total)
        return scores


def token_row(plan: Plan, ref, slot, group: int, plane: int) -> jax.Array:
    """`ref[slots, run, groups, T]` of one group as the `[64]` float32 of a plane's rows."""
    if plan.interpret:
        row = jnp.arange(ROWS, dtype=jnp.int32)
        bits = ref[slot, :, group][plan.block(row), plan.token_in_block(row, plane)]
        return jax.lax.bitcast_convert_type(bits, f16).astype(f32)

    def at(r):
        return plan.block(r), r * 0 + group, plan.token_in_block(r, plane)

    return gather(ref.at[slot], (ROWS,), at, ROW).astype(f32)


def _alike(codes: Words, planes: range) -> list:
    """Planes with equal shifts, few at a time: their codes are in registers at once."""
    most = 2 if codes.bits == 2 else 4  # as many as are compiled without spills
    by_shift: dict[int, list] = {}
    for p in planes:
        by_shift.setdefault(codes.place(p).shift, []).append(p)
    return [x[i : i + most] for x in by_shift.values() for i in range(0, len(x), most)]


@dataclasses.dataclass(frozen=True)
class ValuesPerToken:
    """A scale and zero per token and `group` channels."""

    plan: Plan
    bits: int
    group: int
    borrows: ClassVar[int] = 0

    @property
    def codes(self) -> Words:
        return Words(self.plan, self.bits)

    @property
    def groups(self) -> int:
        return self.plan.channels // self.group

    @property
    def stored(self) -> int:
        """Channel groups that whole tiles of channels have."""
        return max(1, self.plan.padded // self.group)

    @property
    def beside(self) -> int:
        """Channel groups in 64 channels."""
        return max(1, ROWS // self.group)

    def arrays(self, fmt: Affine) -> list:
        return [self.codes.array(fmt.codes), *(flat(self.plan, x) for x in (fmt.scale, fmt.zero))]

    def scratch(self) -> list:
        p = self.plan
        meta = plgpu.SMEM((p.slots, p.run, self.groups, p.tokens), u16)
        weights = plgpu.SMEM((len(p.rounds[0]), self.stored * p.columns, ROWS), f16, transforms=swizzled(8, 16))
        return [self.codes.scratch(), meta, meta, weights, plgpu.SMEM((self.beside * p.columns,), f32)]

    def copies(self) -> int:
        return self.codes.copies() + 2

    def fetch(self, src, dst, at: At, slot, barrier) -> None:
        self.codes.fetch(src[0], dst[0], at, slot, barrier)
        for source, here in zip(src[1:3], dst[1:3]):
            fetch_meta(self.plan, source, here, at, slot, barrier)

    def init(self):
        p = self.plan
        tiles = [full((ROWS, self.beside * p.columns), 0.0, p.interpret) for _ in range(p.padded // ROWS)]
        return tiles, [full((ROWS, p.columns), 0.0, p.interpret) for _ in range(self.groups)]

    def add(self, dst, at: At, slot, planes: range, weights: list, alpha, state):
        plan, n = self.plan, self.plan.columns
        dst = snapshot(plan, dst, (1, 2))
        tiles, zeros = state
        lifted = over_rows(alpha, ROWS)
        zeros = [z * lifted for z in zeros]
        here = dst[3]
        for i, (p, w) in enumerate(zip(planes, weights)):
            scaled, rows = [], []
            for j in range(self.groups):
                scale, zero = (over_columns(token_row(plan, dst[x], slot, j, p), n) for x in (1, 2))
                zeros[j] = zeros[j] + w * zero
                scaled.append((w * scale).astype(f16))
                rows.append((i * self.stored + j) * n)
            store(here, scaled, rows, plan.interpret)
        settle(here, zeros, lifted, plan.interpret)
        for j in range(self.beside):
            dst[4][j * n : (j + 1) * n] = alpha
        plgpu.commit_smem()
        alpha = over_rows(load_column(dst[4], plan.interpret), ROWS)
        new = self.tiles(dst, slot, planes)
        return [t * alpha + x for t, x in zip(tiles, new)], zeros

    def tiles(self, dst, slot, planes: range) -> list:
        """The sum over planes, for each 64 rows of channels."""
        plan, columns = self.plan, self.beside * self.plan.columns
        dst = snapshot(plan, dst, (3,))
        out = []
        for m in range(plan.padded // ROWS):
            ready: dict[tuple[int, int], Any] = {}
            for tile, halves in self.codes.halves(planes).items():
                loaded = self.codes.values(dst[0].at[slot, tile], m, halves)
                ready |= {(tile, half): x for half, x in zip(halves, loaded)}
            low = m * ROWS // self.group * plan.columns
            total: Any = None
            for planes_of in _alike(self.codes, planes):
                pairs = []
                for p in planes_of:
                    place = self.codes.place(p)
                    a = subnormal(self.codes.field(ready[place.tile, place.half], place))
                    pairs.append((a, planes.index(p) * self.stored * plan.columns + low))
                part = multiply(pairs, dst[3], columns, plan.interpret) * f32(2.0 ** (24 - place.shift))
                total = part if total is None else total + part
            out.append(total)
        return out

    def store(self, ref, state) -> None:
        tiles, zeros = state
        zeros = [jnp.sum(z, axis=0) for z in zeros]
        for i, tile in enumerate(tiles):
            first = i * ROWS // self.group
            own = [zeros[min(g, self.groups - 1)] for g in range(first, first + self.beside)]
            channel = functools.partial(value_channel, tile=i)
            store_tile(ref, tile, channel, self.plan.interpret, added=own, group=self.group)
