"""Scales and zeros of affine storage with one row per block, on TPU."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention.tpu_metadata import (
    float32,
    float_scratch,
)
from pallas_kernels.decode_attention.tpu_plan import LANES, Operand, Plan
from pallas_kernels.decode_attention.tpu_rows import SharedRows, SlotRows
from pallas_kernels.decode_attention.tpu_skeleton import Refs, Step


@dataclasses.dataclass(frozen=True)
class SingleRows:
    """16-bit floats `[L, B, N, K or 1, 1, W]`, one row per block: of a chunk as float32 in scratch.

    W are tokens or channels. XLA keeps blocks (where the heads share a row) or heads on sublanes.
    """

    array: Any
    dtype: str
    plan: Plan

    @property
    def shared(self) -> bool:
        return self.array.shape[3] == 1

    @property
    def count(self) -> int:
        """Operands."""
        return SharedRows(self.plan).windows if self.shared else 1

    @property
    def _heads(self) -> SlotRows:
        return SlotRows(self.array, self.plan)

    def operands(self) -> list[Operand]:
        return SharedRows(self.plan).operands(self.array[..., 0, :]) if self.shared else [self._heads.operand()]

    def scratch(self) -> list[Any]:
        """Floats, and words on the way there."""
        rows = SharedRows(self.plan).rows if self.shared else self.plan.chunk_blocks
        floats = float_scratch(rows, self.array.shape[-1])
        return [floats, pltpu.VMEM((8, LANES), jnp.int32) if self.shared else self._heads.scratch()]

    def chunk(self, refs: Refs, scratch: Refs, step: Step) -> None:
        bits = SharedRows(self.plan).read(refs) if self.shared else self._heads.read(refs[0], scratch[1], step)[0]
        floats = float32(bits, self.dtype)
        for n in range(scratch[0].shape[0]):
            scratch[0][n] = floats[:, n * LANES : (n + 1) * LANES]

    def bits_scratch(self) -> Any:
        if not self.shared:
            return self._heads.scratch()
        return pltpu.VMEM((self.array.shape[-1] // LANES, SharedRows(self.plan).rows, LANES), jnp.int32)

    def bits(self, refs: Refs, scratch: Any, step: Step) -> jax.Array:
        """int32 `[chunk_blocks, W]` of the chunk's blocks, the number in the upper bits."""
        if not self.shared:
            return self._heads.read(refs[0], scratch, step)[0]
        words = SharedRows(self.plan).read(refs)
        for n in range(scratch.shape[0]):
            scratch[n] = words[:, n * LANES : (n + 1) * LANES]
        rows = pl.ds(self.offset(step), self.plan.chunk_blocks)
        return jnp.concatenate([scratch.at[n][rows] for n in range(scratch.shape[0])], axis=1)

    def offset(self, step: Step) -> jax.Array:
        """The row of the chunk's first block."""
        return SharedRows(self.plan).offset(step) if self.shared else jnp.int32(0)


def single_scratch(arrays: list[SingleRows]) -> list[Any]:
    """For scale and zero, which are laid out alike: theirs, and where the chunk's first block is."""
    return [*(x for array in arrays for x in array.scratch()), pltpu.SMEM((1,), jnp.int32)]


def read_single(arrays: list[SingleRows], operands: Refs, scratch: Refs, step: Step) -> None:
    """Once per chunk."""
    for i, array in enumerate(arrays):
        array.chunk(operands[i * array.count : (i + 1) * array.count], scratch[2 * i : 2 * i + 2], step)
    scratch[-1][0] = arrays[0].offset(step)


def single_rows(scratch: Refs, first: jax.Array, blocks: int) -> list[jax.Array]:
    """float32 `[blocks, W]` of scale and of zero, from block `first` of the chunk on."""
    rows = pl.ds(scratch[-1][0] + first, blocks)
    return [jnp.concatenate([ref[n, rows] for n in range(ref.shape[0])], axis=1) for ref in scratch[:3:2]]
