"""Numbers per token on TPU, of all blocks of a chunk at once: `[blocks, T]`, tokens on lanes.

XLA lays out small arrays by its own rules, and a kernel that asks for another order has the array copied, the whole
cache for one layer of one step. So these operands follow the layouts of XLA (as its TPU compiler of 2026 has them):

* `[L, B, N, 1, T]`, shared by the kv heads: N on sublanes. A kernel may only begin at whole tiles there: fixed windows
  of blocks are fetched, as many as cover a chunk.
* `[L, B, N, K, s, T]` where s rows do not fill 32-bit words but K rows do: K on sublanes. All heads are fetched, and a
  head is read as one byte (or half) of every word.
* `[L, B, N, K, s, T]` where neither s nor K rows fill words but blocks fill whole tiles: N on sublanes, fetched as
  `[L, B, N, 1, T]` are. So it is on devices that have fewer than 4 of a model's heads.
* other `[L, B, N, K, s, T]`: as they stand.

Scales and zeros of affine storage with one row per block (`tpu_single_rows`) are of the first or the second kind.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention.tpu_metadata import (
    by_pieces,
    can_view,
    take_lanes,
    viewed,
)
from pallas_kernels.decode_attention.tpu_plan import LANES, SUBLANES, Operand, Plan, divided
from pallas_kernels.decode_attention.tpu_skeleton import Refs, Step

TILE = 16  # rows of a tile of 16-bit numbers
FILLED_PIECE = 64  # rows of 128 tokens


def float16_of(high: jax.Array) -> jax.Array:
    """float32 of float16 bits in the upper half of int32; subnormal ones (below 6.2e-5) may come out as 0."""
    return pltpu.bitcast((high >> 3) & jnp.int32(~0x70000000), jnp.float32) * jnp.float32(2.0**112)


@dataclasses.dataclass(frozen=True)
class LaneOrder:
    """Brings the tokens of each block to a decoder's order, by gathers along lanes.

    Attributes:
      order: `[run_tokens]`, as of a decoder; the same in every block.
      tokens: T.
    """

    order: np.ndarray
    tokens: int

    @property
    def tiles(self) -> int:
        return self.tokens // LANES

    @property
    def natural(self) -> bool:
        return np.array_equal(self.order, np.arange(self.order.size))

    def operands(self, plan: Plan) -> list[Operand]:
        if self.natural:
            return []
        order = self.order.reshape(-1, self.tokens)
        assert (order == order[:1] + np.arange(len(order))[:, None] * self.tokens).all()
        order = np.broadcast_to(order[0].reshape(self.tiles, 1, LANES), (self.tiles, SUBLANES, LANES))
        return [plan.constant(jnp.asarray(order, jnp.int32))]

    def take(self, refs: Refs, words: Any, tile: int, first: Any, size: int) -> jax.Array:
        """Rows `first`, ... of `words[T/128, n, 128]` in order: whole registers `[size, 128]`.

        Args:
          refs: of `operands()`.
        """
        rows = pl.ds(first, size)
        if self.natural:
            return words[tile, rows]
        order = jnp.concatenate([refs[0][tile]] * (size // SUBLANES), axis=0)
        lane = order & (LANES - 1)
        out = take_lanes(words[0, rows], lane)
        for n in range(1, self.tiles):
            out = jnp.where(order < n * LANES, out, take_lanes(words[n, rows], lane))
        return out


@dataclasses.dataclass(frozen=True)
class SharedRows:
    """float16 numbers `[L, B, N, 1, T]` of a chunk's blocks."""

    plan: Plan

    @property
    def window(self) -> int:
        """Blocks that are fetched at once."""
        size = pl.cdiv(self.plan.chunk_blocks, TILE) * TILE
        return min(self.plan.blocks, size + TILE if self.plan.blocks % TILE == 0 else size)

    @property
    def windows(self) -> int:
        return 1 if self.plan.blocks % TILE == 0 or self.window == self.plan.blocks else 2

    @property
    def rows(self) -> int:
        """Rows that are held; the first block of the chunk is at `offset`."""
        return self.windows * self.window

    def _first(self, start: jax.Array) -> jax.Array:
        """The first block that is fetched for a chunk that begins at block `start`."""
        if self.windows == 2:
            return divided(start, self.window) * self.window
        tiles = lax.shift_right_logical(start, jnp.int32(TILE.bit_length() - 1))
        return jnp.minimum(tiles, (self.plan.blocks - self.window) // TILE) * TILE

    def operands(self, array: jax.Array) -> list[Operand]:
        array, plan, size = array[:, :, :, 0], self.plan, self.window
        squeezed, ends = pl.Squeezed(), pl.cdiv(plan.blocks, size) - 1

        def spec(window):
            def index(b, k, c, layer, first, last):
                used = jnp.clip(c, 0, jnp.maximum(plan.count(first[b], last[b]) - 1, 0))
                start = plan.start(first[b], used)
                if self.windows == 1:
                    return layer[0], b, self._first(start), 0
                return layer[0], b, jnp.minimum(divided(start, size) + window, ends), 0

            if self.windows == 1:
                return pl.BlockSpec((squeezed, squeezed, pl.Element(size), pl.Element(array.shape[-1])), index)
            return pl.BlockSpec((None, None, size, array.shape[-1]), index)

        return [Operand(array, spec(i)) for i in range(self.windows)]

    def offset(self, step: Step) -> jax.Array:
        return step.block - self._first(step.block)

    def read(self, refs: Refs) -> jax.Array:
        """int32 `[rows, T]`, the number in the upper bits."""
        return jnp.concatenate([ref[...].astype(jnp.int32) << 16 for ref in refs], axis=0)


@dataclasses.dataclass(frozen=True)
class SlotRows:
    """Numbers of 8 or 16 bits `[L, B, N, K, s, T]` of a chunk's blocks and one head, per slot."""

    array: Any
    plan: Plan

    @property
    def per_word(self) -> int:
        return 4 // self.array.dtype.itemsize

    @property
    def slots(self) -> int:
        return self.array.shape[-2]

    @property
    def heads_on_sublanes(self) -> bool:
        return self.slots % self.per_word != 0 and self.plan.heads % self.per_word == 0

    @property
    def blocks_on_sublanes(self) -> bool:
        words = self.slots % self.per_word == 0 or self.heads_on_sublanes
        return not words and self.plan.blocks % self._tile == 0

    @property
    def _tile(self) -> int:
        """Rows of a tile."""
        return 8 * self.per_word

    @property
    def _window(self) -> int:
        """Blocks that are fetched where they stand on sublanes: whole tiles, wherever the chunk begins."""
        return min(self.plan.blocks, (pl.cdiv(self.plan.chunk_blocks, self._tile) + 1) * self._tile)

    def _first(self, start: jax.Array) -> jax.Array:
        """The first of those blocks, for a chunk that begins at block `start`."""
        tiles = lax.div(start, jnp.full_like(start, self._tile))
        return jnp.minimum(tiles, (self.plan.blocks - self._window) // self._tile) * self._tile

    @property
    def _rows(self) -> int:
        """Rows of words per block."""
        return (self.slots * self.plan.heads if self.heads_on_sublanes else self.slots) // self.per_word

    def operand(self) -> Operand:
        if self.blocks_on_sublanes:
            return self._in_windows()
        if not self.heads_on_sublanes:
            return self.plan.stored(self.array, whole=self._in_place)
        array, plan = self.array.swapaxes(3, 4), self.plan
        inner = [pl.Element(n) for n in array.shape[3:]]

        def index(b, k, c, layer, first, last):
            used = jnp.clip(c, 0, jnp.maximum(plan.count(first[b], last[b]) - 1, 0))
            return layer[0], b, plan.start(first[b], used), 0, 0, 0

        squeezed = pl.Squeezed()
        return Operand(array, pl.BlockSpec((squeezed, squeezed, pl.Element(plan.chunk_blocks), *inner), index))

    def _in_windows(self) -> Operand:
        array, plan = self.array.transpose(0, 1, 3, 4, 2, 5), self.plan

        def index(b, k, c, layer, first, last):
            used = jnp.clip(c, 0, jnp.maximum(plan.count(first[b], last[b]) - 1, 0))
            return layer[0], b, k, 0, self._first(plan.start(first[b], used)), 0

        squeezed, (slots, _, tokens) = pl.Squeezed(), array.shape[3:]
        inner = (pl.Element(slots), pl.Element(self._window), pl.Element(tokens))
        return Operand(array, pl.BlockSpec((squeezed, squeezed, squeezed, *inner), index))

    @property
    def _as_they_are(self) -> bool:
        """Few heads, or an odd number: rows do not stand in words with others."""
        return not self.heads_on_sublanes and self.slots % self.per_word != 0

    @property
    def _in_place(self) -> bool:
        """Whether words can be read from where they were fetched to: pairs of slots of 16 bits."""
        apart = self.heads_on_sublanes or self.blocks_on_sublanes or self._as_they_are
        return self.per_word == 2 and not apart and can_view(self.slots, self.array.shape[-1], self.plan)

    def scratch(self) -> Any:
        # Rows are read with a stride, which takes arrays of one register's lanes.
        tiles = self.array.shape[-1] // LANES
        if self.blocks_on_sublanes:
            return pltpu.VMEM((self.slots * tiles, self._window, LANES), jnp.int32)
        blocks = 1 if self._in_place else self.plan.chunk_blocks
        return pltpu.VMEM((tiles, max(self._rows, 1) * blocks, LANES), jnp.int32)

    def read(self, ref: Any, words: Any, step: Step) -> list[jax.Array]:
        """Per slot int32 `[chunk_blocks, T]`, the number in the upper bits. `words` is the scratch."""
        self.fill(ref, words)
        return [self.rows(ref, words, step, s, 0, self.plan.chunk_blocks) for s in range(self.slots)]

    def fill(self, ref: Any, words: Any) -> None:
        """Makes ready what `rows` reads."""
        bits, tiles = 32 // self.per_word, self.array.shape[-1] // LANES
        if self.blocks_on_sublanes:
            for s in range(self.slots):
                x = ref[s].astype(jnp.int32) << (32 - bits)
                for i in range(tiles):
                    words[s * tiles + i] = x[:, i * LANES : (i + 1) * LANES]
        elif not self._as_they_are and not self._in_place:

            def piece(first, size):
                flat = pltpu.bitcast(ref[pl.ds(first, size)].reshape(-1, self.array.shape[-1]), jnp.int32)
                for i in range(tiles):
                    words[i, pl.ds(first * self._rows, size * self._rows)] = flat[:, i * LANES : (i + 1) * LANES]

            by_pieces(self.plan.chunk_blocks, FILLED_PIECE // tiles, piece)

    def rows(self, ref: Any, words: Any, step: Step, slot: int, first: Any, size: int) -> jax.Array:
        """Of a slot and so many blocks from `first` on: int32 `[size, T]`, the number in the upper bits."""
        bits, tiles = 32 // self.per_word, range(self.array.shape[-1] // LANES)
        if self.blocks_on_sublanes:  # they may begin within a tile
            chunk = pl.ds(step.block - self._first(step.block) + first, size)
            return jnp.concatenate([words[slot * len(tiles) + i, chunk] for i in tiles], axis=1)
        if self._as_they_are:
            return ref[pl.ds(first, size), slot].astype(jnp.int32) << (32 - bits)
        if self.heads_on_sublanes:
            group = lax.div(step.head, jnp.int32(self.per_word))
            row = slot * (self.plan.heads // self.per_word) + group
            shift = (self.per_word - 1 - (step.head - group * self.per_word)) * bits
        else:
            row = jnp.int32(slot // self.per_word)
            shift = jnp.int32((self.per_word - 1 - slot % self.per_word) * bits)
        rows = pl.ds(first * self._rows + row, size, stride=self._rows) if self._rows > 1 else pl.ds(first, size)
        x = viewed(ref)[rows] if self._in_place else jnp.concatenate([words[i, rows] for i in tiles], axis=1)
        return (x << shift) & jnp.int32(-(1 << (32 - bits)))


def row(ref: Any, index: tuple, first: jax.Array, count: int) -> jax.Array:
    """`[1, count * T]`: rows `first`, ..., of `ref[index]` side by side."""
    return jnp.concatenate([ref[(*index, pl.ds(first + i, 1))] for i in range(count)], axis=1)
