"""The codec contract: how the keys or values of one block become bits and come back."""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

Leaf = Any  # arrays, but also the specs, None and ShapeDtypeStructs that JAX rebuilds dataclasses with
Params = dict[str, Leaf] | None
FLOAT16_MAX = 65504.0


@dataclasses.dataclass(frozen=True)
class AbstractCodec(abc.ABC):
    """Stores a block `x[..., K, T, H]` of K heads, T tokens and H channels; leading axes are independent.

    The four steps are usable apart: `quantize` (values to codes, one byte each), `pack`, `unpack`, `dequantize`.

        encode(x) = pack(quantize(x))              decode(block) = dequantize(unpack(block))
        roundtrip(x) = decode(encode(x)) = dequantize(quantize(x))

    Invariants, each a test over every codec:

    1. Leading axes are independent: `encode(x)[i] == encode(x[i])`.
    2. `unpack(pack(b)) == b`, so `roundtrip` needs no packing and takes any T.
    3. Token-local codecs: `quantize(x)[token t]` is a function of `x[..., t, :]` alone.
    4. `bits_per_element(T, K, H)` equals the bytes that `encode` allocates.
    5. What all heads share keeps a head axis of size 1.

    Attributes:
      pre_rope: keys are stored before the rotary embedding, which attention applies after decoding.
    """

    pre_rope: bool = dataclasses.field(default=False, kw_only=True)

    @property
    @abc.abstractmethod
    def token_local(self) -> bool:
        """The code of a token does not depend on its neighbours."""

    def shared_tokens(self, block: int) -> int:
        """Tokens that share statistics, 1 if `token_local`: a token can be coded once so many are there."""
        return 1 if self.token_local else block

    @property
    def reads_in_part(self) -> bool:
        """A query may read fewer bits than are stored (`kvjax.codecs.planes`); attention counts them."""
        return False

    @property
    def needs_params(self) -> bool:
        """Has constants that `kvjax.calibrate` fits per layer (tables, ranges)."""
        return False

    @property
    def largest(self) -> float:
        """Magnitudes beyond it saturate: float16's, in which most codecs hold scales or elements."""
        return FLOAT16_MAX

    @abc.abstractmethod
    def quantize(self, x: jax.Array, params: Params = None) -> Any:
        """`x[..., K, T, H]` in any float type to a block whose codes are not yet packed."""

    @abc.abstractmethod
    def dequantize(self, block: Any, params: Params = None) -> jax.Array:
        """The inverse, up to the rounding: float32 `[..., K, T, H]`."""

    @abc.abstractmethod
    def pack(self, block: Any) -> Any:
        """The block as it is stored."""

    @abc.abstractmethod
    def unpack(self, block: Any) -> Any:
        """The block as `quantize` made it."""

    @abc.abstractmethod
    def bits_per_element(self, tokens: int, kv_heads: int, head_dim: int) -> float:
        """Bits stored per element of a block: codes, metadata and outlier slots."""

    @abc.abstractmethod
    def keep(self, old: Any, new: Any, kept: jax.Array) -> Any:
        """The stored block with tokens `t < kept` of `old` and the others of `new`; `kept[...]` int32.

        Token-local codecs only: a cropped block is completed without coding its first tokens twice.
        """

    def dropped(self, x: jax.Array, params: Params = None) -> jax.Array:
        """Elements of each token and head of `x[..., K, T, H]` that saturate, int32 `[..., K, T]`."""
        return (jnp.abs(x.astype(jnp.float32)) > self.largest).sum(-1, dtype=jnp.int32)

    def encode(self, x: jax.Array, params: Params = None) -> Any:
        return self.pack(self.quantize(x, params))

    def decode(self, block: Any, params: Params = None) -> jax.Array:
        return self.dequantize(self.unpack(block), params)

    def roundtrip(self, x: jax.Array, params: Params = None) -> jax.Array:
        """What attention sees of `x` once it is stored: float32 `[..., K, T, H]`."""
        return self.dequantize(self.quantize(x, params), params)

    def describe(self) -> str:
        """The codec in a word, for reports."""
        return type(self).__name__


def nearest(x: jax.Array, levels: jax.Array) -> jax.Array:
    """Index of the level nearest to each `x`, uint8; ties go to the lower index. `levels` is sorted.

    Counts the midpoints below x: compares only, which every backend fuses, and no gather.
    """
    midpoints = (levels[1:] + levels[:-1]) * 0.5
    code = jnp.zeros(x.shape, jnp.uint8)
    for i in range(levels.shape[0] - 1):
        code = code + (x > midpoints[i]).astype(jnp.uint8)
    return code


def keep_tokens(old: jax.Array, new: jax.Array, kept: jax.Array, axis: int) -> jax.Array:
    """`old` where the index along the (negative) token `axis` is below `kept[...]`, else `new`."""
    token = jax.lax.broadcasted_iota(
        jnp.int32, (1,) * (old.ndim + axis) + (old.shape[axis],) + (1,) * (-axis - 1), old.ndim + axis
    )
    return jnp.where(token < kept.reshape(kept.shape + (1,) * (old.ndim - kept.ndim)), old, new)
