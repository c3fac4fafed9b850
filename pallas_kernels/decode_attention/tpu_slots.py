"""Outlier slots on TPU: a residual at one channel of a token, apart from the product with keys and values.

Keys and values are left as they are: their channels are on lanes, and a slot would cost a select in every register.
Here are the slots as words; what they add to scores is in `tpu_key_slots`, to weighted values in `tpu_value_slots`.
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
from pallas_kernels.decode_attention.tpu_metadata import HIGH_HALF, by_pieces
from pallas_kernels.decode_attention.tpu_plan import LANES, SUBLANES, Operand, Plan
from pallas_kernels.decode_attention.tpu_rows import LaneOrder, SlotRows, float16_of
from pallas_kernels.decode_attention.tpu_skeleton import Refs, Step

CHANNEL = 0xFF
PIECE = 64  # rows of 128 tokens
EIGHTS = 4  # of blocks, whose look-ups overlap, with 4 query heads; on 7x half as many of 128 tokens: registers spill


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


def log2(n: int) -> int:
    return n.bit_length() - 1


def eights_together(plan: Plan) -> int:
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
