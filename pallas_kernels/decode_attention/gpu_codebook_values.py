"""Codebook values on Hopper (KVQuant): scale and zero per token, folded into the weights."""

import dataclasses
import functools
from typing import ClassVar

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_attention import gpu_codebook_lookup as codes
from pallas_kernels.decode_attention.formats import Codebook
from pallas_kernels.decode_attention.gpu_answers import store_tile
from pallas_kernels.decode_attention.gpu_codebook_keys import at_once, narrow
from pallas_kernels.decode_attention.gpu_codebook_slots import clear, value_tile
from pallas_kernels.decode_attention.gpu_codebook_tiles import (
    DEPTH,
    LEFT,
    RIGHT,
    channel_of_row,
    fetch_blocks,
    load,
    product,
    row_numbers,
    value_words,
)
from pallas_kernels.decode_attention.gpu_skeleton import At, Plan, flat
from pallas_kernels.decode_attention.gpu_tiles import ROWS, full, over_columns, over_rows

STEPS = [slice(i, i + DEPTH) for i in range(0, ROWS, DEPTH)]


@dataclasses.dataclass(frozen=True, eq=False)
class CodebookValues:
    """Decoder of values. Rows of the sum are channels `regrouped`.

    The table of levels is the keys' first array in shared memory, and comes last in `dst`.
    """

    plan: Plan
    bits: int
    slots: int
    shared: bool
    borrows: ClassVar[int] = 1

    @property
    def chains(self) -> int:
        """Accumulators, so that a product does not wait for the one before; at 2 bits slots leave no registers."""
        return 1 if self.bits == 2 and self.slots else 2

    def arrays(self, fmt: Codebook) -> list:
        slots = [fmt.slot_channel, fmt.slot_residual] if self.slots else []
        return [flat(self.plan, x) for x in (fmt.codes, fmt.scale, fmt.zero, *slots)]

    def scratch(self) -> list:
        p = self.plan
        weights = plgpu.SMEM((self.few, ROWS, p.columns), jnp.float16)

        def blocks(size, dtype):
            return plgpu.SMEM((p.slots, p.run, *size), dtype)

        stored = [blocks((p.tokens * self.bits // 32, p.channels), jnp.uint32), *[blocks((p.tokens,), jnp.uint16)] * 2]
        if not self.slots:
            return [weights, *stored]
        slots = [blocks((self.slots, p.tokens), x) for x in (jnp.uint8, jnp.uint16)]
        both = not narrow(p, self.bits, self.slots, self.shared)  # else there is no room to have two of each
        residuals = plgpu.SMEM((1 + both, len(STEPS), p.padded, DEPTH), jnp.float16)
        return [weights, *stored, *slots, residuals, *[weights] * both]

    def copies(self) -> int:
        return 5 if self.slots else 3

    def fetch(self, src, dst, at: At, slot, barrier) -> None:
        fetch_blocks(self.plan, src, [x.at[slot] for x in dst[1 : 1 + len(src)]], at, barrier)

    def init(self):
        return (
            full((self.plan.padded, self.plan.columns), 0.0, self.plan.interpret),
            full((ROWS, self.plan.columns), 0.0, self.plan.interpret),
        )

    @property
    def few(self) -> int:
        """Planes whose weights are in shared memory at once."""
        return at_once(self.plan, self.bits, self.slots, self.shared)

    def add(self, dst, at: At, slot, planes: range, weights: list, alpha, state):
        acc, zeros = state
        state = acc * over_rows(alpha, self.plan.padded), zeros * over_rows(alpha, ROWS)
        for first in range(0, len(planes), self.few):
            if first:
                plgpu.commit_smem()  # all have read the weights before
            some = slice(first, first + self.few)
            state = self._add(dst, slot, planes[some], weights[some], *state)
        return state

    def _add(self, dst, slot, planes: range, weights: list, acc, zeros):
        p_ref, words, *numbers, table = dst
        numbers, slots = numbers[:2], numbers[2:]
        interpret, columns = self.plan.interpret, self.plan.columns
        chains = self.chains
        scales, offsets = (row_numbers(self.plan, x.at[slot], planes) for x in numbers)
        for i, w in enumerate(weights):
            scale, zero = (over_columns(x[i], columns) for x in (scales, offsets))
            zeros = zeros + w * zero
            p_ref[i] = (w * scale).astype(jnp.float16)
            if slots[3:]:
                slots[3][i] = w.astype(jnp.float16)
        plgpu.commit_smem()
        levels = codes.decoders(self.bits, planes, table, 1, self.shared, LEFT, interpret)

        def step(i, sums):
            w, sums = value_words(words.at[slot], i, self.bits, self.plan.padded, interpret), list(sums)
            for group, decode in levels:
                for p, a in zip(group, decode(w)):
                    n = p - planes.start
                    b = load(p_ref.at[n, pl.ds(DEPTH * i, DEPTH)], RIGHT, interpret)
                    sums[n % chains] = product(sums[n % chains], a, b, interpret)
            return tuple(sums)

        sums = lax.fori_loop(0, len(STEPS), step, tuple(full(acc.shape, 0.0, interpret) for _ in range(chains)))
        sums = list(sums)
        if self.slots:
            plain = slots[3] if slots[3:] else p_ref
            if plain is p_ref:
                plgpu.commit_smem()  # all have read the scaled weights
                for i, w in enumerate(weights):
                    p_ref[i] = w.astype(jnp.float16)
                plgpu.commit_smem()
            self._add_slots([s.at[slot] for s in slots[:2]], plain, slots[2], planes, sums)
        return acc + sum(sums[1:], sums[0]), zeros

    def _add_slots(self, slots, weights, tiles, planes: range, sums: list) -> None:
        interpret, chains = self.plan.interpret, len(sums)
        clear(tiles, interpret)
        value_tile(self.plan, tiles, slots, planes, planes.start)
        for i, p in enumerate(planes):
            # The next plane's residuals go into the other tile, if there is one, meanwhile.
            left = [load(tiles.at[p % tiles.shape[0], j], LEFT, interpret) for j in range(len(STEPS))]
            for j, (a, rows) in enumerate(zip(left, STEPS)):
                sums[j % chains] = product(sums[j % chains], a, load(weights.at[i, rows], RIGHT, interpret), interpret)
            if p + 1 in planes:
                value_tile(self.plan, tiles, slots, planes, p + 1)

    def store(self, ref, state) -> None:
        acc, zeros = state
        channel = functools.partial(channel_of_row, size=self.plan.padded)
        store_tile(ref, acc, channel, self.plan.interpret, added=[jnp.sum(zeros, axis=0)])
