"""KVQuant's two codecs (arXiv 2401.18079): a shared table of signposts per layer, rescaled per channel or per token.

Keys are scaled per channel, with ranges fitted offline (section 3.1) and before RoPE (section 3.2); values per token
over the whole kv width, online. Codes are indices into one table of 2**b levels per layer and tensor, from about -1 to
1, which all heads share (nuqX, section 3.3). The farthest elements go to fixed outlier slots (section 3.4): the code
saturates and the slot holds the 16-bit residual against it, so decoding has no branch and an outlier without a slot
still saturates instead of vanishing.

Slots are counted per token and head, `ceil(fraction * H)` of 24 bits each (uint8 channel, float16 residual): at 1 % at
most 0.40 bit per element for the head sizes of Llama models. The alternative, 1 % of a block's elements pooled per head
(32 bits a slot), was measured with the tiny model (H = 64; 32 windows of 1024 tokens of wikitext2-test, protocol "all";
bits, perplexity against bf16, KL):

               4 bits                 3 bits                 2 bits
    per token  4.50  -0.2 %  0.0045   3.50  +0.7 %  0.0133   2.50  +5.0 %  0.059
    pooled     4.45  +0.3 %  0.0026   3.45  +0.9 %  0.0100   2.45  +5.0 %  0.049
    uncapped         +0.3 %  0.0023         +1.2 %  0.0093         +5.3 %  0.049

Pooling saves two fifths of the KL at 4 bits and a fifth below, since 0.4 % of the keys lie outside their range without
finding a slot, and nothing in perplexity. It was not kept: a token's code would depend on its block, so a decode
step could not see its own token as stored, nor a cropped block keep its codes; and a kernel would scatter from a list
instead of selecting one channel per slot. Heads stay independent, so they can be sharded, where the paper's slots over
the whole kv width could not.

With `table="uniform"` the same classes are the paper's intX baselines (asymmetric, real-valued zero point, Appendix G),
with `table="nf"` its NormalFloat baselines.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from kvjax.codecs.base import FLOAT16_MAX, AbstractCodec, Leaf, Params, keep_tokens, nearest
from kvjax.codecs.outliers import farthest, stored_range, token_range
from kvjax.codecs.tables import nf_levels, uniform_levels
from pallas_kernels import packing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NUQBlock:
    """`x ≈ scale * level[code] + zero`, plus the residuals of the slots at their channels.

    Attributes:
      codes: packed `[..., K, T * b / 32, H]` uint32; before packing `[..., K, T, H]` uint8.
      scale, zero: float16, online ranges only: `[..., 1, T]` per token, `[..., K, H]` per channel; else None.
      slot_channel: `[..., K, s, T]` uint8, the outliers' channels; an unused slot has residual 0. None without slots.
      slot_residual: `[..., K, s, T]` float16. All float16 are stored as uint16 bit patterns, as in `AffineBlock`.
    """

    codes: Leaf
    scale: Leaf = None
    zero: Leaf = None
    slot_channel: Leaf = None
    slot_residual: Leaf = None


@dataclasses.dataclass(frozen=True)
class _NUQCodec(AbstractCodec):
    """What both codecs share: table, slots, packing.

    Attributes:
      bits: 2, 3 or 4 (1 to 4 work).
      outliers: fraction of a head's channels that get a slot per token, 0 for dense.
      table: where the levels come from: "fitted" (`params["levels"]`), "uniform" or "nf".
      q_norm: dequantize with the moment-matched table of Q-Norm (arXiv 2401.18079v3); assignment keeps `levels`.
    """

    bits: int = 4
    outliers: float = 0.0
    table: Literal["fitted", "uniform", "nf"] = "fitted"
    q_norm: bool = False

    @property
    def needs_params(self) -> bool:
        return self.table == "fitted"

    def slots(self, head_dim: int) -> int:
        """Outlier slots per token and head."""
        if head_dim > 256:
            raise ValueError(f"`head_dim={head_dim}` does not fit the 8-bit slot index; at most 256.")
        return math.ceil(self.outliers * head_dim)

    def levels(self, params: Params) -> tuple[jax.Array, jax.Array]:
        """The sorted levels that codes are chosen by, and those they are decoded to."""
        if self.table == "fitted":
            if params is None:
                raise ValueError(f"`params` of a fitted {self.bits}-bit table are missing; calibrate the policy first.")
            return params["levels"], params["decode_levels" if self.q_norm else "levels"]
        levels = jnp.asarray(
            uniform_levels(self.bits) if self.table == "uniform" else nf_levels(self.bits), jnp.float32
        )
        return levels, levels

    def pack(self, block: NUQBlock) -> NUQBlock:
        return _converted(block, packing.pack(block.codes, self.bits), jnp.uint16)

    def unpack(self, block: NUQBlock) -> NUQBlock:
        return _converted(block, packing.unpack(block.codes, self.bits), jnp.float16)

    def _quantize(self, x, scale, zero, outlier_index, is_outlier, params):
        """Codes and slots of `x[..., K, T, H]` (float32) under ranges that broadcast against it."""
        levels, decode_levels = self.levels(params)
        codes = nearest((x - zero) / scale, levels)
        if outlier_index is None:
            return codes, None, None
        residual = x - (scale * _lookup(decode_levels, codes) + zero)
        residual = jnp.take_along_axis(residual, outlier_index, axis=-1)
        residual = jnp.where(is_outlier, jnp.clip(residual, -FLOAT16_MAX, FLOAT16_MAX), 0.0).astype(jnp.float16)
        return codes, outlier_index.astype(jnp.uint8).swapaxes(-1, -2), residual.swapaxes(-1, -2)

    def _dequantize(self, block: NUQBlock, scale, zero, params) -> jax.Array:
        decode_levels = self.levels(params)[1]
        x = scale * _lookup(decode_levels, block.codes) + zero
        if block.slot_channel is None:
            return x
        channel = jax.lax.broadcasted_iota(jnp.uint8, (1,) * (x.ndim - 1) + (x.shape[-1],), x.ndim - 1)
        for s in range(block.slot_channel.shape[-2]):
            here = block.slot_channel[..., s, :, None] == channel
            x = x + jnp.where(here, block.slot_residual[..., s, :, None].astype(jnp.float32), 0.0)
        return x

    def keep(self, old: NUQBlock, new: NUQBlock, kept: jax.Array) -> NUQBlock:
        tokens = 32 * old.codes.shape[-2] // self.bits
        mask = packing.token_mask(kept, tokens, self.bits)
        codes = (old.codes & mask) | (new.codes & ~mask)
        rest = {
            name: None if getattr(old, name) is None else keep_tokens(getattr(old, name), getattr(new, name), kept, -1)
            for name in ("scale", "zero", "slot_channel", "slot_residual")
        }
        return NUQBlock(codes, **rest)

    def _slot_bits(self, head_dim: int) -> float:
        return 24.0 * self.slots(head_dim) / head_dim


@dataclasses.dataclass(frozen=True)
class NUQChannelCodec(_NUQCodec):
    """Keys: one range per channel. KVQuant sections 3.1 to 3.4.

    Attributes:
      ranges: "offline" takes `params["scale"]` and `params["zero"]` `[K, 1, H]`; "block" measures them over the T
        tokens of each block (the paper's online variant, Table 14, bounded to a block) and stores them, in
        32/T bits per element.
    """

    ranges: Literal["offline", "block"] = "offline"

    @property
    def token_local(self) -> bool:
        return self.ranges == "offline"

    @property
    def needs_params(self) -> bool:
        return self.ranges == "offline" or super().needs_params

    def quantize(self, x: jax.Array, params: Params = None) -> NUQBlock:
        x = x.astype(jnp.float32)
        scale, zero = self._ranges(x, params)
        slots = self.slots(x.shape[-1])
        index, is_outlier = farthest(x, scale, zero, slots) if slots else (None, None)
        codes, channel, residual = self._quantize(x, scale, zero, index, is_outlier, params)
        if self.ranges == "offline":
            return NUQBlock(codes, slot_channel=channel, slot_residual=residual)
        return NUQBlock(
            codes,
            scale[..., 0, :].astype(jnp.float16),
            zero[..., 0, :].astype(jnp.float16),
            channel,
            residual,
        )

    def dequantize(self, block: NUQBlock, params: Params = None) -> jax.Array:
        if self.ranges == "offline":
            scale, zero = self._offline(params, block.codes.ndim)
        else:
            scale = block.scale[..., None, :].astype(jnp.float32)
            zero = block.zero[..., None, :].astype(jnp.float32)
        return self._dequantize(block, scale, zero, params)

    def dropped(self, x: jax.Array, params: Params = None) -> jax.Array:
        slots = self.slots(x.shape[-1])
        if not slots:
            return super().dropped(x, params)
        x = x.astype(jnp.float32)
        scale, zero = self._ranges(x, params)
        outside = (jnp.abs((x - zero) / scale) > 1.0).sum(-1, dtype=jnp.int32)
        beyond = (jnp.abs(x) > self.largest).sum(-1, dtype=jnp.int32)  # the farthest of them, in slots of float16
        return jnp.maximum(outside - slots, 0) + jnp.minimum(beyond, slots)

    def _offline(self, params: Params, ndim: int) -> tuple[jax.Array, jax.Array]:
        if params is None:
            raise ValueError("`params` with the keys' offline ranges are missing; calibrate the policy first.")
        lead = (1,) * (ndim - 3)
        return params["scale"].reshape(lead + params["scale"].shape), params["zero"].reshape(
            lead + params["zero"].shape
        )

    def _ranges(self, x: jax.Array, params: Params) -> tuple[jax.Array, jax.Array]:
        if self.ranges == "offline":
            return self._offline(params, x.ndim)
        tail = self.outliers / 2  # section 3.1: half of the outliers on each side
        low = jnp.quantile(x, tail, axis=-2, keepdims=True) if tail else x.min(-2, keepdims=True)
        high = jnp.quantile(x, 1 - tail, axis=-2, keepdims=True) if tail else x.max(-2, keepdims=True)
        return stored_range(low, high)

    def bits_per_element(self, tokens: int, kv_heads: int, head_dim: int) -> float:
        online = 32.0 / tokens if self.ranges == "block" else 0.0
        return self.bits + online + self._slot_bits(head_dim)

    def describe(self) -> str:
        return (
            f"{_table_name(self)} per channel{', block ranges' if self.ranges == 'block' else ''}, {_slots_name(self)}"
        )


@dataclasses.dataclass(frozen=True)
class NUQTokenCodec(_NUQCodec):
    """Values (and the baselines' keys): one range per token over the whole kv width, measured online.

    KVQuant sections 3.1, 3.4 and 3.6: the farthest elements leave first, the range is the extremes of what is left.
    """

    @property
    def token_local(self) -> bool:
        return True

    def quantize(self, x: jax.Array, params: Params = None) -> NUQBlock:
        x = x.astype(jnp.float32)
        index, scale, zero = token_range(x, self.slots(x.shape[-1]))
        is_outlier = None if index is None else jnp.ones(index.shape, bool)
        codes, channel, residual = self._quantize(x, scale, zero, index, is_outlier, params)
        return NUQBlock(codes, scale[..., 0].astype(jnp.float16), zero[..., 0].astype(jnp.float16), channel, residual)

    def dequantize(self, block: NUQBlock, params: Params = None) -> jax.Array:
        scale = block.scale[..., None].astype(jnp.float32)
        zero = block.zero[..., None].astype(jnp.float32)
        return self._dequantize(block, scale, zero, params)

    def bits_per_element(self, tokens: int, kv_heads: int, head_dim: int) -> float:
        return self.bits + 32.0 / (kv_heads * head_dim) + self._slot_bits(head_dim)

    def describe(self) -> str:
        return f"{_table_name(self)} per token, {_slots_name(self)}"


def _converted(block: NUQBlock, codes: jax.Array, dtype: Any) -> NUQBlock:
    """The block with other codes, its metadata reinterpreted as 16-bit `dtype`."""

    def cast(x: jax.Array | None) -> jax.Array | None:
        return None if x is None else jax.lax.bitcast_convert_type(x, dtype)

    return NUQBlock(codes, cast(block.scale), cast(block.zero), block.slot_channel, cast(block.slot_residual))


def _lookup(levels: jax.Array, codes: jax.Array) -> jax.Array:
    return jnp.take(levels, codes.astype(jnp.int32), mode="clip")


def _table_name(codec: _NUQCodec) -> str:
    prefix = {"fitted": "nuq", "uniform": "int", "nf": "nf"}[codec.table]
    return f"{prefix}{codec.bits}{' pre-RoPE' if codec.pre_rope else ''}{' Q-Norm' if codec.q_norm else ''}"


def _slots_name(codec: _NUQCodec) -> str:
    return f"{codec.outliers:.0%} outliers" if codec.outliers else "dense"
