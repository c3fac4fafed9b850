"""K/V as they are, in a 16- or 32-bit float: the reference every method is measured against."""

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.codecs.base import AbstractCodec, Leaf, Params, keep_tokens

_STORED = {"bfloat16": jnp.uint16, "float16": jnp.uint16, "float32": jnp.uint32}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseBlock:
    """`x = values`; costs the width of its type.

    Attributes:
      values: `[..., K, T, H]` in the codec's dtype; stored as unsigned integers of its width, because XLA on CPU
        widens whole 16-bit float arrays to float32 around every update.
    """

    values: Leaf


@dataclasses.dataclass(frozen=True)
class IdentityCodec(AbstractCodec):
    """Rounds to `dtype` ("bfloat16", "float16" or "float32") and stores that; what float16 cannot hold saturates."""

    dtype: str = "bfloat16"

    @property
    def token_local(self) -> bool:
        return True

    @property
    def largest(self) -> float:
        return float(jnp.finfo(self.dtype).max)

    def quantize(self, x: jax.Array, params: Params = None) -> DenseBlock:
        return DenseBlock(jnp.clip(x.astype(jnp.float32), -self.largest, self.largest).astype(self.dtype))

    def dequantize(self, block: DenseBlock, params: Params = None) -> jax.Array:
        return block.values.astype(jnp.float32)

    def pack(self, block: DenseBlock) -> DenseBlock:
        return DenseBlock(jax.lax.bitcast_convert_type(block.values, _STORED[self.dtype]))

    def unpack(self, block: DenseBlock) -> DenseBlock:
        return DenseBlock(jax.lax.bitcast_convert_type(block.values, self.dtype))

    def bits_per_element(self, tokens: int, kv_heads: int, head_dim: int) -> float:
        return 8.0 * jnp.dtype(self.dtype).itemsize

    def keep(self, old: DenseBlock, new: DenseBlock, kept: jax.Array) -> DenseBlock:
        return DenseBlock(keep_tokens(old.values, new.values, kept, axis=-2))

    def describe(self) -> str:
        return self.dtype
