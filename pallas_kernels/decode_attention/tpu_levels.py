"""Levels of packed codes on TPU: tables of each channel, read by gathers along sublanes (kernels-guide section 4).

Channels are on lanes, so every channel may have a table of its own at no cost: scale and zero per channel are part of
it. Two ways, as the chips differ:

* float32, any chip: a gather takes one of 8 float32 rows for each of 8 tokens; 4 bits take two and a select, or one
  whose rows hold two levels. (Gathers along lanes, by another unit, cost more than they relieve: tried on v5p.)
* bytes, v6e and 7x: a gather takes one of 32 byte rows for each of 32 bytes: the low and the high bytes of bfloat16,
  which need no conversion then. Codes of 4 (or 2) bits are bytes after a shift and an `and`, and fetch low and high
  bytes apart; two codes of 3 bits in the halves of a word are copied to both bytes of a half.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import packing
from pallas_kernels.decode_attention.tpu_metadata import HIGH_HALF, MAGNITUDE
from pallas_kernels.decode_attention.tpu_plan import SUBLANES, Plan

BYTE_ROWS = 32
TINY = 1 << 24  # the bits of 2**-125 as float32
Load = Callable[[int, int, int], jax.Array]  # load(block of the run, first row, rows) -> uint32 [rows, lanes]


@dataclasses.dataclass(frozen=True)
class Word:
    """The fields that lie wholly in word `index` of a cell: `first`, `first` + 1, ..., from bit `offset` on."""

    index: int
    first: int
    offset: int
    fields: int


WORDS3 = (Word(0, 0, 0, 10), Word(1, 11, 1, 10), Word(2, 22, 2, 10))  # fields 10 and 21 straddle


def _words(bits: int) -> tuple[Word, ...]:
    return WORDS3 if bits == 3 else (Word(0, 0, 0, 32 // bits),)


@dataclasses.dataclass(frozen=True)
class Levels:
    """Reads the codes of a run.

    Attributes:
      bits: 1 to 4.
      bytes: whether bytes are gathered, so that values are bfloat16; float32 otherwise.
      rounded: whether levels may be rounded to bfloat16, so that one float32 holds two of 16; not where values will be
        multiplied and rounded again.
    """

    bits: int
    plan: Plan
    rounded: bool = True

    @property
    def cells(self) -> int:
        return self.plan.tokens // packing.codes_per_cell(self.bits)

    @property
    def bytes(self) -> bool:
        return self.plan.chip in ("v6e", "7x") and self.cells % SUBLANES == 0

    @property
    def _unpacked(self) -> bool:
        """Whether codes are unpacked from bytes, by conversions: a shift and an `and` for four registers of them."""
        return not self.bytes and self.bits in (2, 4) and self.cells % SUBLANES == 0

    @property
    def natural(self) -> bool:
        """Whether `order` is that of the tokens."""
        return not self.bytes and not self._unpacked

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(jnp.bfloat16 if self.bytes else jnp.float32)

    @property
    def table_shape(self) -> tuple[int, jnp.dtype]:
        """Rows and dtype of a table."""
        if self.bytes:
            return (BYTE_ROWS if self.bits == 3 else 2 * BYTE_ROWS, jnp.int8)
        return (2 * SUBLANES if self.bits == 4 and not self.rounded else SUBLANES), jnp.float32

    @property
    def order(self) -> np.ndarray:
        """`[run_tokens]`: which token of the run stands at each position."""
        if self.natural:
            return np.arange(self.plan.run_tokens)
        if self._unpacked:
            shifts = np.arange(0, 8, self.bits)
            sizes = (self.plan.unit, self.cells // SUBLANES, len(shifts), SUBLANES, 4)
            block, v, shift, row, byte = np.meshgrid(*(np.arange(n) for n in sizes), indexing="ij")
            field = (8 * byte + shifts[shift]) // self.bits
            return (block * self.plan.tokens + field * self.cells + v * SUBLANES + row).ravel()
        return np.concatenate([tokens for _, tokens in self._pairs(None)])

    def table(self, levels: list[jax.Array]) -> jax.Array:
        """The table of values `levels[code]`, each `[1, H]` float32."""
        if not self.bytes:
            if self.bits == 4 and self.rounded:
                levels = [_two(*pair) for pair in zip(levels[:SUBLANES], levels[SUBLANES:])]
            return jnp.concatenate(levels + levels[-1:] * (self.table_shape[0] - len(levels)), axis=0)
        word = [pltpu.bitcast(x.astype(jnp.bfloat16).astype(jnp.float32), jnp.int32) for x in levels]
        low, high = ([(x >> s) & 0xFF for x in word] for s in (16, 24))
        if self.bits == 3:  # as `_index` numbers them
            rows = [x for pair in zip(low, high) for x in pair] + low + high
        else:
            fill = [low[0]] * (BYTE_ROWS - len(levels))
            rows = [*low, *fill, *high, *fill]
        return jnp.concatenate(rows, axis=0).astype(jnp.int8)

    def values(self, table: jax.Array, load: Load) -> list[jax.Array]:
        """The run's values in `order`, whole registers of float32 or `[16, lanes]` bfloat16 each."""
        if not self.bytes:
            find = self._of_bytes if self._unpacked else self._of_fields
            return [x for block in range(self.plan.unit) for x in find(table, load, block)]
        if self.bits != 3:
            return [x for block in range(self.plan.unit) for x in self._of_planes(table, load, block)]
        gathered = [
            _take(table, pltpu.bitcast(self._index(pair), jnp.int8))
            for pair, _ in self._pairs(load)
            if pair is not None
        ]
        return [pltpu.bitcast(x, jnp.bfloat16) for x in gathered]

    # float32 gathers, codes unpacked from bytes: four tokens of a word on neighbouring sublanes.

    def _of_bytes(self, table: jax.Array, load: Load, block: int) -> list[jax.Array]:
        out = []
        for v in range(0, self.cells, SUBLANES):
            words = load(block, v, SUBLANES)
            for shift in range(0, 8, self.bits):
                index = self._unpack(words, shift, min(7, 2**self.bits - 1))
                fourth = self._unpack(words, shift - 1, 16) if self.bits == 4 else None
                for i in range(0, 4 * SUBLANES, SUBLANES):
                    value = _take(table[:SUBLANES], index[i : i + SUBLANES])
                    if fourth is not None:
                        second = fourth[i : i + SUBLANES]  # 16 for codes from 8 on
                        if self.rounded:  # the lower half is to be the upper one
                            value = pltpu.bitcast(pltpu.bitcast(value, jnp.int32) << second, jnp.float32)
                        else:
                            value = jnp.where(second == 0, value, _take(table[SUBLANES:], index[i : i + SUBLANES]))
                    out.append(value)
        return out

    def _unpack(self, words: jax.Array, shift: int, mask: int) -> jax.Array:
        """int32 `[32, lanes]` of the bytes of `words[8, lanes]`."""
        words = words >> jnp.uint32(shift) if shift >= 0 else words << jnp.uint32(-shift)
        return pltpu.bitcast(words & jnp.uint32(mask * 0x01010101), jnp.int8).astype(jnp.int32)

    # float32 gathers, tokens in natural order.

    def _of_fields(self, table: jax.Array, load: Load, block: int) -> list[jax.Array]:
        if self.cells >= SUBLANES:
            words = [
                [load(block, i * self.cells + v, SUBLANES) for v in range(0, self.cells, SUBLANES)]
                for i in range(len(_words(self.bits)))
            ]
            codes = [
                self._field(field, [w[v] for w in words]) for field in self._fields() for v in range(len(words[0]))
            ]
        else:
            # Four cells: two fields share the eight sublanes, so the words are there twice.
            twice = [jnp.concatenate([load(block, 4 * i, 4)] * 2, axis=0) for i in range(len(_words(self.bits)))]
            codes = [self._two_fields(field, twice) for field in self._fields()[::2]]
        mask = jnp.uint32(2**self.bits - 1)
        return [_take(table, pltpu.bitcast(code & mask, jnp.int32)) for code in codes]

    def _fields(self) -> range:
        return range(packing.codes_per_cell(self.bits))

    def _field(self, field: int, words: list[jax.Array]) -> jax.Array:
        """The codes of a field, in the low bits; what is above them is not theirs."""
        for word in _words(self.bits):
            if 0 <= field - word.first < word.fields:
                return words[word.index] >> jnp.uint32(word.offset + self.bits * (field - word.first))
        if field == 10:
            return (words[0] >> jnp.uint32(30)) | (words[1] << jnp.uint32(2))
        return (words[1] >> jnp.uint32(31)) | (words[2] << jnp.uint32(1))

    def _two_fields(self, field: int, words: list[jax.Array]) -> jax.Array:
        """`field` in the upper four sublanes, the next in the lower."""
        upper = lax.broadcasted_iota(jnp.int32, words[0].shape, 0) < SUBLANES // 2
        for word in _words(self.bits):
            first = word.offset + self.bits * (field - word.first)
            if word.first <= field and field + 1 < word.first + word.fields:
                shift = jnp.where(upper, first, first + self.bits).astype(jnp.uint32)
                return words[word.index] >> shift
        return jnp.where(upper, self._field(field, words), self._field(field + 1, words))

    # Byte gathers, two tokens of a word together.

    def _of_planes(self, table: jax.Array, load: Load, block: int) -> list[jax.Array]:
        """The codes of a word's bytes at once: low bytes of four tokens, high bytes, and both brought together."""
        out, upper = [], jnp.uint32(0xFF00FF00)
        for v in range(0, self.cells, SUBLANES):
            words, even, odd = load(block, v, SUBLANES), [], []
            for shift in range(0, 8, self.bits):
                index = pltpu.bitcast(
                    (words >> jnp.uint32(shift)) & jnp.uint32((2**self.bits - 1) * 0x01010101), jnp.int8
                )
                low, high = (pltpu.bitcast(_take(x, index), jnp.uint32) for x in (table[:BYTE_ROWS], table[BYTE_ROWS:]))
                even.append((low & ~upper) | ((high << jnp.uint32(8)) & upper))
                odd.append(((low >> jnp.uint32(8)) & ~upper) | (high & upper))
            out += even + odd
        return [pltpu.bitcast(x, jnp.bfloat16) for x in out]

    def _index(self, pair: jax.Array) -> jax.Array:
        """Table rows, in bytes, of two codes of 3 bits, 15 bits apart: 2c, 2c + 1 for the first, 16 + c, 24 + c."""
        return pair * jnp.uint32(0x0202) + jnp.uint32(0x18100100)

    def _pairs(self, load: Load | None) -> list[tuple[jax.Array | None, np.ndarray]]:
        """Two codes per word, `[8, lanes]`, and the 16 tokens they are; None for the words without `load`."""
        out = []
        for block in range(self.plan.unit):
            for v in range(0, self.cells, SUBLANES):
                words = [
                    None if load is None else load(block, w.index * self.cells + v, SUBLANES) for w in _words(self.bits)
                ]
                cell = block * self.plan.tokens + v + np.arange(SUBLANES)
                for w, word in zip(_words(self.bits), words):
                    out += self._whole(word, w.offset, w.fields, w.first * self.cells + cell)
                out += self._straddling(words, cell)
        return out

    def _whole(self, word, offset: int, fields: int, tokens: np.ndarray) -> list[tuple[jax.Array | None, np.ndarray]]:
        """Fields f and f + fields / 2 of a word; field 0 is `tokens`, the next ones follow after C tokens each."""
        out = []
        for f in range(fields // 2):
            at = [tokens + (f + n * (fields // 2)) * self.cells for n in range(2)]
            pair = None
            if word is not None:
                mask = (2**self.bits - 1) * (1 + 2 ** (self.bits * (fields // 2)))
                pair = (word >> jnp.uint32(offset + self.bits * f)) & jnp.uint32(mask)
            out.append((pair, np.stack(at, axis=1).reshape(-1)))
        return out

    def _straddling(self, words, cell: np.ndarray) -> list[tuple[jax.Array | None, np.ndarray]]:
        """Fields 10 and 21 at 3 bits."""
        if self.bits != 3:
            return []
        pair = None
        if words[0] is not None:
            one, two = jnp.uint32(1), jnp.uint32(2)
            low = (words[0] >> jnp.uint32(30)) | ((words[1] & one) << two)
            high = (words[1] >> jnp.uint32(31)) | ((words[2] & jnp.uint32(3)) << one)
            pair = low | (high << jnp.uint32(15))
        return [(pair, np.stack([10 * self.cells + cell, 21 * self.cells + cell], axis=1).reshape(-1))]


def _two(upper: jax.Array, lower: jax.Array) -> jax.Array:
    """float32 that rounds to `upper` as bfloat16, and whose lower half is `lower` as bfloat16."""
    # Adding 0 leaves no -0, whose bits are half a unit of the upper half.
    upper, low = (pltpu.bitcast((x + 0.0).astype(jnp.bfloat16).astype(jnp.float32), jnp.int32) for x in (upper, lower))
    low = lax.shift_right_logical(low, jnp.full_like(low, 16))
    nearest = (upper - low + 0x8000) & HIGH_HALF
    # Next to 0 there is none on the other side.
    return pltpu.bitcast(jnp.where((upper & MAGNITUDE) < TINY, 0, nearest) | low, jnp.float32)


def _take(table: jax.Array, index: jax.Array) -> jax.Array:
    """`table[index[i, lane], lane]`."""
    return jnp.take_along_axis(table, index, axis=0, mode="promise_in_bounds", wrap_negative_indices=False)
