"""Packed codes as matrix operands, and the order of tokens that comes with each way of making them.

An operand holds `gain * (code - middle) + offset`, exactly. Codes are centred where what multiplies them is rounded to
bfloat16: the error grows with the size of the operand.
"""

import abc
import dataclasses
import itertools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention.tpu_plan import BF16_ARITHMETIC, INT8_PRODUCTS, SUBLANES


@dataclasses.dataclass(frozen=True)
class Encoding(abc.ABC):
    """Codes of `bits` bits.

    Attributes:
      weights: what each of the operands counts for; several where one bfloat16 cannot hold a code.
      offset: the operand of the middle code, times the weights; exact in bfloat16.
      integer: whether operands are int8, to be multiplied by integers (`tpu_products`), and not bfloat16.
    """

    bits: int
    integer: ClassVar[bool] = False

    @property
    def weights(self) -> tuple[float, ...]:
        return (1.0,)

    @property
    def middle(self) -> float:
        return ((1 << self.bits) - 1) / 2

    @property
    @abc.abstractmethod
    def gain(self) -> float: ...

    @property
    @abc.abstractmethod
    def offset(self) -> float: ...

    @abc.abstractmethod
    def order(self, blocks: int, tokens: int) -> np.ndarray:
        """The token at each position of the operands of a run."""

    @abc.abstractmethod
    def pieces(self, words: jax.Array) -> list[list[jax.Array]]:
        """Per weight, consecutive rows of the operand of `words[W, H]`, which fill whole sublanes."""

    def operands(self, words: jax.Array) -> list[jax.Array]:
        """Per weight `[blocks * T, H]` of `words[blocks, W, H]` uint32, tokens in `order`."""
        blocks, rows, channels = words.shape
        together = blocks_together(blocks, rows)
        parts = [
            self.pieces(words[i : i + together].reshape(together * rows, channels)) for i in range(0, blocks, together)
        ]
        return [jnp.concatenate(list(itertools.chain(*pieces)), axis=0) for pieces in zip(*parts)]


