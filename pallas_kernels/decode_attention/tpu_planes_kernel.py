"""The kernel of `tpu_planes`: copies that are issued or not, beside an online softmax.

The planes stay in HBM and come one plane of one unit at a time. Per (row, kv head), over chunks of units:

    wait for the keys of chunk c; scores; start the keys of chunk c + 1
    running maximum and sum; scores become weights P relative to that maximum
    wait for the values of chunk c - 1; add P V; decide the levels of chunk c's values, start them
    make what was added relative to the new maximum

so a value's level may depend on its own score: the maximum m and sum l so far bound its probability from above,
exp(s - m) / l, which is compared with the `limits` of `Planes` (as the online softmax of `kvjax.aligned`).

Copies are started at the end of the code that computes, so that their addresses are worked out while the vector unit
is busy, and products under way. q and P go through the matrix unit as two bfloat16 rows, high and low, beside each
other: rows are free in decode, and what is lost in rounding stays far below what is not read.

Weights are made where scores are summed, not where values are unpacked: exps of many blocks, held there until their
products, spilled (v6e: 112 instructions, not 32), and each was taken twice.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention import tpu_planes_unpack as unpack

EMPTY = -1e30
LEVELS = (1, 2, 3)
# Blocks of one product on v6e and 7x, whose matrix units are 256 wide and wait for each product: alignedkv-8 takes 54.5
# bundles on v6e rather than 64.4, alignedkv-8-0 33.3 rather than 42.8. A product as deep as a block has terms made
# 98.9 of alignedkv-16's 118.2.
TOGETHER = 2
_LANES = 128
_NT = (((1,), (1,)), ((), ()))
_NN = (((1,), (0,)), ((), ()))


def run(*refs: Any, blocks: int, tokens: int, online: bool, bf16: bool) -> None:
    """The body of `pallas_call`; refs as `_Attention` takes them.

    Args:
      blocks, tokens: N and T of the storage.
      online: values are read by limits.
      bf16: the chip has bfloat16 vector arithmetic.
    """
    _Attention(refs, blocks, tokens, online, bf16).run()


class _Attention:
    """One row and kv head. A level is a number of planes; -1: the unit holds no token that is seen."""

    def __init__(self, refs: tuple, blocks: int, tokens: int, online: bool, bf16: bool):
        layer, first, last, self.k_levels, self.v_rule, self.q, self.known, *others = refs
        self.k_hbm, self.v_hbm, self.outputs, scratch = others[:3], others[3:6], others[6:10], others[10:]
        self.k_buffers, self.v_buffers, self.scores, self.unit_max, self.v_levels, sums, *arrived = scratch
        self.top, self.total, self.at_top, self.log_sum, self.acc = sums
        self.k_arrived, self.v_arrived = arrived
        self.blocks, self.tokens, self.online, self.bf16 = blocks, tokens, online, bf16
        self.at = layer[0], pl.program_id(0), pl.program_id(1)
        _, self.per_chunk, self.size = self.k_buffers[0].shape[:3]
        self.together = TOGETHER if bf16 else 1
        self.unit_tokens, self.rows = self.size * tokens, self.scores.shape[2]
        self.begin, self.end = first[self.at[1]], last[self.at[1]]
        self.unit_begin = jax.lax.div(self.begin, self.unit_tokens)
        unit_end = jax.lax.div(self.end + (self.unit_tokens - 1), self.unit_tokens)
        self.unit_end = jnp.where(self.end > self.begin, unit_end, self.unit_begin)
        self.order = unpack.token_order(jax.lax.broadcasted_iota(jnp.int32, (self.rows, tokens), 1), tokens)

    def run(self) -> None:
        acc_out, top_out, total_out, read = self.outputs
        empty = ((self.top, EMPTY), (self.at_top, EMPTY), (self.total, 0.0), (self.log_sum, 0.0), (self.acc, 0.0))
        for ref, value in empty:
            ref[...] = jnp.full(ref.shape, value, jnp.float32)
        for j in range(self.per_chunk):
            self.v_levels[0, j] = 0
            self.v_levels[1, j] = 0
        jax.lax.fori_loop(0, read.shape[1], lambda u, _: read.__setitem__((0, u), 0), None)
        # A step before the first chunk, which only starts its keys, and one after the last, for its values.
        begin = jax.lax.div(self.unit_begin, self.per_chunk)
        end = jax.lax.div(self.unit_end + (self.per_chunk - 1), self.per_chunk)
        stop = jnp.where(self.unit_end > self.unit_begin, end + 1, begin - 1)
        jax.lax.fori_loop(begin - 1, stop, functools.partial(self._step, begin, end), None)
        acc_out[...] = _halves(self.acc[...], self.rows) * (1 / unpack.scale(self.bf16))
        top_out[...] = self.top[...]
        total_out[...] = self.total[...]

    def _step(self, begin: jax.Array, end: jax.Array, chunk: jax.Array, _: None) -> None:
        jax.lax.fori_loop(0, self.per_chunk, lambda j, _: self._keys(chunk, j), None)
        pl.when((chunk >= begin) & (chunk < end))(lambda: self._update(chunk & 1))
        jax.lax.fori_loop(0, self.per_chunk, lambda j, _: self._values(chunk - 1, j), None)
        self._rescale()

    # Units

    def _block_of(self, unit: jax.Array) -> jax.Array:
        # The last unit may be short of blocks: it then starts earlier, and masks what it shares with the one before.
        return jnp.minimum(unit * self.size, self.blocks - self.size)

    def _needed(self, unit: jax.Array) -> jax.Array:
        return (unit >= self.unit_begin) & (unit < self.unit_end)

    def _level_of_keys(self, unit: jax.Array) -> jax.Array:
        return jnp.where(self._needed(unit), self.k_levels[0, _inside(unit, self.k_levels)], -1)

    def _copy(self, i: int, hbm: Any, buffers: Any, arrived: Any, unit: jax.Array, slot: jax.Array, j: jax.Array):
        layer, row, head = self.at
        source = hbm[i].at[layer, row, pl.ds(self._block_of(unit), self.size), head]
        return pltpu.make_async_copy(source, buffers[i].at[slot, j], arrived.at[slot, j, i])

    def _start(self, level: jax.Array, *unit: Any) -> None:
        for i in range(3):
            pl.when(level > i)(self._copy(i, *unit).start)

    def _tiles(self, level: int, hbm: Any, buffers: Any, arrived: Any, unit: jax.Array, slot: jax.Array, j: jax.Array):
        """Waits for a unit read to `level`; its blocks' values, each a list to be summed."""
        for i in range(level):
            self._copy(i, hbm, buffers, arrived, unit, slot, j).wait()
        planes = buffers[:level]
        return [unpack.tiles([p[slot, j, n] for p in planes], level, self.bf16) for n in range(self.size)]

    # Keys

    def _keys(self, chunk: jax.Array, j: jax.Array) -> None:
        """Scores of a unit of this chunk; starts one of the next."""
        unit, slot = chunk * self.per_chunk + j, chunk & 1
        level = self._level_of_keys(unit)
        nothing = jnp.zeros((self.rows, self.tokens), jnp.float32)
        pl.when(level <= 0)(lambda: self._scored(unit, slot, j, [nothing] * self.size))

        def read(some: int) -> None:
            blocks = self._tiles(some, self.k_hbm, self.k_buffers, self.k_arrived, unit, slot, j)
            scores: list[jax.Array] = []
            for n in range(0, self.size, self.together):
                together = [jnp.concatenate(terms, axis=1) for terms in blocks[n : n + self.together]]
                q = jnp.concatenate([self.q[...]] * len(blocks[n]), axis=1)
                product = _halves(_dot(q, jnp.concatenate(together, axis=0), _NT), self.rows)
                scores += [product[:, at : at + self.tokens] for at in range(0, product.shape[1], self.tokens)]
            self._scored(unit, slot, j, scores)

        for some in LEVELS:
            pl.when(level == some)(functools.partial(read, some))

    def _scored(self, unit: jax.Array, slot: jax.Array, j: jax.Array, scores: list[jax.Array]) -> None:
        """Stores a unit's scores, masked, and their maximum."""
        largest = jnp.full((self.rows, _LANES), EMPTY, jnp.float32)
        low = jnp.maximum(self.begin, unit * self.unit_tokens)
        high = jnp.where(self._needed(unit), self.end, self.begin)
        for n, score in enumerate(scores):
            token = self.order + (self._block_of(unit) + n) * self.tokens
            masked = jnp.where((token >= low) & (token < high), score, EMPTY)
            self.scores[slot, j, :, n * self.tokens : (n + 1) * self.tokens] = masked
            for lane in range(0, self.tokens, _LANES):
                largest = jnp.maximum(largest, masked[:, lane : lane + _LANES])
        self.unit_max[j] = jnp.broadcast_to(largest.max(axis=1, keepdims=True), largest.shape)
        following = unit + self.per_chunk
        level = self._level_of_keys(following)
        self._start(level, self.k_hbm, self.k_buffers, self.k_arrived, following, 1 - slot, j)

    def _update(self, slot: jax.Array) -> None:
        """The running maximum and sum with one more chunk of scores, which become weights, relative to that maximum."""
        now = jnp.maximum(self.top[...], self.unit_max[...].max(axis=0))
        sums = jnp.zeros((self.rows, _LANES), jnp.float32)
        for j in range(self.per_chunk):
            for lane in range(0, self.unit_tokens, _LANES):
                p = jnp.exp(self.scores[slot, j, :, lane : lane + _LANES] - now)
                self.scores[slot, j, :, lane : lane + _LANES] = p
                sums = sums + p
        added = jnp.broadcast_to(sums.sum(axis=1, keepdims=True), sums.shape)
        self.total[...] = self.total[...] * jnp.exp(self.top[...] - now) + added
        self.top[...] = now
        if self.online:
            self.log_sum[...] = _logaddexp(now + jnp.log(self.total[...]), self.known[...])

    # Values

    def _values(self, chunk: jax.Array, j: jax.Array) -> None:
        """Adds a unit of this chunk; starts one of the next."""
        unit, slot = chunk * self.per_chunk + j, chunk & 1
        level = self.v_levels[slot, j]
        pl.when(level == 0)(lambda: self._start_values(chunk + 1, j))

        def read(some: int) -> None:
            added = jnp.zeros(self.acc.shape, jnp.float32)
            blocks = self._tiles(some, self.v_hbm, self.v_buffers, self.v_arrived, unit, slot, j)
            for n in range(0, self.size, self.together):
                weights: list[jax.Array] = []
                for i, terms in enumerate(blocks[n : n + self.together], n):
                    p = self.scores[slot, j, :, i * self.tokens : (i + 1) * self.tokens]
                    weights += [_high_and_low(p)] * len(terms)
                values = [term for terms in blocks[n : n + self.together] for term in terms]
                added = added + _dot(jnp.concatenate(weights, axis=1), jnp.concatenate(values, axis=0), _NN)
            self.acc[...] = self.acc[...] + added
            self._start_values(chunk + 1, j)

        for some in LEVELS:
            pl.when(level == some)(functools.partial(read, some))

    def _start_values(self, chunk: jax.Array, j: jax.Array) -> None:
        unit, slot = chunk * self.per_chunk + j, chunk & 1
        at = _inside(unit, self.v_rule)
        if self.online:
            largest = jnp.max(self.unit_max[j] - self.log_sum[...])
            wanted = _sum([(largest > self.v_rule[i, at]).astype(jnp.int32) for i in range(3)])
        else:
            wanted = self.v_rule[0, at]
        level = jnp.where(self._needed(unit), wanted, 0)
        self.v_levels[slot, j] = level
        pl.when(self._needed(unit))(lambda: self.outputs[3].__setitem__((0, unit), level))
        self._start(level, self.v_hbm, self.v_buffers, self.v_arrived, unit, slot, j)

    def _rescale(self) -> None:
        """Makes the sums relative to the maximum that the chunk just scored has its weights relative to."""
        scale = jnp.exp(self.at_top[...] - self.top[...])[:, :1]
        self.acc[...] = self.acc[...] * jnp.broadcast_to(jnp.concatenate([scale, scale], axis=0), self.acc.shape)
        self.at_top[...] = self.top[...]


def _inside(unit: jax.Array, rule: Any) -> jax.Array:
    return jnp.clip(unit, 0, rule.shape[1] - 1)


def _halves(x: jax.Array, rows: int) -> jax.Array:
    """The products of a high and a low part together."""
    return x[:rows] + x[rows:]


def _high_and_low(p: jax.Array) -> jax.Array:
    high = p.astype(jnp.bfloat16)
    return jnp.concatenate([high, (p - high.astype(jnp.float32)).astype(jnp.bfloat16)], axis=0)


def _sum(terms: list[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, terms)


def _logaddexp(a: jax.Array, b: jax.Array) -> jax.Array:
    largest = jnp.maximum(a, b)
    return largest + jnp.log(jnp.exp(a - largest) + jnp.exp(b - largest))


def _dot(a: jax.Array, b: jax.Array, dims: Any) -> jax.Array:
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)
