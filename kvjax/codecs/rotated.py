"""Hadamard rotation in front of any codec: spreads outlier channels over all of them before rounding.

    encode(x) = inner.encode(x M),    decode(block) = inner.decode(block) M^T,    M orthonormal and symmetric

so scores and outputs are unchanged but for the rounding (QuaRot, arXiv 2404.00456, section 4: keys after RoPE, values
likewise; SAW-INT4, arXiv 2604.19157: keys only, in blocks). Kernels need no inverse per element: (q M) (x M)^T = q x^T,
and one product with M^T turns the output of attention back.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.codecs.base import AbstractCodec, Params


@dataclasses.dataclass(frozen=True)
class RotatedCodec(AbstractCodec):
    """`inner` over channels mixed by a Hadamard matrix; its blocks are the inner codec's.

    Attributes:
      inner: any codec without fitted constants (those would have to be fitted to rotated tensors).
      order: size of the matrix, a power of two that divides H: blocks of channels are rotated apart. None: the largest.
    """

    inner: AbstractCodec
    order: int | None = None

    def __post_init__(self):
        if self.inner.needs_params:
            raise ValueError(
                f"`inner` = {self.inner.describe()} has fitted constants, which calibration fits to keys and values as "
                "they are; rotate a codec without them."
            )
        if self.inner.reads_in_part:
            raise ValueError(
                f"`inner` = {self.inner.describe()} is read by channel, which rotation makes alike; use it as it is."
            )
        object.__setattr__(self, "pre_rope", self.inner.pre_rope)

    @property
    def token_local(self) -> bool:
        return self.inner.token_local

    def shared_tokens(self, block: int) -> int:
        return self.inner.shared_tokens(block)

    def quantize(self, x: jax.Array, params: Params = None) -> Any:
        return self.inner.quantize(self.turn(x), params)

    def dequantize(self, block: Any, params: Params = None) -> jax.Array:
        return self.turn(self.inner.dequantize(block, params))

    def pack(self, block: Any) -> Any:
        return self.inner.pack(block)

    def unpack(self, block: Any) -> Any:
        return self.inner.unpack(block)

    def bits_per_element(self, tokens: int, kv_heads: int, head_dim: int) -> float:
        return self.inner.bits_per_element(tokens, kv_heads, head_dim)

    def keep(self, old: Any, new: Any, kept: jax.Array) -> Any:
        return self.inner.keep(old, new, kept)

    def dropped(self, x: jax.Array, params: Params = None) -> jax.Array:
        return self.inner.dropped(self.turn(x), params)

    def describe(self) -> str:
        return f"{self.inner.describe()}, rotated"

    def turn(self, x: jax.Array) -> jax.Array:
        """`x M`, float32; M is its own inverse."""
        channels = x.shape[-1]
        order = (channels & -channels) if self.order is None else self.order
        if channels % order:
            raise ValueError(f"`order={order}` must divide H={channels}; use a power of two that does.")
        blocks = x.astype(jnp.float32).reshape(*x.shape[:-1], channels // order, order)
        # Full precision: the default of a TPU's matrix unit would round x to bfloat16.
        out = jnp.einsum("...i,ij->...j", blocks, hadamard(order), precision=jax.lax.Precision.HIGHEST)
        return out.reshape(x.shape)


def hadamard(order: int) -> np.ndarray:
    """The orthonormal, symmetric Hadamard matrix `[order, order]` of Sylvester's construction, float32."""
    if order < 1 or order & (order - 1):
        raise ValueError(f"`order={order}` must be a power of two.")
    matrix = np.ones((1, 1))
    while len(matrix) < order:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (matrix / np.sqrt(order)).astype(np.float32)
