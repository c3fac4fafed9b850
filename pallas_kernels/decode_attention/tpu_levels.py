"""Levels of packed codes on TPU: tables of each channel, read by gathers along sublanes (kernels-guide section 4).

Channels are on lanes, so every channel may have a table of its own at no cost: scale and zero per channel are part of
it. Two ways, as the chips differ:

* float32, any chip: a gather takes one of 8 float32 rows for each of 8 tokens; 4 bits take two and a select. (Gathers
  along lanes, by another unit, cost more than they relieve: tried on v5p for 1, 2 and 3 registers of 4.)
* bytes, v6e and 7x: a gather takes one of 32 byte rows for each of 32 bytes. Two tokens stand in the halves of a
  word; their codes, copied to both bytes of a half, fetch the low and the high byte of a bfloat16, which needs no
  conversion then. All up to 4 bits cost the same.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import packing
from pallas_kernels.decode_attention.tpu_plan import SUBLANES, Plan

BYTE_ROWS = 32
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
    """

    bits: int
    plan: Plan

    @property
    def cells(self) -> int:
        return self.plan.tokens // packing.codes_per_cell(self.bits)

    @property
    def bytes(self) -> bool:
        return self.plan.chip in ("v6e", "7x") and self.cells % SUBLANES == 0

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(jnp.bfloat16 if self.bytes else jnp.float32)

    @property
    def table_shape(self) -> tuple[int, jnp.dtype]:
        """Rows and dtype of a table."""
        return (BYTE_ROWS, jnp.int8) if self.bytes else (max(SUBLANES, 2**self.bits), jnp.float32)

    @property
    def order(self) -> np.ndarray:
        """`[run_tokens]`: which token of the run stands at each position."""
        if not self.bytes:
            return np.arange(self.plan.run_tokens)
        return np.concatenate([tokens for _, tokens in self._pairs(None)])

    def table(self, levels: list[jax.Array]) -> jax.Array:
        """The table of values `levels[code]`, each `[1, H]` float32."""
        if not self.bytes:
            rows = levels + levels[-1:] * (self.table_shape[0] - len(levels))
            return jnp.concatenate(rows, axis=0)
        word = [pltpu.bitcast(x.astype(jnp.bfloat16).astype(jnp.float32), jnp.int32) for x in levels]
        low, high = ([(x >> s) & 0xFF for x in word] for s in (16, 24))
        fill = [low[0]]
        if self.bits == 3:  # as `_index` numbers them
            rows = [x for pair in zip(low, high) for x in pair] + low + high
        else:
            short = 16 - len(levels)
            rows = low + fill * short + high + fill * short
        return jnp.concatenate(rows, axis=0).astype(jnp.int8)

    def values(self, table: jax.Array, load: Load) -> list[jax.Array]:
        """The run's values in `order`, `[8, lanes]` float32 or `[16, lanes]` bfloat16 each."""
        if not self.bytes:
            codes = [x for block in range(self.plan.unit) for x in self._natural(load, block)]
            return [self._look_up(table, x) for x in codes]
        gathered = [
            _take(table, pltpu.bitcast(self._index(pair), jnp.int8))
            for pair, _ in self._pairs(load)
            if pair is not None
        ]
        return [pltpu.bitcast(x, jnp.bfloat16) for x in gathered]

    # float32 gathers, tokens in natural order.

    def _natural(self, load: Load, block: int) -> list[jax.Array]:
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
        return codes

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

    def _look_up(self, table: jax.Array, code: jax.Array) -> jax.Array:
        index = pltpu.bitcast(code & jnp.uint32(min(7, 2**self.bits - 1)), jnp.int32)
        value = _take(table[:SUBLANES], index)
        if self.bits < 4:
            return value
        return jnp.where((code & jnp.uint32(8)) == 0, value, _take(table[SUBLANES:], index))

    # Byte gathers, two tokens of a word together.

    def _index(self, pair: jax.Array) -> jax.Array:
        """Table rows, in bytes, of two codes 16 bits apart (15 at 3 bits)."""
        if self.bits == 3:  # 2c, 2c + 1 for the first, 16 + c, 24 + c for the second
            return pair * jnp.uint32(0x0202) + jnp.uint32(0x18100100)
        return pair * jnp.uint32(0x0101) + jnp.uint32(0x10001000)  # c, 16 + c

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


def _take(table: jax.Array, index: jax.Array) -> jax.Array:
    """`table[index[i, lane], lane]`."""
    return jnp.take_along_axis(table, index, axis=0, mode="promise_in_bounds", wrap_negative_indices=False)
