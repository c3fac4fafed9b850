"""Scales and zeros per token on TPU, in the order of a decoder."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention.formats import Affine
from pallas_kernels.decode_attention.tpu_codes import Encoding
from pallas_kernels.decode_attention.tpu_metadata import (
    HIGH_HALF,
    MAGNITUDE,
    by_pieces,
    can_view,
    float32,
    largest,
    take_lanes,
    viewed,
    words,
)
from pallas_kernels.decode_attention.tpu_plan import LANES, SUBLANES, Operand, Plan
from pallas_kernels.decode_attention.tpu_products import splat
from pallas_kernels.decode_attention.tpu_single_rows import SingleRows
from pallas_kernels.decode_attention.tpu_skeleton import Refs, Step

PIECE = 64  # rows of words
LARGEST = float(jnp.finfo(jnp.float32).max)
Bound = Callable[[jax.Array], jax.Array | None]


class TokenMetadata:
    """Scale and (centred) zero of each token of a chunk, brought to the order of a decoder by gathers along lanes.

    Two numbers of 16 bits travel in one word: those of two groups, or, where a block has one group, a scale and a zero.
    Where the order mixes the tokens of several blocks, a row of results holds those of all of them.
    """

    def __init__(self, fmt: Affine, plan: Plan, encoding: Encoding):
        self.fmt, self.plan, self.encoding = fmt, plan, encoding
        self.groups = fmt.groups
        order, together = encoding.order(plan.unit, plan.tokens), plan.unit
        while together > 1 and (order[: together * plan.tokens // 2] < together * plan.tokens // 2).all():
            together //= 2
        self.together, self.order = together, order[: together * plan.tokens].reshape(-1, LANES)
        single = self.groups == 1
        self.single = [SingleRows(x, fmt.dtype, plan) for x in (fmt.scale, fmt.zero)] if single else []
        assert single or self.groups % 2 == 0
        self.words = 1 if single else self.groups // 2  # of a block's scales, or of its scale and zero

    @property
    def count(self) -> int:
        """Operands."""
        return 1 + (sum(x.count for x in self.single) or 2)

    @property
    def _rows(self) -> int:
        """Of words in order: of all groups, or where blocks are mixed of one."""
        return self.plan.chunk_blocks * self.words if self.together == 1 else self.plan.chunk_blocks // self.together

    def operands(self) -> list[Operand]:
        stored = [self.plan.stored(x, whole=True) for x in (self.fmt.scale, self.fmt.zero)]
        if self.single:
            stored = [operand for x in self.single for operand in x.operands()]
        lane = np.broadcast_to(self.order[:, None] % LANES, (len(self.order), SUBLANES, LANES))
        source = np.broadcast_to(self.order[:, None] // LANES, lane.shape)
        return [*stored, self.plan.constant(jnp.asarray(np.stack([lane, source]), jnp.int32))]

    def scratch(self) -> list[Any]:
        """Scales and zeros in order, words (a second array of zeros), and what single rows need on their way there."""
        rows, tiles = _padded(self._rows), self.plan.tokens // LANES
        results = rows * (1 if self.together == 1 else self.words) * (1 if self.single else 2)
        results = pltpu.VMEM((len(self.order), results, LANES), jnp.float32)
        words = pltpu.VMEM((tiles, rows if self.together == 1 else rows * self.together * self.words, LANES), jnp.int32)
        return [results, results, words, words, *(x.bits_scratch() for x in self.single)]

    def chunk(self, operands: Refs, scratch: Refs, step: Step, bound: Bound | None = None) -> None:
        """Scale, and zero plus the scale of the middle code, of a chunk into scratch.

        Args:
          bound: given the largest magnitude `[1, 1]` of the scales, says what they are to be multiplied by: a float32
            that fills a register, `[8, 128]`, or None.
        """
        *results, scale_words, zero_words = scratch[:4]
        if self._in_place:
            scale_words, zero_words = (viewed(ref) for ref in operands[:2])
        elif self.single:
            self._read_single(operands, scratch, step)
        else:
            self._read(operands, scratch)
        factor = None if bound is None else bound(self._largest(operands, scratch))

        def ordered(first, size):
            for n in range(len(self.order)):
                for g in range(1 if self.together == 1 else self.words):
                    word = self._ordered(operands[-1], scale_words, n, g, first, size)
                    if self.single:
                        self._put(results, n, pl.ds(first, size), word & HIGH_HALF, word << 16, factor)
                        continue
                    zero = self._ordered(operands[-1], zero_words, n, g, first, size)
                    stride = 2 if self.together == 1 else self.groups
                    low, high = (pl.ds(first * stride + at, size, stride=stride) for at in (2 * g, 2 * g + 1))
                    self._put(results, n, low, word << 16, zero << 16, factor)
                    self._put(results, n, high, word & HIGH_HALF, zero & HIGH_HALF, factor)

        by_pieces(_padded(self._rows), PIECE, ordered)

    def _put(self, results: Refs, tile: int, rows: Any, scale: jax.Array, zero: jax.Array, factor: Any) -> None:
        scale, zero = (float32(x, self.fmt.dtype) for x in (scale, zero))
        if self.encoding.middle:
            zero = zero + jnp.float32(self.encoding.middle) * scale
        if factor is not None:
            # XLA on CPU would multiply the factor and what `float32` multiplies by first, and overflow.
            scale = jnp.minimum(scale, LARGEST) * splat(factor, scale.shape)
        for ref, x in zip(results, (scale, zero)):
            ref.at[tile][rows] = x

    def _read_single(self, operands: Refs, scratch: Refs, step: Step) -> None:
        """Scales, and zeros below them, into words."""
        count, out = self.single[0].count, scratch[2]
        scale, zero = (
            x.bits(operands[i * count : (i + 1) * count], scratch[4 + i], step) for i, x in enumerate(self.single)
        )
        both = scale | lax.shift_right_logical(zero, jnp.int32(16))
        for m in range(out.shape[0]):
            out[m, : both.shape[0]] = both[:, m * LANES : (m + 1) * LANES]

    @property
    def _in_place(self) -> bool:
        """Whether words can be taken from where they were fetched to."""
        if self.single or self.together > 1 or self._rows % SUBLANES:
            return False
        return can_view(self.fmt.scale.shape[-2], self.plan.tokens, self.plan)

    def _largest(self, operands: Refs, scratch: Refs) -> jax.Array:
        """`[1, 1]` float32."""
        if not self.single:
            return largest(operands[0], self.fmt.dtype, self.plan).max(keepdims=True)
        both = scratch[2][:, : self.plan.chunk_blocks]
        return float32((both & MAGNITUDE).max(axis=0), self.fmt.dtype).max(keepdims=True)

    def _read(self, operands: Refs, scratch: Refs) -> None:
        """Scales and zeros of two groups at a time into words."""
        for ref, out in zip(operands, scratch[2:4]):
            x = words(ref, 0, self.plan.chunk_blocks, self.plan)
            for m in range(out.shape[0]):
                out[m, : x.shape[0]] = x[:, m * LANES : (m + 1) * LANES]

    def _ordered(self, order_ref: Any, word_ref: Any, tile: int, group: int, first: Any, size: int) -> jax.Array:
        """`[size, 128]`: one register's width of words in order, those of one pair of groups where blocks are mixed."""
        lane, source = (jnp.concatenate([order_ref[i, tile]] * (size // SUBLANES), axis=0) for i in range(2))
        if self._in_place:
            return take_lanes(word_ref[pl.ds(first, size)], lane)
        out = jnp.zeros((size, LANES), jnp.int32)
        for at in sorted(set(self.order[tile] // LANES)):
            block, m = divmod(int(at), self.plan.tokens // LANES)
            rows = pl.ds(first, size)
            if self.together > 1:
                stride = self.together * self.words
                rows = pl.ds(first * stride + block * self.words + group, size, stride=stride)
            taken = take_lanes(word_ref.at[m][rows], lane)
            out = jnp.where(source == at, taken, out)
        return out

    def row(self, ref: Any, run: jax.Array, group: int) -> jax.Array:
        """`[1, run_tokens]` of one group of channels of a run of the chunk."""
        count = self.plan.unit // self.together
        rows = [pl.ds((run * count + i) * self.groups + group, 1) for i in range(count)]
        return jnp.concatenate([ref.at[n][r] for r in rows for n in range(ref.shape[0])], axis=1)


def _padded(rows: int) -> int:
    return pl.cdiv(rows, SUBLANES) * SUBLANES
