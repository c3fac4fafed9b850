"""Another codec's blocks with heads side by side (`pallas_kernels.joined`), as TPUs want heads that do not fill lanes.

Codes, scales and slots are the inner codec's, bit for bit; only where they stand differs. A cache makes this wrapper
for the device it is made for: it is no method, and saves do not mention it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from kvjax.codecs.affine import AffineCodec
from kvjax.codecs.base import AbstractCodec, Params
from kvjax.codecs.identity import DenseBlock, IdentityCodec
from kvjax.codecs.kvquant import NUQChannelCodec, NUQTokenCodec
from pallas_kernels import joined


@dataclasses.dataclass(frozen=True)
class JoinedCodec(AbstractCodec):
    """`inner` with its packed leaves `[..., K, n, H]` as `[..., K / heads, n, heads * H]`, those per group and token
    `[..., K, n, T]` as `[..., K / heads, heads * n, T]`; slots name channels of the joined head.

    Attributes:
      inner: a codec that `can_join` admits.
      heads: how many stand side by side, a divisor of K.
    """

    inner: AbstractCodec
    heads: int = 2

    def __post_init__(self):
        object.__setattr__(self, "pre_rope", self.inner.pre_rope)

    @property
    def token_local(self) -> bool:
        return self.inner.token_local

    @property
    def needs_params(self) -> bool:
        return self.inner.needs_params

    def shared_tokens(self, block: int) -> int:
        return self.inner.shared_tokens(block)

    def quantize(self, x: jax.Array, params: Params = None) -> Any:
        return self.inner.quantize(x, params)

    def dequantize(self, block: Any, params: Params = None) -> jax.Array:
        return self.inner.dequantize(block, params)

    def pack(self, block: Any) -> Any:
        return self.join(self.inner.pack(block))

    def unpack(self, block: Any) -> Any:
        return self.inner.unpack(self.separate(block))

    def bits_per_element(self, tokens: int, kv_heads: int, head_dim: int) -> float:
        return self.inner.bits_per_element(tokens, kv_heads, head_dim)

    def keep(self, old: Any, new: Any, kept: jax.Array) -> Any:
        return self.inner.keep(old, new, kept)  # tokens are where they were

    def dropped(self, x: jax.Array, params: Params = None) -> jax.Array:
        return self.inner.dropped(x, params)

    def describe(self) -> str:
        return self.inner.describe()

    def join(self, block: Any) -> Any:
        """A packed block of `inner`, or all of its storage, as this codec has it."""
        channels = _packed(block).shape[-1]
        return self._moved(block, lambda name, x: self.join_leaf(name, x, channels))

    def separate(self, block: Any) -> Any:
        """The inverse of `join`."""
        kv_heads, channels = _packed(block).shape[-3] * self.heads, _packed(block).shape[-1] // self.heads
        return self._moved(block, lambda name, x: self.separate_leaf(name, x, kv_heads, channels))

    def join_leaf(self, name: str, x: jax.Array, channels: int) -> jax.Array:
        """One leaf of `join`, heads being of so many channels."""
        kind = self._kind(name, channels)
        if kind == "channels":
            return joined.join(x, self.heads, self.pre_rope)
        if kind == "names":
            return joined.join_names(x, self.heads, channels, self.pre_rope)
        move = {"groups": joined.join_groups, "slots": joined.join_rows}.get(kind or "")
        return x if move is None else move(x, self.heads)

    def separate_leaf(self, name: str, x: jax.Array, kv_heads: int, channels: int) -> jax.Array:
        """One leaf of `separate`, to so many heads of so many channels."""
        kind = self._kind(name, channels)
        if kind == "channels":
            return joined.separate(x, self.heads, self.pre_rope)
        if kind == "names":
            return joined.separate_names(x, self.heads, channels, self.pre_rope)
        return x if kind is None else joined.separate_rows(x, kv_heads)

    def join_constants(self, x: jax.Array) -> jax.Array:
        """Fitted constants per channel `[..., K, 1, H]`, in the order of codes."""
        return joined.join(x, self.heads, self.pre_rope)

    def _kind(self, name: str, channels: int) -> str | None:
        kind = leaf_kinds(self.inner).get(name)
        # Slots stay as they are where 8 bits cannot name a channel of a joined head; no kernel reads them then.
        return None if kind in ("slots", "names") and self.heads * channels > 256 else kind

    def _moved(self, block: Any, move: Callable[[str, Any], Any]) -> Any:
        held = {field.name: getattr(block, field.name) for field in dataclasses.fields(block)}
        return dataclasses.replace(block, **{name: move(name, x) for name, x in held.items() if x is not None})


def _packed(block: Any) -> Any:
    """The leaf with the axes `[..., K, n, H]`."""
    return block.values if isinstance(block, DenseBlock) else block.codes


def inner(codec: AbstractCodec) -> AbstractCodec:
    """What is joined; the codec itself where nothing is."""
    return codec.inner if isinstance(codec, JoinedCodec) else codec


def leaf_kinds(codec: AbstractCodec) -> dict[str, str]:
    """Packed leaves that have heads, and what is along their axes -2 and -1: "channels" `[..., K, n, H]`, "groups" and
    "slots" `[..., K, n, T]`, "names" of channels in slots.

    Raises:
      NotImplementedError: for codecs whose blocks cannot be joined.
    """
    codec = getattr(codec, "inner", codec)
    if isinstance(codec, IdentityCodec):
        return {"values": "channels"}
    if isinstance(codec, AffineCodec):
        kind = "channels" if codec.along == "tokens" else "groups"
        return {"codes": "channels"} if codec.group is None else {"codes": "channels", "scale": kind, "zero": kind}
    if isinstance(codec, NUQTokenCodec) or (isinstance(codec, NUQChannelCodec) and codec.ranges == "offline"):
        return {"codes": "channels", "slot_channel": "names", "slot_residual": "slots"}
    raise NotImplementedError(f"blocks of {codec.describe()} are not joined")


def can_join(codec: AbstractCodec) -> bool:
    """Whether its heads may stand side by side."""
    try:
        leaf_kinds(codec)
    except NotImplementedError:
        return False
    return True
