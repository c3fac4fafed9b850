"""Uniform codes in groups with their own scale and zero: the quantizer of KIVI, AsymKV and the integer baselines.

KIVI (arXiv 2402.02750, section 3) codes keys per channel over groups of tokens and values per token over groups of
channels; AsymKV (arXiv 2410.13212, Eq. 4 to 6) takes the same down to 1 bit. In a group, with b bits,

    scale = (high - low) / (2^b - 1),    zero = low,    code = round((x - zero) / scale),    x ≈ scale * code + zero

where `levels` says what low and high are (the paper of AsymKV prints the last equation as (code + zero) * scale, which
its Eq. 5 contradicts):

    minmax     the extremes, as in both papers
    eta        the extremes moved inwards by eta times their distance (XQuant, arXiv 2510.11236)
    two_mean   1 bit only: the means of the elements above and not above the group's mean, which is the threshold;
               keeps the mean of the group

One bit between the extremes is worse than the mean alone, which needs no bits. Mean squared error over the variance of
groups of 32 Gaussian elements (2^20 elements, numpy, seed 0), with the eta that minimises it:

    bits   mean only   minmax   eta              two_mean
    1      0.970       1.963    0.365 (0.30)     0.334
    2                  0.154    0.102 (0.14)
    3                  0.0282   0.0253 (0.045)
    4                  0.0061   0.0060 (0.0125)

Less squared error is not less loss: eta moves every extreme inwards, and what is always off in one direction does not
average out over the tokens of an output. On the tiny model (4 windows of 1024 tokens of wikitext2-test, protocol "all")
`kivi2` has a KL of 0.058, with eta for values 0.062, for keys 0.064, for both 0.098. At 1 bit two_mean brings values
alone from 0.44 to 0.25, and keys alone from 0.21 to 0.35: along tokens a rotated channel is nearly a sinusoid, whose
elements crowd at its extremes.

Scale and zero are rounded to the type they are stored in before any code is computed, so a group without spread comes
back exactly, up to that rounding: its scale is 0 and its codes are too.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from kvjax.codecs.base import FLOAT16_MAX, AbstractCodec, Leaf, Params, keep_tokens
from pallas_kernels import packing

Along = Literal["tokens", "channels"]
Levels = Literal["minmax", "eta", "two_mean"]
Meta = Literal["float16", "bfloat16", "int8"]

# The inward step that minimises the squared error of Gaussian groups of 32, 64 and 128 elements, by bits.
ETA = {
    1: (0.30, 0.32, 0.34),
    2: (0.14, 0.17, 0.20),
    3: (0.045, 0.07, 0.10),
    4: (0.0125, 0.0225, 0.0375),
    8: (0.0, 0.0, 0.0),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AffineBlock:
    """`x ≈ scale * code + zero`; b + 32/g bits per element with 16-bit metadata.

    Attributes:
      codes: packed `[..., K, T * b / 32, H]` uint32; before packing `[..., K, T, H]` uint8.
      scale, zero: one per group, `[..., K, T/g, H]` along tokens, `[..., K, H/g, T]` along channels, `[..., 1, 1, T]`
        where a group is a token's whole kv width; in the codec's `meta` type (16-bit floats are stored as uint16 bit
        patterns, because XLA on CPU widens 16-bit float arrays around every update).
      ranges: with int8 metadata `[..., 2, 2, n]` in float16, else None: what the bytes of scale (first) and of zero
        mean, as (step, lowest). n is 1 along tokens (one for all groups of a block and head, `[..., K, 2, 2, 1]`) and T
        along channels (one for all groups of a token, `[..., 1, 2, 2, T]`).
    """

    codes: Leaf
    scale: Leaf
    zero: Leaf
    ranges: Leaf = None


@dataclasses.dataclass(frozen=True)
class AffineCodec(AbstractCodec):
    """Asymmetric uniform quantization in groups.

    Attributes:
      bits: 1, 2, 3, 4 or 8.
      group: elements per group, dividing T or H (a head smaller than the group is one group); None: a token's whole kv
        width, one range for all heads.
      along: the axis groups run along: "tokens" is per channel (KIVI's keys), "channels" is per token (its values).
      levels: where the outermost levels lie.
      meta: the type of scale and zero; "int8" quantizes them once more.
    """

    bits: int = 4
    group: int | None = 32
    along: Along = "channels"
    levels: Levels = "minmax"
    meta: Meta = "float16"

    def __post_init__(self):
        packing.codes_per_cell(self.bits)
        if self.group is not None and self.group < 1:
            raise ValueError(f"`group={self.group}` must be at least 1 element, such as 32, 64 or 128.")
        if self.group is None and self.along == "tokens":
            raise ValueError('`group=None` is the whole kv width of a token; it needs `along="channels"`.')
        if self.levels == "two_mean" and self.bits != 1:
            raise ValueError(f'`levels="two_mean"` has two levels, not 2^{self.bits}; use it with `bits=1`.')

    @property
    def token_local(self) -> bool:
        return self.along == "channels"

    def shared_tokens(self, block: int) -> int:
        return 1 if self.token_local else int(self.group or block)

    def quantize(self, x: jax.Array, params: Params = None) -> AffineBlock:
        groups = self._grouped(x.astype(jnp.float32))
        low, high = self._extremes(groups)
        scale, zero, *stored = self._store(low, high)
        if self.levels == "two_mean":
            codes = (groups > groups.mean(self._axes, keepdims=True)) & (scale > 0)
        else:
            steps = (groups - zero) / jnp.where(scale > 0, scale, 1.0)
            codes = jnp.where(scale > 0, jnp.clip(jnp.round(steps), 0, 2**self.bits - 1), 0)
        return AffineBlock(codes.astype(jnp.uint8).reshape(x.shape), *stored)

    def dequantize(self, block: AffineBlock, params: Params = None) -> jax.Array:
        scale, zero = self.scale_zero(block)
        codes = self._grouped(block.codes.astype(jnp.float32))
        return (scale * codes + zero).reshape(block.codes.shape)

    def scale_zero(self, block: AffineBlock) -> tuple[jax.Array, jax.Array]:
        """Scale and zero of an unpacked block, float32, broadcastable against its elements in groups."""
        scale, zero = block.scale, block.zero
        if block.ranges is not None:
            ranges = block.ranges.astype(jnp.float32)
            scale, zero = (
                part.astype(jnp.float32) * ranges[..., i, 0, None, :] + ranges[..., i, 1, None, :]
                for i, part in enumerate((scale, zero))
            )
        return self._spread(scale.astype(jnp.float32)), self._spread(zero.astype(jnp.float32))

    def pack(self, block: AffineBlock) -> AffineBlock:
        return self._convert(block, packing.pack, {"float16": jnp.uint16, "bfloat16": jnp.uint16})

    def unpack(self, block: AffineBlock) -> AffineBlock:
        return self._convert(block, packing.unpack, {"float16": jnp.float16, "bfloat16": jnp.bfloat16})

    def _convert(self, block: AffineBlock, codes: Callable, types: dict) -> AffineBlock:
        """`codes` over the codes, and 16-bit metadata between floats and their bit patterns."""

        def cast(x: jax.Array, name: str) -> jax.Array:
            return x if name == "int8" else jax.lax.bitcast_convert_type(x, types[name])

        ranges = None if block.ranges is None else cast(block.ranges, "float16")
        return AffineBlock(
            codes(block.codes, self.bits), cast(block.scale, self.meta), cast(block.zero, self.meta), ranges
        )

    def bits_per_element(self, tokens: int, kv_heads: int, head_dim: int) -> float:
        group = self.group or kv_heads * head_dim
        if self.along == "channels" and self.group:
            group = min(group, head_dim)
        if self.meta != "int8":
            return self.bits + 32.0 / group
        second = tokens * head_dim if self.along == "tokens" else kv_heads * head_dim
        return self.bits + 16.0 / group + 64.0 / second

    def keep(self, old: AffineBlock, new: AffineBlock, kept: jax.Array) -> AffineBlock:
        tokens = 32 * old.codes.shape[-2] // self.bits
        mask = packing.token_mask(kept, tokens, self.bits)
        meta = (
            None if getattr(old, name) is None else keep_tokens(getattr(old, name), getattr(new, name), kept, -1)
            for name in ("scale", "zero", "ranges")
        )
        return AffineBlock((old.codes & mask) | (new.codes & ~mask), *meta)

    def describe(self) -> str:
        group = "kv width" if self.group is None else f"groups of {self.group}"
        axis = "channel" if self.along == "tokens" else "token"
        extra = "".join(f", {word}" for word in (self.levels, self.meta) if word not in ("minmax", "float16"))
        return f"int{self.bits}{' pre-RoPE' if self.pre_rope else ''} per {axis}, {group}{extra}"

    @property
    def _axes(self) -> tuple[int, ...]:
        """The axes of `_grouped` that a group spans."""
        if self.group is None:
            return (-3, -1)
        return (-2,) if self.along == "tokens" else (-1,)

    def _grouped(self, x: jax.Array) -> jax.Array:
        """`x[..., K, T, H]` as `[..., K, T/g, g, H]` or `[..., K, T, H/g, g]`; unchanged where heads share a group."""
        if self.group is None:
            return x
        *lead, tokens, channels = x.shape
        name, size = ("T", tokens) if self.along == "tokens" else ("H", channels)
        group = self.group if self.along == "tokens" else min(self.group, channels)
        if size % group:
            raise ValueError(f"`group={group}` must divide {name}={size}; use a divisor such as {_divisor(size)}.")
        if self.along == "tokens":
            return x.reshape(*lead, tokens // group, group, channels)
        return x.reshape(*lead, tokens, channels // group, group)

    def _spread(self, per_group: jax.Array) -> jax.Array:
        """A stored scale or zero, broadcastable against `_grouped`."""
        if self.along == "tokens":
            return per_group[..., None, :]
        per_group = per_group.swapaxes(-1, -2)
        return per_group if self.group is None else per_group[..., None]

    def _collect(self, per_group: jax.Array) -> jax.Array:
        """The inverse of `_spread`."""
        if self.along == "tokens":
            return per_group[..., 0, :]
        return (per_group if self.group is None else per_group[..., 0]).swapaxes(-1, -2)

    def _extremes(self, groups: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The outermost levels of each group."""
        axes = self._axes
        low, high = groups.min(axes, keepdims=True), groups.max(axes, keepdims=True)
        if self.levels == "eta":
            size = 128 if self.group is None else self.group
            inwards = ETA[self.bits][0 if size < 64 else 1 if size < 128 else 2] * (high - low)
            return low + inwards, high - inwards
        if self.levels == "two_mean":
            mean = groups.mean(axes, keepdims=True)
            above = groups > mean
            some = above.sum(axes, keepdims=True, dtype=jnp.int32)
            size = math.prod(groups.shape[axis] for axis in axes)
            # Without spread nothing lies above the mean, or rounding puts all of it there: both levels are the mean.
            spread = (some > 0) & (some < size)
            upper = jnp.where(above, groups, 0.0).sum(axes, keepdims=True) / jnp.maximum(some, 1).astype(jnp.float32)
            lower = jnp.where(above, 0.0, groups).sum(axes, keepdims=True) / jnp.maximum(size - some, 1).astype(
                jnp.float32
            )
            return jnp.where(spread, lower, low), jnp.where(spread, upper, low)
        return low, high

    def _store(self, low: jax.Array, high: jax.Array):
        """Scale and zero as they will be read back (float32), and as they are stored, with their ranges."""
        low, high = jnp.clip(low, -FLOAT16_MAX, FLOAT16_MAX), jnp.clip(high, -FLOAT16_MAX, FLOAT16_MAX)
        scale = jnp.minimum((high - low) / (2**self.bits - 1), FLOAT16_MAX)
        if self.meta != "int8":
            scale, zero = scale.astype(self.meta), low.astype(self.meta)
            return scale.astype(jnp.float32), zero.astype(jnp.float32), self._collect(scale), self._collect(zero), None
        parts = [
            _second_level(self._collect(x), axes=(-1, -2) if self.along == "tokens" else (-3, -2)) for x in (scale, low)
        ]
        block = AffineBlock(None, parts[0][0], parts[1][0], jnp.concatenate([parts[0][1], parts[1][1]], axis=-3))
        return *self.scale_zero(block), block.scale, block.zero, block.ranges


def _second_level(x: jax.Array, axes: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """`x` in uint8 and what the bytes mean, `(step, lowest)` in float16 `[..., 1, 2, n]`."""
    low = x.min(axes, keepdims=True).astype(jnp.float16)
    from_low = x - low.astype(jnp.float32)
    step = jnp.minimum(from_low.max(axes, keepdims=True) / 255.0, FLOAT16_MAX).astype(jnp.float16)
    width = step.astype(jnp.float32)
    code = jnp.where(width > 0, jnp.clip(jnp.round(from_low / jnp.where(width > 0, width, 1.0)), 0, 255), 0)
    return code.astype(jnp.uint8), jnp.concatenate([step, low], axis=-2)[..., None, :, :]


def _divisor(size: int) -> int:
    return next((g for g in (128, 64, 32, 16, 8, 4, 2) if size % g == 0), 1)
