"""Weighted sums of a block's values, compiled by numba.

Where tokens have scales and zeros of their own, weights take them. Values are never written down: codes become numbers
in registers, for several queries at once.
"""

import dataclasses
from collections.abc import Callable

import numba
import numpy as np
from numba import carray, types, uint8
from numba.extending import intrinsic

from pallas_kernels.decode_attention.formats import Format
from pallas_kernels.decode_attention.numba_constants import MANY, constants
from pallas_kernels.decode_attention.numba_vectors import Emitter, Numbers
from pallas_kernels.native_cpu import JIT, address, pointer

SUMS = 8  # in registers at a time


@dataclasses.dataclass(frozen=True)
class Values:
    """How the values of one block and head are added up.

    Attributes:
      meta_size: of the float32 array `meta`.
      prepare: `prepare(meta, buffers, at)`, as of `Constants`.
      add: `add(acc, p, top, total, meta, buffers, at)`: `acc[G, H] += p[G, T] . values`; p is relative to `top[G]`, and
        `total[G]` its sum, of this block and those before.
    """

    meta_size: int
    prepare: Callable
    add: Callable


def values(fmt: Format, first: int, group: int) -> Values:
    """For a format whose arrays are those from number `first` on."""
    own, numbers = constants(fmt, first), Numbers.of(fmt)
    T, H, G, groups, slots, size = numbers.tokens, numbers.channels, group, own.groups, own.slots, own.total
    nbytes, zeros_from, levels_from = numbers.nbytes, groups * T, 2 * groups * T
    residuals_from, width = levels_from + own.levels, H // max(groups, 1)
    sums = _Sums(numbers, width, group).compile()

    @numba.njit(**JIT)
    def add(acc, p, top, total, meta, buffers, at):
        """`meta`, and behind it weights, and what zeros add."""
        words, ahead = address(buffers, first) + at[0] * nbytes, at[4] * nbytes
        table, weights, zeros = meta[levels_from:].ctypes.data, meta[size : size + G * T], meta[size + G * T :]
        if not groups:
            for g in range(G):
                zeros[g] = 0
            sums(acc.ctypes.data, words, p.ctypes.data, zeros.ctypes.data, table, ahead)
        for n in range(groups):
            scale, zero = meta[n * T : (n + 1) * T], meta[zeros_from + n * T : zeros_from + (n + 1) * T]
            for g in range(G):
                row, out, total = p[g], weights[g * T : (g + 1) * T], np.float32(0)
                for t in range(T):
                    out[t] = row[t] * scale[t]
                    total += row[t] * zero[t]
                zeros[g] = total
            column = 4 * n * width
            sums(acc.ctypes.data + column, words + column, weights.ctypes.data, zeros.ctypes.data, table, ahead)
        if slots:
            channels = carray(pointer(address(buffers, first + 4), uint8), (MANY,))[at[0] * slots * T :]
            residuals = meta[residuals_from:]
            for i in range(slots * T):
                for g in range(G):
                    acc[g, channels[i]] += residuals[i] * p[g, i % T]

    return Values(own.total + G * T + G, own.prepare, add)


@dataclasses.dataclass(frozen=True)
class _Sums:
    """`acc[g, h] += zeros[g] + sum over t of weights[g, t] * number(t, h)`, for `channels` of the H there are."""

    numbers: Numbers
    channels: int
    queries: int

    def compile(self) -> Callable:
        """On the addresses of arrays; `ahead`: bytes to the block that comes next."""

        @intrinsic
        def emit(typing, acc, words, weights, zeros, levels, ahead):
            def build(context, builder, signature, args):
                emitter = Emitter(builder, self.numbers, self.channels)
                parts = -(-self.queries // SUMS)
                ends = [self.queries * i // parts for i in range(parts + 1)]
                for queries in map(range, ends, ends[1:]):
                    self._emit(emitter, queries, *args)
                return context.get_dummy_value()

            return types.void(*[types.int64] * 6), build

        @numba.njit(**JIT)
        def sums(acc, words, weights, zeros, levels, ahead):
            emit(acc, words, weights, zeros, levels, ahead)

        return sums

    def _emit(self, e: Emitter, queries: range, acc, words, weights, zeros, levels, ahead) -> None:
        numbers = self.numbers
        (field_step, cell_step), tables = numbers.steps, e.tables(levels)
        chains = max(1, SUMS // len(queries))  # a sum waits for the one before it
        with e.loop(self.channels // e.width, e.width) as channel:
            rows = [(acc, e.times(channel, 4), 4 * g * numbers.channels) for g in queries]
            begin = [e.b.fadd(e.load(e.floats, *row), e.broadcast(zeros, 4 * g)) for g, row in zip(queries, rows)]
            places = e.carried(begin + [e.zero()] * (len(rows) * (chains - 1)))
            with e.loop(numbers.cells) as cell:
                start, own = e.cell(words, cell), e.sum(weights, e.times(cell, 4 * cell_step))
                now = e.load_all(places)
                number = e.reader(tables, start, channel)
                for field in range(numbers.fields):
                    value, chain = number(field), field % chains * len(rows)
                    for i, g in enumerate(queries, chain):
                        weight = e.broadcast(own, 4 * (g * numbers.tokens + field * field_step))
                        now[i] = e.multiply_add(weight, value, now[i])
                e.store_all(now, places)
                if not queries.start:
                    e.prefetch_cell(start, channel, ahead)
            totals = e.load_all(places)
            for i, row in enumerate(rows):
                total = totals[i]
                for x in totals[i + len(rows) :: len(rows)]:
                    total = e.b.fadd(total, x)
                e.b.store(total, e.place(e.floats, *row), align=4)
