"""Keys and values in planes of bits, of which a query reads as many as it needs (AlignedKV, arXiv 2409.16546).

A value's planes are separate arrays, its most significant bits in the first, so that what is not needed is not touched:

    PlanesCodec      float16: sign, exponent and 2 bits of mantissa; 4 bits of mantissa; the last 4
    IntPlanesCodec   the codes of an `AffineCodec`: the upper half of the bits, and the lower

What is not read is taken to be in the middle: 1000... (float16) or the mean of the codes that remain (integers).
A float16 with biased exponent e has an ulp of 2^(max(e, 1) - 25); without its lowest b bits it errs by at most
2^(max(e, 1) - 25 + b - 1), and an integer code by (2^b - 1)/2 steps.

The rules decide for keys by channel (one level for a channel's tokens of a block), for values by token. Stored words
lie along tokens, as all codes of this library do. A channel's are neighbours in keys, so that what the rule wants
together lies together; values are the rows that `packing` makes, of which one holds a token of each quarter (8 bits) or
eighth (4 bits) of a block. Words of a token's own would leave three quarters of a TPU's lanes empty, or be lanes, which
nothing can skip: there values, like keys, are read or not by whole blocks (`kvjax.aligned_blocks`).
Nothing else about them differs from other codecs: `decode` reads everything, and so does attention "exact" within a
call. The levels are chosen in `kvjax.codecs.align`, read and counted in `kvjax.aligned`.
"""

import abc
import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.codecs.affine import AffineBlock, AffineCodec, Along
from kvjax.codecs.align import AlignRule
from kvjax.codecs.base import FLOAT16_MAX, AbstractCodec, Leaf, Params
from pallas_kernels import packing

EXPONENTS = 32  # biased exponents that float16 has


def split(bits: jax.Array) -> tuple[jax.Array, ...]:
    """The planes of float16 bit patterns (uint16): 8, 4 and 4 bits, uint8."""
    return tuple(((bits >> shift) & mask).astype(jnp.uint8) for shift, mask in ((8, 255), (4, 15), (0, 15)))


def join(planes: tuple[jax.Array, ...], level: int = 3) -> jax.Array:
    """The bit patterns of which the first `level` planes are read, the rest filled with 1000..."""
    first, *rest = (plane.astype(jnp.uint16) for plane in planes[:level])
    bits = first << 8
    if level == 1:
        return bits | 0x80
    return bits | rest[0] << 4 | (rest[1] if level == 3 else jnp.uint16(8))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PlanesBlock:
    """`x = float16(first << 8 | mid << 4 | last)`; 16 bits per element, and 8/T or 8/H for `top`.

    Attributes:
      planes: first, mid and last, packed uint32: keys `[..., K, H, T * b / 32]`, values `[..., K, T * b / 32, H]`;
        before packing uint8 `[..., K, T, H]`.
      top: uint8, the largest biased exponent of each channel `[..., K, H]`, or of each token `[..., K, T]`.
    """

    planes: tuple[Leaf, ...]
    top: Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IntPlanesBlock:
    """`x ≈ scale * (first << b/2 | last) + zero`; costs what the codes cost.

    Attributes:
      planes: as in `PlanesBlock`, each half as wide as the codes.
      scale, zero, ranges: as in `AffineBlock`.
    """

    planes: tuple[Leaf, ...]
    scale: Leaf
    zero: Leaf
    ranges: Leaf = None


