"""What a decode kernel reads: the stored keys or values of L layers, as raw arrays and static integers.

Every array has the axes `[L, B, N, K or 1, ...]` of the cache it comes from (layers, rows, blocks of T tokens, kv
heads) and is passed whole: a kernel takes the layer as an index, because slicing it off would copy the layer. 16-bit
floats are held as uint16 bit patterns. Codes are packed along tokens by `pallas_kernels.packing`. Where heads stand
side by side (`pallas_kernels.joined`), `joined` says how many, and K and H are those of the joined heads.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax

Leaf = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense:
    """`x = values`.

    Attributes:
      values: `[L, B, N, K, T, H]` uint16.
      dtype: what the bits are, static.
      joined: static.
    """

    values: Leaf
    dtype: Literal["bfloat16", "float16"] = dataclasses.field(default="bfloat16", metadata={"static": True})
    joined: int = dataclasses.field(default=1, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Affine:
    """`x = scale * code + zero`.

    Attributes:
      codes: `[L, B, N, K, T * bits / 32, H]` uint32.
      scale, zero: uint16. Groups along tokens (per channel): `[L, B, N, K, T/g, H]`. Along channels (per token):
        `[L, B, N, K, H/g, T]`, or `[L, B, N, 1, 1, T]` where one group is a token's whole kv width. Of joined heads
        the groups may be in n parts, `[L, B, N, n * K, H/g/n, T]`.
      bits: 1, 2, 3, 4 or 8, static.
      along: the axis groups run along, static.
      dtype: what the bits of scale and zero are, static.
      joined: static.
    """

    codes: Leaf
    scale: Leaf
    zero: Leaf
    bits: int = dataclasses.field(metadata={"static": True})
    along: Literal["tokens", "channels"] = dataclasses.field(metadata={"static": True})
    dtype: Literal["float16", "bfloat16"] = dataclasses.field(default="float16", metadata={"static": True})
    joined: int = dataclasses.field(default=1, metadata={"static": True})

    @property
    def parts(self) -> int:
        """n, the parts that the groups of a head are in."""
        return max(1, self.scale.shape[3] // self.codes.shape[3])

    @property
    def groups(self) -> int:
        """Of tokens of a block, or of channels of a (joined) head; 1 where heads share one."""
        return self.scale.shape[-2] * self.parts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Codebook:
    """`x = scale * levels[code] + zero`, plus `slot_residual` at channel `slot_channel` of each slot.

    Slots of one token may name the same channel (an unused slot has residual 0): residuals add up.

    Attributes:
      codes: `[L, B, N, K, T * bits / 32, H]` uint32.
      levels: `[L, 2**bits]` float32, ascending, not confined to [-1, 1].
      scale, zero: per channel `[L, K, 1, H]` float32 (fitted), or per token `[L, B, N, 1, T]` uint16 (float16 bits).
      slot_channel: `[L, B, N, K, s, T]` uint8; None without slots.
      slot_residual: `[L, B, N, K, s, T]` uint16 (float16 bits); None without slots.
      bits: 1 to 4, static.
      per: what shares a scale, static.
      joined: static.
    """

    codes: Leaf
    levels: Leaf
    scale: Leaf
    zero: Leaf
    slot_channel: Leaf
    slot_residual: Leaf
    bits: int = dataclasses.field(metadata={"static": True})
    per: Literal["channel", "token"] = dataclasses.field(metadata={"static": True})
    joined: int = dataclasses.field(default=1, metadata={"static": True})

    @property
    def slots(self) -> int:
        return 0 if self.slot_channel is None else self.slot_channel.shape[-2]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Planes:
    """float16 in planes of 8, 4 and 4 bits, read to a level: `x = float16(first << 8 | mid << 4 | last)`.

    What is not read is filled with 1000...; at level 0 nothing is read and x counts as 0 (AlignedKV, arXiv 2409.16546).
    A query says how much it needs of each run of blocks and kv head: either by `levels`, or (values) by `limits` on its
    probability, which the kernel learns on the way. A kernel reads at least that much, and may read more.

    Attributes:
      planes: first, mid and last, packed uint32 along tokens, b = 8, 4 and 4 bits, in one of two orders.
      levels: `[B, U, K]` int32, planes to read, 0 to 3; None where `limits` decide.
      limits: `[3, B, U, K]` float32, ascending: the level is the number of limits that are below
        `score - log(sum of exp(score) over all tokens)`, largest over the run's tokens and the group's query heads.
      known: `[B, K, G]` float32, the log-sum-exp of scores of other tokens that this attention will be merged with
        (-1e30: none); with `limits` only.
      run: blocks that share a level, as `api.run` says; static. U = N / run, rounded up: the last run may be shorter.
      order: static. "words": `[L, B, N, K, T * b / 32, H]`, as all codes are. "channels": the words of a channel are
        neighbours, `[L, B, N, K, H, T * b / 32]`.
    """

    planes: tuple[Leaf, ...]
    levels: Leaf = None
    limits: Leaf = None
    known: Leaf = None
    run: int = dataclasses.field(default=1, metadata={"static": True})
    order: Literal["words", "channels"] = dataclasses.field(default="words", metadata={"static": True})


Format = Dense | Affine | Codebook | Planes


class Partial(NamedTuple):
    """Softmax attention over some of the tokens, not yet normalised; float32.

    Attributes:
      acc: `[B, K, G, H]`, sum of exp(score - max) * value.
      max: `[B, K, G]`, the largest score, or -1e30 where no token is seen.
      sum: `[B, K, G]`, sum of exp(score - max).
    """

    acc: jax.Array
    max: jax.Array
    sum: jax.Array


@dataclasses.dataclass(frozen=True)
class Rotation:
    """RoPE for keys that are stored before it.

    A key at token t counts as rotated by t, the query as rotated by `position`: their score is
    `(R(position - t) q) . k`, so a kernel may rotate the query to where a run of tokens starts, and the keys of every
    run by the same angles of 0, 1, 2, ... tokens.

    Attributes:
      position: `[B]` int32, of the query, counted from token 0 of the storage.
      angles: `angles(offsets[...] int32) -> cos, sin`, each `[..., H/2]` float32: the rotation by so many tokens. It
        turns channels (i, i + H/2) of each head and does not scale them.
      stride: the storage holds every stride-th block of a sequence (the others are on other devices), so that its token
        t is rotated by `place(t)` and not by t.
    """

    position: jax.Array
    angles: Callable[[jax.Array], tuple[jax.Array, jax.Array]]
    stride: int = 1

    def place(self, token: jax.Array, tokens: int) -> jax.Array:
        """Where token number `token` of the storage stands, in blocks of `tokens`.

        It adds up: place(a + b) = place(a) + place(b) for a at the start of a block.
        """
        return token + token // tokens * (tokens * (self.stride - 1))


def shape_of(fmt: Format) -> tuple[int, int, int, int, int, int]:
    """`L, B, N, K, T, H` of the storage."""
    if isinstance(fmt, Dense):
        return fmt.values.shape
    if isinstance(fmt, Planes):
        *lead, rows, columns = fmt.planes[0].shape
        return (*lead, 4 * rows, columns) if fmt.order == "words" else (*lead, 4 * columns, rows)
    *lead, words, channels = fmt.codes.shape
    return (*lead, words * 32 // fmt.bits, channels)


def joined_heads(fmt: Format) -> int:
    """How many heads stand side by side as one."""
    return 1 if isinstance(fmt, Planes) else fmt.joined


def describe(fmt: Format) -> str:
    """The storage in a few words, for `explain` and the support matrix."""
    if isinstance(fmt, Dense):
        return fmt.dtype
    if isinstance(fmt, Planes):
        return "float16 planes" + ("" if fmt.order == "words" else f", {fmt.order} together")
    if isinstance(fmt, Affine):
        size = shape_of(fmt)[4] // fmt.groups
        if fmt.along == "tokens":
            return f"affine {fmt.bits} bits per channel, groups of {size}"
        shared = fmt.scale.shape[3] == 1 and shape_of(fmt)[3] > 1
        width = "kv width" if shared else f"groups of {shape_of(fmt)[5] // fmt.groups}"
        return f"affine {fmt.bits} bits per token, {width}"
    slots = f", {fmt.slots} outlier slot{'s' * (fmt.slots > 1)}" if fmt.slots else ""
    return f"codebook {fmt.bits} bits per {fmt.per}{slots}"
