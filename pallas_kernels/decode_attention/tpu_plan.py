"""Sizes of a TPU decode-attention kernel and how stored arrays reach it: runs, chunks, operands.

A *run* is one or more whole blocks whose tokens are scored by one matrix product; a *chunk* is what one grid step
fetches: several runs of one row and kv head. The chunks of a row start at the block of its first token, and the last
one is moved back to end with the storage, so nothing out of bounds is ever read; tokens seen twice are masked once.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.decode_attention.formats import Format, shape_of

LANES = 128
SUBLANES = 8
CHUNK_BYTES = 2 << 20  # of keys and values per grid step, where the context is that long
UNROLLED_TOKENS = 8192  # the scheduler overlaps this many tokens at most
CHUNK_TOKENS = 16384  # at most, for the scores of a chunk stay in VMEM
SLOTS_HELD = 8192  # rows x channels x slots, with so many tokens, at most


BF16_ARITHMETIC = ("v6e", "7x")  # generations with it, and with matrix units 256 wide
INT8_PRODUCTS = ("v5e", "v5p", "v6e")  # generations whose matrix units take int8, at twice the rate of bfloat16


class Operand(NamedTuple):
    """An array in HBM and the part of it that a grid step sees."""

    array: Any
    spec: pl.BlockSpec


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static sizes.

    Attributes:
      chip: generation, or "" for what all of them can do.
      batch, blocks, heads, tokens, channels: B, N, K, T, H of the storage.
      rows: query heads of one kv head, padded to whole sublanes.
      copies: of the query heads that the rows hold, a power of two: what would be padding may do other work.
      unit: blocks per run.
      runs: runs per chunk.
      unroll: runs per iteration of the loops over a chunk; divides `runs`.
      views: whether memory may be read as another type, which the simulator of `pltpu.InterpretParams` cannot.
    """

    chip: str
    batch: int
    blocks: int
    heads: int
    tokens: int
    channels: int
    rows: int
    copies: int
    unit: int
    runs: int
    unroll: int
    views: bool = True

    @property
    def run_tokens(self) -> int:
        return self.unit * self.tokens

    @property
    def chunk_blocks(self) -> int:
        return self.unit * self.runs

    @property
    def steps(self) -> int:
        """Chunks of a row that uses all of its blocks."""
        return pl.cdiv(self.blocks, self.chunk_blocks)

    def count(self, first: jax.Array, last: jax.Array) -> jax.Array:
        """Chunks that hold tokens first <= t < last; 0 where there are none."""
        chunks = divided(last - self.begin(first) * self.tokens - 1, self.chunk_blocks * self.tokens) + 1
        return jnp.where(last > first, chunks, 0)

    def begin(self, first: jax.Array) -> jax.Array:
        """The block of token `first`, which is not negative."""
        return divided(first, self.tokens)

    def start(self, first: jax.Array, chunk: jax.Array | int) -> jax.Array:
        """The first block that chunk number `chunk` of a row holds."""
        return jnp.minimum(self.begin(first) + chunk * self.chunk_blocks, self.blocks - self.chunk_blocks)

    def starts(self, first: jax.Array) -> jax.Array:
        """`[B, steps]` int32: the first token each chunk of each row holds, for operands made per chunk."""
        chunk = jnp.arange(self.steps, dtype=jnp.int32)
        return self.start(first[:, None], chunk[None]) * self.tokens

    def stored(self, array: jax.Array, whole: bool = False) -> Operand:
        """The blocks of a chunk, `[chunk_blocks, ...]`, of storage `[L, B, N, K or 1, ...]`.

        Args:
          whole: keep all axes, `[1, 1, chunk_blocks, 1, ...]`, for a kernel that looks at the memory in another way;
            where the storage has n times as many heads, n of them: `[1, 1, chunk_blocks, n, ...]`.
        """
        shared, parts = array.shape[3] == 1, max(1, array.shape[3] // self.heads)
        inner = [pl.Element(n) for n in array.shape[4:]]

        def index(b, k, c, layer, first, last):
            used = jnp.clip(c, 0, jnp.maximum(self.count(first[b], last[b]) - 1, 0))
            return layer[0], b, self.start(first[b], used), 0 if shared else k * parts, *(0 for _ in inner)

        one = pl.Element(1) if whole else pl.Squeezed()
        head = pl.Element(parts) if whole else pl.Squeezed()
        return Operand(array, pl.BlockSpec((one, one, pl.Element(self.chunk_blocks), head, *inner), index))

    def per_chunk(self, array: jax.Array) -> Operand:
        """`array[b, chunk]` of `[B, steps, ...]`, as numbered by `starts`."""
        return _operand(array, 2, lambda b, k, c, *_: (b, c))

    def per_head(self, array: jax.Array) -> Operand:
        """`array[layer, head]` of `[L, K, ...]`."""
        return _operand(array, 2, lambda b, k, c, layer, *_: (layer[0], k))

    def per_layer(self, array: jax.Array) -> Operand:
        """`array[layer]` of `[L, ...]`."""
        return _operand(array, 1, lambda b, k, c, layer, *_: (layer[0],))

    def constant(self, array: Any) -> Operand:
        """All of a small array."""
        return _operand(jnp.asarray(array), 0, lambda *_: ())


def divided(x: jax.Array, n: int) -> jax.Array:
    """`x // n` of int32 that are not negative (of others any number below 1): a TPU's scalar unit cannot divide."""
    if n & (n - 1):
        return lax.div(x, jnp.full_like(x, n))
    return lax.shift_right_arithmetic(x, jnp.full_like(x, n.bit_length() - 1))


def _operand(array: jax.Array, leading: int, lead_index: Callable[..., tuple]) -> Operand:
    inner = array.shape[leading:]

    def index(*args):
        return (*lead_index(*args), *(0 for _ in inner))

    return Operand(array, pl.BlockSpec((None,) * leading + inner, index))


def make_plan(k: Format, v: Format, group: int, chip: str, chunk_tokens: int = 0) -> Plan:
    """Sizes for a pair of storages.

    Args:
      group: query heads per kv head.
      chunk_tokens: tokens per grid step; 0 lets the size follow from the bytes.
    """
    _, batch, blocks, heads, tokens, channels = shape_of(k)
    width = 256 if chip in BF16_ARITHMETIC else 128  # tokens that one matrix unit takes at a time
    unit = min(max(1, width // tokens), blocks)
    if not chunk_tokens:
        chunk_tokens = min(CHUNK_BYTES * 8 // (channels * (_bits(k) + _bits(v))), CHUNK_TOKENS)
        # Of outlier slots, words and what they add to scores stay in VMEM too (kvquant2, 16 queries, heads of 256).
        slots = pl.cdiv(group, SUBLANES) * SUBLANES * channels * max(getattr(x, "slots", 0) for x in (k, v))
        chunk_tokens = min(chunk_tokens, CHUNK_TOKENS * SLOTS_HELD // max(slots, SLOTS_HELD))
        # A short context is cut in at least four, so that fetching and computing overlap.
        chunk_tokens = min(chunk_tokens, max(512, blocks * tokens // 4))
    runs = max(1, min(chunk_tokens // (unit * tokens), blocks // unit))
    unroll = max(1, UNROLLED_TOKENS // (unit * tokens))
    if runs >= unroll:
        runs -= runs % unroll
    else:  # a power of two, of which decoders unroll as much as they like
        unroll = runs = 1 << (runs.bit_length() - 1)
    rows = pl.cdiv(group, SUBLANES) * SUBLANES
    copies = SUBLANES // next(n for n in (1, 2, 4, 8) if group <= n) if group <= SUBLANES else 1
    return Plan(chip, batch, blocks, heads, tokens, channels, rows, copies, unit, runs, unroll)


def _bits(x: Format) -> int:
    """Bits of a code; metadata is not counted."""
    return getattr(x, "bits", 16)