class AlignedCodec(AbstractCodec):
    """A codec that is read in part.

    Its blocks have `planes`; a *level* is a number of planes read, from 0 (the value counts as 0) to all.
    """

    read: AlignRule
    along: Any  # "tokens" or "channels": a field, or the wrapped codec's

    @property
    def token_local(self) -> bool:
        return False  # a channel's magnitude is that of its block; tokens are seen exactly until then, as released

    @property
    def reads_in_part(self) -> bool:
        return True

    @property
    @abc.abstractmethod
    def plane_bits(self) -> tuple[int, ...]:
        """Bits per element of each plane."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Bits read at each level from 0."""
        return (0, *itertools.accumulate(self.plane_bits))

    @abc.abstractmethod
    def read_at(self, block: Any, level: int) -> jax.Array:
        """An unpacked block read at one level from 1: float32 `[..., K, T, H]`."""

    @abc.abstractmethod
    def extent(self, block: Any) -> Any:
        """What the errors depend on, of which a running maximum may be kept: leaves `[..., K, H]` or `[..., K, T]`."""

    @abc.abstractmethod
    def errors(self, extent: Any) -> tuple[jax.Array, ...]:
        """Per level from 0, the largest error of reading no more; the first is the largest magnitude. float32."""

    def dequantize(self, block: Any, params: Params = None) -> jax.Array:
        return self.read_at(block, len(self.plane_bits))

    def keep(self, old: Any, new: Any, kept: jax.Array) -> Any:
        raise NotImplementedError("blocks of codecs over groups of tokens are not mixed")

    @property
    def rows_together(self) -> tuple[int, ...]:
        """Channels (keys) or tokens (values) of a block that share a row of words, in each plane."""
        return tuple(1 if self.along == "tokens" else packing.codes_per_cell(bits) for bits in self.plane_bits)

    def _pack_planes(self, planes: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        words = tuple(packing.pack(p, bits) for p, bits in zip(planes, self.plane_bits, strict=True))
        return tuple(self._turned(w) for w in words)

    def _unpack_planes(self, words: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(packing.unpack(self._turned(w), bits) for w, bits in zip(words, self.plane_bits, strict=True))

    def _turned(self, words: jax.Array) -> jax.Array:
        """Between rows of words and a channel's words as neighbours, which keys have."""
        return words.swapaxes(-1, -2) if self.along == "tokens" else words


@dataclasses.dataclass(frozen=True)
class PlanesCodec(AlignedCodec):
    """float16 in planes of 8, 4 and 4 bits, of which a query reads 8, 12 or 16 bits, or none.

    Other types are rounded to float16. What exceeds its range saturates and is counted in `dropped`.

    Attributes:
      along: "tokens" for keys, "channels" for values.
      read: when the lower planes are read.
    """

    along: Along
    read: AlignRule

    def __post_init__(self):
        _check_rope(self.pre_rope)

    @property
    def plane_bits(self) -> tuple[int, ...]:
        return 8, 4, 4

    def quantize(self, x: jax.Array, params: Params = None) -> PlanesBlock:
        bits = jax.lax.bitcast_convert_type(
            jnp.clip(x.astype(jnp.float32), -FLOAT16_MAX, FLOAT16_MAX).astype(jnp.float16), jnp.uint16
        )
        return PlanesBlock(split(bits), ((bits >> 10) & 31).astype(jnp.uint8).max(-2 if self._top_per_channel else -1))

    @property
    def _top_per_channel(self) -> bool:
        # The paper compares the output's channels with the values', a budget each token with the budget.
        return self.along == "tokens" or self.read.mode == "criterion"

    def read_at(self, block: PlanesBlock, level: int) -> jax.Array:
        return jax.lax.bitcast_convert_type(join(block.planes, level), jnp.float16).astype(jnp.float32)

    def first_magnitude(self, first: jax.Array) -> jax.Array:
        """|x| of first planes alone, any shape: float32."""
        return jnp.abs(jax.lax.bitcast_convert_type(join((first,), 1), jnp.float16).astype(jnp.float32))

    def first_planes(self, words: jax.Array, at: tuple[jax.Array, ...], token: jax.Array) -> jax.Array:
        """The first planes `[..., H]` uint8 of single tokens of values.

        Args:
          words: `[..., T / 4, H]`, packed first planes.
          at: indices `[...]` of blocks in the leading axes of `words`.
          token: `[...]` in the block.
        """
        row, field = token % words.shape[-2], token // words.shape[-2]
        shift = (8 * field).astype(jnp.uint32)[..., None]
        return (words[(*at, row)] >> shift).astype(jnp.uint8)

    def extent(self, block: PlanesBlock) -> jax.Array:
        return block.top

    def errors(self, extent: jax.Array) -> tuple[jax.Array, ...]:
        e = jnp.maximum(extent.astype(jnp.int32), 1)

        def power(of: jax.Array) -> jax.Array:
            # Infinities and NaN are read in full.
            return jnp.where(e == 31, jnp.inf, jnp.ldexp(jnp.float32(1), of))

        # Subnormal numbers are below 2^-14, the others below twice the power of two of their exponent.
        return power(jnp.where(extent == 0, -14, e - 14)), power(e - 18), power(e - 22)

    def pack(self, block: PlanesBlock) -> PlanesBlock:
        return PlanesBlock(self._pack_planes(block.planes), block.top)

    def unpack(self, block: PlanesBlock) -> PlanesBlock:
        return PlanesBlock(self._unpack_planes(block.planes), block.top)

    def bits_per_element(self, tokens: int, kv_heads: int, head_dim: int) -> float:
        return 16 + 8 / (tokens if self._top_per_channel else head_dim)

    def describe(self) -> str:
        return f"float16 in planes, read {self.read.describe()}"


@dataclasses.dataclass(frozen=True)
class IntPlanesCodec(AlignedCodec):
    """Integer codes in two planes of half their bits each, of which a query reads the upper, both or none.

    Attributes:
      codes: an `AffineCodec` of 4 or 8 bits; along tokens for keys, along channels for values.
      read: when the lower plane is read: a budget.
    """

    codes: AffineCodec
    read: AlignRule

    def __post_init__(self):
        _check_rope(self.pre_rope or self.codes.pre_rope)
        if self.codes.bits not in (4, 8):
            raise ValueError(f"`bits={self.codes.bits}` do not halve into planes; use 4 or 8.")
        if self.read.mode == "criterion":
            raise ValueError('`mode="criterion"` compares float16 exponents; integer codes take "worst" or "rms".')

    @property
    def along(self) -> Along:
        return self.codes.along

    @property
    def plane_bits(self) -> tuple[int, ...]:
        return self.codes.bits // 2, self.codes.bits // 2

    def quantize(self, x: jax.Array, params: Params = None) -> IntPlanesBlock:
        block = self.codes.quantize(x, params)
        half = self.codes.bits // 2
        planes = block.codes >> half, block.codes & ((1 << half) - 1)
        return IntPlanesBlock(planes, block.scale, block.zero, block.ranges)

    def read_at(self, block: IntPlanesBlock, level: int) -> jax.Array:
        first, last = block.planes
        half = self.codes.bits // 2
        upper = (first << half).astype(jnp.float32)
        code = upper + (last.astype(jnp.float32) if level > 1 else (2.0**half - 1) / 2)
        return self.codes.dequantize(AffineBlock(code, block.scale, block.zero, block.ranges))

    def extent(self, block: IntPlanesBlock) -> tuple[jax.Array, jax.Array]:
        """The largest step and the largest magnitude of each channel, or of each token."""
        scale, zero = self.codes.scale_zero(AffineBlock(None, block.scale, block.zero, block.ranges))
        farthest = jnp.maximum(jnp.abs(zero), jnp.abs(zero + scale * (2.0**self.codes.bits - 1)))
        heads, tokens, _ = block.planes[0].shape[-3:]

        def largest(x: jax.Array) -> jax.Array:
            if self.along == "tokens":
                return x.max((-3, -2))
            x = x.max(-1) if self.codes.group is None else x.max((-2, -1))
            return jnp.broadcast_to(x, (*x.shape[:-2], heads, tokens))

        return largest(scale), largest(farthest)

    def errors(self, extent: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        step, magnitude = extent
        return magnitude, step * ((2.0 ** (self.codes.bits // 2) - 1) / 2)

    def pack(self, block: IntPlanesBlock) -> IntPlanesBlock:
        stored = self.codes.pack(AffineBlock(jnp.zeros((32, 1), jnp.uint8), block.scale, block.zero, block.ranges))
        return IntPlanesBlock(self._pack_planes(block.planes), stored.scale, stored.zero, stored.ranges)

    def unpack(self, block: IntPlanesBlock) -> IntPlanesBlock:
        stored = self.codes.unpack(AffineBlock(jnp.zeros((4, 1), jnp.uint32), block.scale, block.zero, block.ranges))
        return IntPlanesBlock(self._unpack_planes(block.planes), stored.scale, stored.zero, stored.ranges)

    def bits_per_element(self, tokens: int, kv_heads: int, head_dim: int) -> float:
        return self.codes.bits_per_element(tokens, kv_heads, head_dim)

    def describe(self) -> str:
        half = self.codes.bits // 2
        return f"{self.codes.describe()}, in planes of {half} bits, read {self.read.describe()}"


def _check_rope(pre_rope: bool) -> None:
    if pre_rope:
        raise ValueError(
            "`pre_rope=True`: rotation mixes channels that would be read to different widths; store keys after RoPE."
        )
