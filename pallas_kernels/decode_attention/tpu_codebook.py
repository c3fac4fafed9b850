"""What TPU decoders of codebook keys and values (KVQuant) share: levels, and rows of numbers per token."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention.formats import Codebook, shape_of
from pallas_kernels.decode_attention.tpu_levels import Levels
from pallas_kernels.decode_attention.tpu_plan import LANES, Operand, Plan
from pallas_kernels.decode_attention.tpu_skeleton import Refs
from pallas_kernels.decode_attention.tpu_slots import SlotWords


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


@dataclasses.dataclass(frozen=True)
class CodebookStorage:
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


def _scalars(array: jax.Array) -> Operand:
    """`array[layer]` of `[L, n]` as scalars, `[1, n]`."""
    array = array[:, None]
    spec = pl.BlockSpec((None, *array.shape[1:]), lambda b, k, c, layer, *_: (layer[0], 0, 0), memory_space=pltpu.SMEM)
    return Operand(array, spec)
