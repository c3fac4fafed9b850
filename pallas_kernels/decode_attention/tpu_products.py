"""What multiplies codes on TPU: rows rounded to bfloat16, or split into int8 where the operands of codes are int8.

A float32 row times a factor is an integer of 16 bits (queries) or 23 bits (weights), and its bytes, with the signs that
digits of base 256 may have, are rows of their own: they are all but free, since few rows meet an operand. Sums are
exact in int32. What is lost is relative to the largest number: scores' errors are (the largest product decides what a
score needs), and of weights 23 bits leave so little that a chunk's 16,384 tokens do not matter together.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention.tpu_codes import Encoding
from pallas_kernels.decode_attention.tpu_plan import LANES, SUBLANES
from pallas_kernels.decode_attention.tpu_skeleton import CONTRACT_LANES, Refs, folded

QUERY_BITS, WEIGHT_BITS = 16, 23  # with the sign
TINY = 2.0**-100  # rather than 0, whose exponent has no inverse
MANTISSA = 0x7C0000  # of 2 - 1/32: the largest number stays below 2**(bits - 1) by 1/64, so that its digits have room


def factors(largest: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """What takes numbers of up to `largest` to integers of `bits` bits, and its inverse."""
    exponent = pltpu.bitcast(jnp.maximum(largest, TINY), jnp.int32) >> 23
    up = ((bits - 3 + 2 * 127 - exponent) << 23) | MANTISSA
    down = (exponent - (bits - 3)) << 23
    return pltpu.bitcast(up, jnp.float32), pltpu.bitcast(down, jnp.float32) * (1 / (2 - 1 / 32))


def query_bytes(x: jax.Array) -> jax.Array:
    """int8 `[2 * R, H]` of float32 `x[R, H]` of up to QUERY_BITS bits: upper bytes, then lower ones.

    Adding 1.5 * 2**23 leaves a rounded integer in the mantissa, and what is added to it for the sign of the lower byte
    is taken from that byte again. Bytes are moved in words of two 16-bit integers, of which the upper bytes then do not
    matter.
    """
    words = pltpu.bitcast(x + jnp.float32(1.5 * 2**23 + 0x80), jnp.int32)
    pairs = pltpu.bitcast(words.astype(jnp.int16), jnp.int32)
    upper, lower = (pltpu.bitcast(y, jnp.int16) for y in (pairs >> 8, pairs ^ 0x800080))
    return jnp.concatenate([upper, lower], axis=0).astype(jnp.int8)


def weight_bytes(x: jax.Array) -> jax.Array:
    """int8 `[4 * R, T]` of float32 `x[R, T]` of up to WEIGHT_BITS bits.

    Row 4i + n is byte n of row i (n = 0, 1), or byte 2 plus 64 (n = 2), or 64 (n = 3): as they lie in the words, but
    for the signs.
    """
    words = pltpu.bitcast(x + jnp.float32(1.5 * 2**23 + 0x8080), jnp.int32)
    return pltpu.bitcast(words ^ jnp.int32(0x0B008080), jnp.int8)


def splat(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A number that fills a register, `[8, 128]`, as `shape`; rows and columns are multiples of those."""
    x = jnp.concatenate([x] * (shape[-1] // LANES), axis=1)
    return jnp.concatenate([x] * (shape[-2] // SUBLANES), axis=0)


@dataclasses.dataclass(frozen=True)
class RoundedQueries:
    """bfloat16 rows, `count` times `[R, H]`."""

    encoding: Encoding
    count: int
    rows: int
    channels: int

    def scratch(self) -> list[Any]:
        """Rows, and their sums times the operands' offset."""
        offset = pltpu.VMEM((self.count, self.rows, LANES), jnp.float32)
        return [pltpu.VMEM((self.count, self.rows, self.channels), jnp.bfloat16), offset]

    def bound(self, refs: Refs, largest: jax.Array) -> None:
        """Before the first `factor`: no row will hold a larger number than `largest[1, 1]`."""

    def factor(self, refs: Refs, x: jax.Array) -> jax.Array:
        """What makes rows of numbers `x` what `put` takes."""
        return x * jnp.float32(1 / self.encoding.gain)

    def put(self, refs: Refs, place: int, x: jax.Array) -> None:
        rows = x.astype(jnp.bfloat16)
        refs[0][place] = rows
        if self.encoding.offset:
            held = rows.astype(jnp.float32).sum(axis=1, keepdims=True)
            refs[1][place] = jnp.broadcast_to(jnp.float32(-self.encoding.offset) * held, refs[1].shape[1:])

    def inverse(self, refs: Refs) -> jax.Array | None:
        """What products are to be multiplied by, if anything: `[8, 128]`, all the same."""
        return None

    def products(self, refs: Refs, place: int, words: jax.Array) -> list[jax.Array]:
        """Arrays `[R, tokens]`, of which `combine` makes rows, as `put` was given them, times `code - middle`."""
        parts = []
        for weight, operand in zip(self.encoding.weights, self.encoding.operands(words)):
            part = lax.dot_general(refs[0][place], operand, CONTRACT_LANES, preferred_element_type=jnp.float32)
            parts.append(part if weight == 1 else weight * part)
        if self.encoding.offset:
            parts.append(jnp.concatenate([refs[1][place]] * (parts[0].shape[1] // LANES), axis=1))
        return [sum(parts[1:], parts[0])]

    def combine(self, parts: list[jax.Array]) -> jax.Array:
        """float32, of the shape of the parts."""
        return parts[0]


@dataclasses.dataclass(frozen=True)
class IntegerQueries(RoundedQueries):
    """Rows as integers of 16 bits, which the largest number that `bound` was told nearly fills."""

    def scratch(self) -> list[Any]:
        """Rows' bytes, what they were multiplied by, and its inverse."""
        splats = [pltpu.VMEM((SUBLANES, LANES), jnp.float32) for _ in range(2)]
        return [pltpu.VMEM((self.count, 2 * self.rows, self.channels), jnp.int8), *splats]

    def bound(self, refs: Refs, largest: jax.Array) -> None:
        for ref, x in zip(refs[1:], factors(largest, QUERY_BITS)):
            ref[...] = jnp.broadcast_to(x, ref.shape)

    def factor(self, refs: Refs, x: jax.Array) -> jax.Array:
        return x * splat(refs[1][...], x.shape)

    def inverse(self, refs: Refs) -> jax.Array | None:
        return refs[2][...]

    def put(self, refs: Refs, place: int, x: jax.Array) -> None:
        refs[0][place] = query_bytes(x)

    def products(self, refs: Refs, place: int, words: jax.Array) -> list[jax.Array]:
        (operand,) = self.encoding.operands(words)
        parts = lax.dot_general(refs[0][place], operand, CONTRACT_LANES, preferred_element_type=jnp.int32)
        return [parts[: self.rows], parts[self.rows :]]

    def combine(self, parts: list[jax.Array]) -> jax.Array:
        return ((parts[0] << 8) + parts[1]).astype(jnp.float32)


def query_rows(encoding: Encoding, count: int, rows: int, channels: int) -> RoundedQueries:
    return (IntegerQueries if encoding.integer else RoundedQueries)(encoding, count, rows, channels)


@dataclasses.dataclass(frozen=True)
class RoundedWeights:
    """Weights as bfloat16: the sums are float32 and can be carried as they are.

    Attributes:
      rows, channels: R, H of the sums of products.
    """

    encoding: Encoding
    rows: int
    channels: int

    def shapes(self) -> list[tuple[int, int]]:
        """Of the float32 sums: products, and, where operands have an offset, the weights as they were rounded.

        These are sums over tokens of a lane, which `finish` adds up.
        """
        products = [(self.rows, self.channels)]
        return [*products, (self.rows, LANES)] if self.encoding.offset else products

    def scratch(self) -> list[Any]:
        return []

    def bound(self, refs: Refs, largest: jax.Array) -> jax.Array | None:
        """Before the weights of a chunk, of which none will be larger than `largest[1, 1]`.

        Returns:
          What they are to be multiplied by, if anything: float32 `[8, 128]`, all the same.
        """
        return None

    def carried(self) -> list[jax.ShapeDtypeStruct]:
        """What `add` takes and gives, and which begins as zeros."""
        return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in self.shapes()]

    def zeros(self) -> tuple[jax.Array, ...]:
        return tuple(jnp.zeros(x.shape, x.dtype) for x in self.carried())

    def add(self, x: jax.Array, words: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """The sums plus those of weights `x[R, tokens]` float32 times codes."""
        x = x.astype(jnp.bfloat16)
        products = sums[0]
        for weight, operand in zip(self.encoding.weights, self.encoding.operands(words)):
            product = jnp.dot(x, operand, preferred_element_type=jnp.float32)
            products += product if weight == 1 else weight * product
        return (products, sums[1] + folded(x.astype(jnp.float32))) if self.encoding.offset else (products,)

    def collect(self, refs: Refs, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Float32 sums, in `shapes`."""
        return sums

    def finish(self, sums: tuple[jax.Array, ...]) -> jax.Array:
        """`[R, H]`: the sum of weights times `code - middle`."""
        products = sums[0]
        if self.encoding.offset:
            products -= jnp.float32(self.encoding.offset) * sums[1].sum(axis=1, keepdims=True)
        return products * jnp.float32(1 / self.encoding.gain)


@dataclasses.dataclass(frozen=True)
class IntegerWeights(RoundedWeights):
    """Weights as integers of 23 bits, which the largest of a chunk nearly fills, and int32 sums for each byte."""

    def scratch(self) -> list[Any]:
        """The inverse of what weights are multiplied by, and room for the sums."""
        inverse = pltpu.VMEM((SUBLANES, LANES), jnp.float32)
        # Rows are read with a stride, which takes arrays of one register's lanes.
        return [inverse, pltpu.VMEM((self.channels // LANES, 4 * self.rows, LANES), jnp.int32)]

    def bound(self, refs: Refs, largest: jax.Array) -> jax.Array | None:
        factor, inverse = (jnp.broadcast_to(x, (SUBLANES, LANES)) for x in factors(largest, WEIGHT_BITS))
        refs[0][...] = inverse
        return factor

    def carried(self) -> list[jax.ShapeDtypeStruct]:
        return [jax.ShapeDtypeStruct((4 * self.rows, self.channels), jnp.int32)]

    def add(self, x: jax.Array, words: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        (operand,) = self.encoding.operands(words)
        return (sums[0] + jnp.dot(weight_bytes(x), operand, preferred_element_type=jnp.int32),)

    def collect(self, refs: Refs, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        inverse, ref = refs
        parts = []
        for n in range(ref.shape[0]):
            ref[n] = sums[0][:, n * LANES : (n + 1) * LANES]
            byte = [ref.at[n][pl.ds(b, self.rows, stride=4)] for b in range(4)]
            low, middle, high = (x.astype(jnp.float32) for x in (byte[0], byte[1], byte[2] - byte[3]))
            parts.append(high * 65536.0 + middle * 256.0 + low)
        products = jnp.concatenate(parts, axis=1)
        return (products * splat(inverse[...], products.shape),)


def weight_rows(encoding: Encoding, rows: int, channels: int) -> RoundedWeights:
    return (IntegerWeights if encoding.integer else RoundedWeights)(encoding, rows, channels)
