"""8-bit floats with a scale per token: the format that serving engines store K/V in, as a baseline.

e4m3 and e5m2 as in "FP8 Formats for Deep Learning" (arXiv 2209.05433, section 3; e4m3 without infinities). The scale
maps the largest magnitude of a token's kv width to 448, the largest e4m3 and well inside e5m2: nothing saturates.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from kvjax.codecs.base import FLOAT16_MAX, AbstractCodec, Leaf, Params, keep_tokens

_TYPES = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}
_LARGEST = 448.0
_MIN_SCALE = 2.0**-14  # the smallest normal float16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Float8Block:
    """`x ≈ scale * values`; 8 bits per element and 16 per token.

    Attributes:
      values: `[..., K, T, H]` in the codec's format; stored as uint8 bit patterns.
      scale: `[..., 1, 1, T]` float16; stored as uint16 bit patterns.
    """

    values: Leaf
    scale: Leaf


@dataclasses.dataclass(frozen=True)
class Float8Codec(AbstractCodec):
    """Rounds `x / scale` to an 8-bit float.

    Attributes:
      format: "e4m3" (3 bits of mantissa) or "e5m2" (2 bits, more range).
    """

    format: Literal["e4m3", "e5m2"] = "e4m3"

    @property
    def token_local(self) -> bool:
        return True

    @property
    def largest(self) -> float:
        return _LARGEST * FLOAT16_MAX

    def quantize(self, x: jax.Array, params: Params = None) -> Float8Block:
        x = x.astype(jnp.float32)
        scale = jnp.abs(x).max((-3, -1), keepdims=True) / _LARGEST
        scale = jnp.clip(scale, _MIN_SCALE, FLOAT16_MAX).astype(jnp.float16)
        # The scale may have been rounded down: without the clip the largest element would become NaN.
        values = jnp.clip(x / scale.astype(jnp.float32), -_LARGEST, _LARGEST).astype(_TYPES[self.format])
        return Float8Block(values, scale.swapaxes(-1, -2))

    def dequantize(self, block: Float8Block, params: Params = None) -> jax.Array:
        return block.values.astype(jnp.float32) * block.scale.swapaxes(-1, -2).astype(jnp.float32)

    def pack(self, block: Float8Block) -> Float8Block:
        cast = jax.lax.bitcast_convert_type
        return Float8Block(cast(block.values, jnp.uint8), cast(block.scale, jnp.uint16))

    def unpack(self, block: Float8Block) -> Float8Block:
        cast = jax.lax.bitcast_convert_type
        return Float8Block(cast(block.values, _TYPES[self.format]), cast(block.scale, jnp.float16))

    def bits_per_element(self, tokens: int, kv_heads: int, head_dim: int) -> float:
        return 8.0 + 16.0 / (kv_heads * head_dim)

    def keep(self, old: Float8Block, new: Float8Block, kept: jax.Array) -> Float8Block:
        return Float8Block(
            keep_tokens(old.values, new.values, kept, axis=-2), keep_tokens(old.scale, new.scale, kept, axis=-1)
        )

    def describe(self) -> str:
        return f"float8 {self.format} per token"
