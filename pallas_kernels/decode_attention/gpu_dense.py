"""Uncompressed keys and values on Hopper, for decode attention: `formats.Dense`."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_attention.formats import Dense
from pallas_kernels.decode_attention.gpu_answers import store_tile
from pallas_kernels.decode_attention.gpu_skeleton import LOG2E, At, Plan, load_column
from pallas_kernels.decode_attention.gpu_tiles import (
    ROWS,
    WGMMA,
    full,
    load,
    load_transposed,
    over_rows,
    product,
    store_transposed,
    swizzled,
)


def word_rows(fmt: Dense) -> int:
    return fmt.values.shape[4]


def fetch_rows(plan: Plan, array, tiles, at: At, slot, barrier) -> None:
    """Copies the words `array[layer, row, block, head]` of a chunk's blocks to `tiles[slot, tile, 64, channels]`."""
    for i in range(plan.run):
        source = array.at[at.layer, at.row, at.block(i), at.head]
        for tile in range(tiles.shape[1]):
            rows = source.at[tile * plan.rows : (tile + 1) * plan.rows]
            here = tiles.at[slot, tile, i * plan.rows : (i + 1) * plan.rows, : plan.channels]
            plgpu.copy_gmem_to_smem(rows, here, barrier)


def normalised(q: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
    """`q [B, K, columns, H]` as values of at most 1 in a 16-bit dtype, and what `[B, K, columns]` float32 their
    products with keys are scores in units of log2 by: the power of two they were divided by, times log2 e."""
    top = jnp.abs(q).max(-1)
    unit = jnp.exp2(jnp.ceil(jnp.log2(jnp.maximum(top, jnp.float32(1e-30)))))
    return (q / unit[..., None]).astype(dtype), unit * jnp.float32(LOG2E)


@dataclasses.dataclass(frozen=True)
class DenseKeys:
    plan: Plan
    dtype: str

    def arrays(self, fmt: Dense, q: jax.Array) -> list:
        q, unit = normalised(q, self.dtype)
        padding = self.plan.padded - self.plan.channels
        return [fmt.values, jnp.pad(q, ((0, 0),) * 3 + ((0, padding),)), unit]

    def scratch(self) -> list:
        p = self.plan
        return [
            plgpu.SMEM((p.slots, p.planes, ROWS, p.padded), jnp.uint16, transforms=swizzled(min(8, p.rows), 16)),
            plgpu.SMEM((p.columns, p.padded), jnp.dtype(self.dtype), transforms=swizzled(8, 16)),
            plgpu.SMEM((p.columns,), jnp.float32),
        ]

    def copies(self) -> int:
        return self.plan.run * self.plan.planes

    def begin_copies(self) -> int:
        return 2

    def begin(self, src, dst, at: At, barrier) -> None:
        plgpu.copy_gmem_to_smem(src[1].at[at.row, at.head], dst[1], barrier)
        plgpu.copy_gmem_to_smem(src[2].at[at.row, at.head], dst[2], barrier)
        plgpu.barrier_wait(barrier)

    def fetch(self, src, dst, at: At, slot, barrier) -> None:
        fetch_rows(self.plan, src[0], dst[0], at, slot, barrier)

    def scores(self, dst, at: At, slot, planes: range) -> list:
        tiles, q, unit = dst
        unit = over_rows(load_column(unit, self.plan.interpret), ROWS)
        scores = []
        for p in planes:
            bits = load(tiles.at[slot, p], WGMMA, self.plan.interpret, optimized=False)
            a = jax.lax.bitcast_convert_type(bits, jnp.dtype(self.dtype))
            scores.append(product([(a, q)], self.plan.columns, self.plan.interpret) * unit)
        return scores


@dataclasses.dataclass(frozen=True)
class DenseValues:
    plan: Plan
    dtype: str
    borrows: ClassVar[int] = 0

    def arrays(self, fmt: Dense) -> list:
        return [fmt.values]

    def scratch(self) -> list:
        p = self.plan
        alive = len(p.rounds[0])
        return [
            plgpu.SMEM((p.slots, p.planes, ROWS, p.padded), jnp.uint16, transforms=swizzled(min(8, p.rows), 16)),
            plgpu.SMEM((alive, p.columns, ROWS), jnp.dtype(self.dtype), transforms=swizzled(8, 16)),
        ]

    def copies(self) -> int:
        return self.plan.run * self.plan.planes

    def fetch(self, src, dst, at: At, slot, barrier) -> None:
        fetch_rows(self.plan, src[0], dst[0], at, slot, barrier)

    def init(self):
        return full((self.plan.padded, self.plan.columns), 0.0, self.plan.interpret)

    def add(self, dst, at: At, slot, planes: range, weights: list, alpha, state):
        tiles, p_ref = dst
        dtype = jnp.dtype(self.dtype)
        for i, w in enumerate(weights):
            store_transposed(p_ref.at[i], w.astype(dtype), self.plan.interpret)
        plgpu.commit_smem()
        pairs = []
        for i, p in enumerate(planes):
            bits = load_transposed(tiles.at[slot, p], self.plan.interpret)
            pairs.append((jax.lax.bitcast_convert_type(bits, dtype), p_ref.at[i]))
        new = product(pairs, self.plan.columns, self.plan.interpret)
        return state * over_rows(alpha, self.plan.padded) + new

    def store(self, ref, state) -> None:
        store_tile(ref, state, lambda row: row, self.plan.interpret)
