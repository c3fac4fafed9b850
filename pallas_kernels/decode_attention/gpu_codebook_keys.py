"""Codebook keys on Hopper (KVQuant): per channel, stored before RoPE, rotated in registers.

A key at token t is rotated by t minus the query's position, an angle that splits into three parts:

    t - position = (first token of the chunk - position) + (row's token in plane 0) + (tokens between planes) * plane.

The last part turns the query instead, once per plane and call. The others turn the key, by tables of 64 rows that no
plane depends on. A row's token is that of its warp's first row and of its row among 16: cos and sin of the latter lie
in shared memory, those of chunk and warp are three factors per channel (coarse, fine and the warp's, multiplied for
every chunk), and scale and zero are folded into the cos and sin of the sum. A pair of levels (l1, l2) then costs four
multiply-adds: s1 cos l1 - s2 sin l2 + z1', s2 cos l2 + s1 sin l1 + z2'.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_attention import gpu_codebook_lookup as codes
from pallas_kernels.decode_attention import gpu_skeleton
from pallas_kernels.decode_attention.formats import Codebook, Rotation, shape_of
from pallas_kernels.decode_attention.gpu_codebook_slots import key_scores
from pallas_kernels.decode_attention.gpu_codebook_tiles import (
    DEPTH,
    LEFT,
    RIGHT,
    added,
    fetch_blocks,
    key_words,
    load,
    product,
    repeated,
    row_tables,
    warp_rows,
)
from pallas_kernels.decode_attention.gpu_dense import normalised
from pallas_kernels.decode_attention.gpu_skeleton import At, Plan, flat, load_column
from pallas_kernels.decode_attention.gpu_tiles import ROWS, WGMMA, full, over_rows
from pallas_kernels.packing import codes_per_cell

FINE = 64  # blocks between coarse angles
WARPS = ROWS // DEPTH
BEFORE = 16  # blocks by which a chunk may start before block 0


def plan(k: Codebook, group: int, interpret: Any) -> Plan:
    """Rows are cells; at 3 bits those of a quarter of the blocks that would fill a tile, four times."""
    *_, tokens, channels = shape_of(k)
    cells = tokens // codes_per_cell(k.bits)
    # Large heads' words, and outliers beside the tables of 2 bits, leave room for half a chunk.
    halved = channels > 128 or (k.bits == 2 and k.slots)
    groups = 4 if k.bits == 3 else 2 if halved and cells <= 32 else 1
    sizes = gpu_skeleton.plan(k, group, (cells,), interpret, groups)
    return dataclasses.replace(sizes, alive=64)


def narrow(plan: Plan, bits: int, slots: int, shared: bool) -> bool:
    """Whether words and tables leave little room in shared memory."""
    return plan.channels > 128 or bool(slots and shared and bits != 3)


def at_once(plan: Plan, bits: int, slots: int, shared: bool) -> int:
    """Planes that have a tile each in shared memory at a time."""
    most = len(plan.rounds[0])
    return min(most, 2 if bits == 3 and slots else 4) if narrow(plan, bits, slots, shared) else most


@dataclasses.dataclass(frozen=True, eq=False)
class CodebookKeys:
    """Decoder of keys; `layer`, `rotation` and `value_levels [L, 2**bits]` are traced.

    Its first array in shared memory is the table of levels, of keys and values: where `shared` for look-ups there
    (`shared_tables`), else `[2, 8]`, for look-ups in registers.
    """

    plan: Plan
    bits: int
    slots: int
    layer: jax.Array
    rotation: Rotation
    value_levels: jax.Array
    shared: bool

    @property
    def few(self) -> int:
        """Planes whose slots are taken at once."""
        return at_once(self.plan, self.bits, self.slots, self.shared)

    @property
    def width(self) -> int:
        """Channels in whole threads."""
        return max(self.plan.channels, 128)

    def arrays(self, fmt: Codebook, q: jax.Array) -> list:
        q, unit = normalised(q, jnp.float32)
        levels = fmt.levels[self.layer], self.value_levels[self.layer]
        table = codes.shared_tables(*levels) if self.shared else codes.tables(jnp.stack(levels))
        once = [table, self._queries(q), unit, self._factors(), self._folds(fmt)]
        slots = [fmt.slot_channel, fmt.slot_residual] if self.slots else []
        return [*once, *(flat(self.plan, x) for x in (fmt.codes, *slots))]

    def _queries(self, q: jax.Array) -> jax.Array:
        """`q [B, K, columns, H]` turned to each plane: `[B, K, planes, H, columns]` float16."""
        step = self.plan.rows
        cos, sin = (x[None, None, :, None] for x in self._angles(step * jnp.arange(self.plan.planes, dtype=jnp.int32)))
        a, b = jnp.split(q[:, :, None], 2, axis=-1)
        turned = jnp.concatenate([a * cos + b * sin, b * cos - a * sin], axis=-1)
        return turned.astype(jnp.float16).swapaxes(-1, -2)

    def _factors(self) -> jax.Array:
        """cos and sin `[n, 2, H/2]` float32: by how much rows 0 to 15 of plane 0 turn, each warp's first row, so many
        blocks (`FINE` of them), and for each row of the batch every `FINE`th block, the first `BEFORE` 0, to the query.

        One array, so that one kernel makes it.
        """
        plan, rows = self.plan, jnp.arange(DEPTH, dtype=jnp.int32)
        fine = jnp.arange(FINE, dtype=jnp.int32) * plan.tokens
        near = [plan.token(rows, 0), plan.token(DEPTH * rows[:WARPS], 0), fine]
        block = FINE * jnp.arange(self._coarse, dtype=jnp.int32) - BEFORE
        far = self.rotation.position[:, None] - self._place(block[None] * plan.tokens)
        offsets = jnp.concatenate([self._place(jnp.concatenate(near)), far.reshape(-1)])
        return jnp.stack(self._angles(offsets), -2)

    @property
    def _coarse(self) -> int:
        return -(-(self.plan.blocks + BEFORE) // FINE)

    def _folds(self, fmt: Codebook) -> jax.Array:
        """`[K, 3, width]` float32: s; then a and b of y = a cos + b sin, the zeros turned by a chunk's angle."""
        scale, zero = (x[self.layer][:, 0] for x in (fmt.scale, fmt.zero))
        z1, z2 = jnp.split(zero, 2, axis=-1)
        folds = [scale, jnp.concatenate([z1, -z2], -1), jnp.concatenate([z2, z1], -1)]
        return self._wide(jnp.stack(folds, 1))

    def _angles(self, offsets: jax.Array):
        return self.rotation.angles(offsets)

    def _place(self, token: jax.Array) -> jax.Array:
        return self.rotation.place(token, self.plan.tokens)

    def _wide(self, x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, self.width - x.shape[-1]),))

    def scratch(self) -> list:
        p = self.plan
        return [
            plgpu.SMEM((codes.ROWS[self.bits], 64) if self.shared else (2, 8), jnp.uint32),
            plgpu.SMEM((p.planes, p.channels, p.columns), jnp.float16),
            plgpu.SMEM((p.columns,), jnp.float32),
            plgpu.SMEM((DEPTH, 2, p.channels // 2), jnp.float32),
            plgpu.SMEM((WARPS, 2, p.channels // 2), jnp.float32),
            plgpu.SMEM((3, self.width), jnp.float32),
            plgpu.SMEM((p.slots, 2, 2, p.channels // 2), jnp.float32),
            plgpu.SMEM((WARPS, 4, self.width), jnp.float32),
            plgpu.SMEM((p.slots, p.run, p.tokens * self.bits // 32, p.channels), jnp.uint32),
            *(self._slot_scratch() if self.slots else []),
        ]

    def _slot_scratch(self) -> list:
        p, size = self.plan, (self.plan.slots, self.plan.run, self.slots, self.plan.tokens)
        return [
            plgpu.SMEM(size, jnp.uint8),
            plgpu.SMEM(size, jnp.uint16),
            plgpu.SMEM((self.few, ROWS, p.columns), jnp.float32),
        ]

    def copies(self) -> int:
        return 5 if self.slots else 3

    def begin_copies(self) -> int:
        return 6

    def begin(self, src, dst, at: At, barrier) -> None:
        table, queries, unit, factors, folds, *_ = src
        here, rows, warps = (at.row, at.head), pl.ds(0, DEPTH), pl.ds(DEPTH, WARPS)
        once = (table, queries.at[here], unit.at[here], factors.at[rows], factors.at[warps], folds.at[at.head])
        for source, target in zip(once, dst):
            plgpu.copy_gmem_to_smem(source, target, barrier)
        plgpu.barrier_wait(barrier)

    def fetch(self, src, dst, at: At, slot, barrier) -> None:
        source, stored = src[3], src[5:]
        factors, _, words, *slots = dst[6:]
        block, fine = at.start + BEFORE, DEPTH + WARPS
        coarse = fine + FINE + at.row * self._coarse
        plgpu.copy_gmem_to_smem(source.at[coarse + lax.div(block, FINE)], factors.at[slot, 0], barrier)
        plgpu.copy_gmem_to_smem(source.at[fine + lax.rem(block, FINE)], factors.at[slot, 1], barrier)
        fetch_blocks(self.plan, stored, [x.at[slot] for x in (words, *slots[:2])], at, barrier)

    def scores(self, dst, at: At, slot, planes: range) -> list:
        table, queries, unit, angles, warps, folds, factors, turns, words, *slots = dst
        if planes.start == 0:
            self._turn(folds, factors.at[slot], warps, turns)
        interpret, half = self.plan.interpret, self.plan.channels // 2
        levels = codes.decoders(self.bits, planes, table, 0, self.shared, LEFT, interpret)

        def pairs(c, sums):
            first, second = (DEPTH * c + h for h in (0, half))
            k1, k2, s1, s2, z1, z2 = self._tables(angles, turns, first, second)
            w1, w2 = (key_words(words.at[slot], column, self.bits, interpret) for column in (first, second))
            sums = dict(zip(planes, sums))
            for group, decode in levels:
                l1, l2 = decode(w1), decode(w2)
                for p, a, b in zip(group, l1, l2):
                    q1, q2 = (load(queries.at[p, pl.ds(x, DEPTH)], RIGHT, interpret) for x in (first, second))
                    sums[p] = product(sums[p], added(added(z1, a, k1, interpret), b, s2, interpret, -1), q1, interpret)
                    sums[p] = product(sums[p], added(added(z2, b, k2, interpret), a, s1, interpret), q2, interpret)
            return tuple(sums.values())

        if self.slots:
            *slots, start = slots
            slots = [s.at[slot] for s in slots]
            empty = ()
            for first in range(0, len(planes), self.few):
                some = planes[first : first + self.few]
                key_scores(self.plan, start, slots, angles, turns, queries, some)
                empty += tuple(load(start.at[i], WGMMA, interpret) for i in range(len(some)))
        else:
            empty = tuple(full((ROWS, self.plan.columns), 0.0, interpret) for _ in planes)
        sums = lax.fori_loop(0, half // DEPTH, pairs, empty)
        unit = over_rows(load_column(unit, interpret), ROWS)
        return [s * unit for s in sums]

    def _turn(self, folds, factors, warps, turns) -> None:
        """s cos, s sin and the turned zeros, then half cos and half sin, by the angle of the chunk for each warp."""
        interpret, half = self.plan.interpret, self.plan.channels // 2
        layout = plgpu.Layout.WG_STRIDED((self.width,), vec_size=self.width // 128)

        def both(ref):
            return [repeated(ref.at[j], self.width, layout, interpret) for j in (0, 1)]

        def less(a, b):  # cos and sin of the difference of two angles
            return a[0] * b[0] + a[1] * b[1], a[1] * b[0] - a[0] * b[1]

        chunk = less(both(factors.at[0]), both(factors.at[1]))
        s, a, b = (load(folds.at[i], layout, interpret) for i in range(3))
        iota = lax.broadcasted_iota if interpret else functools.partial(plgpu.broadcasted_iota, layout=layout)
        lower = iota(jnp.int32, (self.width,), 0) < half
        for w in range(WARPS):
            cos, sin = less(chunk, both(warps.at[w]))
            for i, x in enumerate((s * cos, s * sin, a * cos + b * sin, jnp.where(lower, cos, sin))):
                turns[w, i] = x
        plgpu.commit_smem()

    def _tables(self, angles, turns, first, second) -> tuple:
        """s cos, s sin and the zero, of both channels of 16 pairs in 64 rows: by the row's angle less the chunk's."""
        interpret = self.plan.interpret
        cos, sin = row_tables(angles, first, interpret)
        (c1, s1, y1), (c2, s2, y2) = (warp_rows(turns, 3, column, interpret) for column in (first, second))
        tables = (
            *(cos * c + sin * s for c, s in ((c1, s1), (c2, s2))),
            *(sin * c - cos * s for c, s in ((c1, s1), (c2, s2))),
            cos * y1 + sin * y2,
            sin * y1 - cos * y2,
        )
        # One rounding: in float16 arithmetic the tables would be the largest error.
        return tuple(x.astype(jnp.float16) for x in tables)