class HalfWords(Encoding):
    """Integer operations only, for chips without bfloat16 arithmetic (v5e, v5p) and for all others.

    A word holds fields of two halves of 16 bits, and a half is a bfloat16: moved to the top of the mantissa under the
    exponent of 1, a code of b <= 4 bits reads as `1 + code / 2**b`. A shift, an and, an or make 2048 operands. Codes
    of 8 bits are two operands of 4.
    """

    @property
    def weights(self) -> tuple[float, ...]:
        return (1.0, 16.0) if self.bits == 8 else (1.0,)

    @property
    def middle(self) -> float:
        return 128.0 if self.bits == 8 else super().middle

    @property
    def gain(self) -> float:
        return 1 / (1 << min(self.bits, 4))

    @property
    def offset(self) -> float:
        return sum(self.weights) + self.middle * self.gain

    def order(self, blocks: int, tokens: int) -> np.ndarray:
        rows, fields = tokens * self.bits // 32, 16 // self.bits
        together = blocks_together(blocks, rows)
        sizes = (blocks // together, fields, together, rows, 2)
        run, field, block, row, half = np.meshgrid(*(np.arange(n) for n in sizes), indexing="ij")
        return ((run * together + block) * tokens + (field + half * fields) * rows + row).ravel()

    def pieces(self, words: jax.Array) -> list[list[jax.Array]]:
        bits = min(self.bits, 4)
        return [
            [self._piece(words, at + 4 * plane, bits) for at in range(0, 16, self.bits)]
            for plane in range(len(self.weights))
        ]

    @staticmethod
    def _piece(words: jax.Array, at: int, bits: int) -> jax.Array:
        mantissa, one = 7, 0x3F80
        right = at - (mantissa - bits)
        mask = ((1 << bits) - 1) << (mantissa - bits)
        words = words >> jnp.uint32(right) if right >= 0 else words << jnp.uint32(-right)
        return pltpu.bitcast((words & jnp.uint32(mask * 0x10001)) | jnp.uint32(one * 0x10001), jnp.bfloat16)


class Signed(Encoding):
    """By the conversion from int4 (or int8) that v6e and later have: one operation per 2048 operands.

    Codes below 4 bits are moved to the top of each nibble, with the bit below set: the middle is then exactly 0.
    """

    @property
    def middle(self) -> float:
        return float(1 << (self.bits - 1)) if self.bits >= 4 else super().middle

    @property
    def gain(self) -> float:
        return 1.0 if self.bits == 8 else float(1 << (4 - self.bits))

    @property
    def offset(self) -> float:
        return 0.0

    @property
    def _container(self) -> int:
        return max(self.bits, 4)

    def order(self, blocks: int, tokens: int) -> np.ndarray:
        rows, inside, containers = tokens * self.bits // 32, self._container // self.bits, 32 // self._container
        together = blocks_together(blocks, rows)
        sizes = (blocks // together, inside, together, rows, containers)
        run, sub, block, row, container = np.meshgrid(*(np.arange(n) for n in sizes), indexing="ij")
        return ((run * together + block) * tokens + (container * inside + sub) * rows + row).ravel()

    def pieces(self, words: jax.Array) -> list[list[jax.Array]]:
        width, repeat = self._container, 0x01010101 if self.bits == 8 else 0x11111111
        words = words ^ jnp.uint32(
            repeat << (width - 1) if self.bits >= 4 else 0xFFFFFFFF if self.bits == 1 else 0xAAAAAAAA
        )
        if self.bits >= 4:
            return [[pltpu.bitcast(words, jnp.int8 if width == 8 else jnp.int4).astype(jnp.bfloat16)]]
        top = width - self.bits
        mask = jnp.uint32(repeat * (((1 << self.bits) - 1) << top))
        below = jnp.uint32(repeat << (top - 1))
        out = []
        for sub in range(width // self.bits):
            left = top - sub * self.bits
            out.append(((words << jnp.uint32(left)) & mask) | below)
        return [[pltpu.bitcast(x, jnp.int4).astype(jnp.bfloat16) for x in out]]


class Bytes(Encoding):
    """A code in each byte, for the int8 matrix units of v5e, v5p and v6e: a shift and an and make 4096 operands."""

    integer = True

    @property
    def middle(self) -> float:
        return 128.0 if self.bits == 8 else 0.0

    @property
    def gain(self) -> float:
        return 1.0

    @property
    def offset(self) -> float:
        return 0.0

    def order(self, blocks: int, tokens: int) -> np.ndarray:
        rows, fields = tokens * self.bits // 32, 8 // self.bits
        together = blocks_together(blocks, rows)
        sizes = (blocks // together, fields, together, rows, 4)
        run, field, block, row, byte = np.meshgrid(*(np.arange(n) for n in sizes), indexing="ij")
        return ((run * together + block) * tokens + (byte * fields + field) * rows + row).ravel()

    def pieces(self, words: jax.Array) -> list[list[jax.Array]]:
        if self.bits == 8:
            return [[pltpu.bitcast(words ^ jnp.uint32(0x80808080), jnp.int8)]]
        mask = jnp.uint32(((1 << self.bits) - 1) * 0x01010101)
        shifts = range(0, 8, self.bits)
        return [[pltpu.bitcast((words >> jnp.uint32(at) if at else words) & mask, jnp.int8) for at in shifts]]


def encoding(bits: int, chip: str) -> Encoding:
    if chip in INT8_PRODUCTS:
        return Bytes(bits)
    return (Signed if chip in BF16_ARITHMETIC else HalfWords)(bits)


def blocks_together(blocks: int, rows: int) -> int:
    """Blocks whose words fill whole sublanes."""
    return min(blocks, max(1, SUBLANES // rows))
