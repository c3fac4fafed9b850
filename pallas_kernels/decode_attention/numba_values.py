"""Weighted sums of a block's values, compiled by numba.

Where tokens have scales and zeros of their own, weights take them. Values are never written down: codes become numbers
in registers, for several queries at once.
"""

import dataclasses
import functools
from collections.abc import Callable

import numba
import numpy as np
from numba import carray, types, uint8
from numba.extending import intrinsic

from pallas_kernels.decode_attention.formats import Format
from pallas_kernels.decode_attention.numba_constants import MANY, constants
from pallas_kernels.decode_attention.numba_vectors import Emitter, Numbers, in_parts
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
        words, ahead = address(buffers, first) + at.block * nbytes, at.heads * nbytes
        table, weights, zeros = meta[levels_from:].ctypes.data, meta[size : size + G * T], meta[size + G * T :]
        if not groups:
            for g in range(G):
                zeros[g] = 0
            sums(acc.ctypes.data, words, p.ctypes.data, zeros.ctypes.data, table, ahead)
        for n in range(groups):
            scale, zero = meta[n * T : (n + 1) * T], meta[zeros_from + n * T : zeros_from + (n + 1) * T]
            for g in range(G):
                row, out, shift = p[g], weights[g * T : (g + 1) * T], np.float32(0)
                for t in range(T):
                    out[t] = row[t] * scale[t]
                    shift += row[t] * zero[t]
                zeros[g] = shift
            column = 4 * n * width
            sums(acc.ctypes.data + column, words + column, weights.ctypes.data, zeros.ctypes.data, table, ahead)
        if slots:
            channels = carray(pointer(address(buffers, first + 4), uint8), (MANY,))[at.block * slots * T :]
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
                self._emit(Emitter(builder, self.numbers, self.channels), *args)
                return context.get_dummy_value()

            return types.void(*[types.int64] * 6), build

        @numba.njit(**JIT)
        def sums(acc, words, weights, zeros, levels, ahead):
            emit(acc, words, weights, zeros, levels, ahead)

        return sums

    def _emit(self, e: Emitter, acc, words, weights, zeros, levels, ahead) -> None:
        numbers, tables = self.numbers, e.tables(levels)

        def read(cell, channel, prefetch):
            start = e.cell(words, cell)
            if prefetch:
                e.prefetch_cell(start, channel, ahead)
            return e.reader(tables, start, channel)

        emit_sums(e, self.channels, self.queries, numbers.fields, numbers.steps, read, acc, weights, zeros)


def emit_sums(
    e: Emitter, channels: int, group: int, fields: int, steps: tuple[int, int], read: Callable, acc, weights, zeros=None
) -> None:
    """Writes the instructions of `_Sums`.

    Args:
      fields, steps: as of `Numbers`.
      read: `read(cell, channel, prefetch) -> number(field)`, float32 from a channel on; `prefetch`: ask for the
        next block's numbers, too.
    """
    (field_step, cell_step), T, H = steps, e.numbers.tokens, e.numbers.channels
    for queries in in_parts(group, SUMS):
        chains = max(1, SUMS // len(queries))  # a sum waits for the one before it
        with e.loop(channels // e.width, e.width) as channel:
            rows = [(acc, e.times(channel, 4), 4 * g * H) for g in queries]
            begin = [e.load(e.floats, *row) for row in rows]
            if zeros is not None:
                begin = [e.b.fadd(x, e.broadcast(zeros, 4 * g)) for g, x in zip(queries, begin)]
            places = e.carried(begin + [e.zero()] * (len(rows) * (chains - 1)))
            with e.loop(T // fields) as cell:
                number, own = read(cell, channel, queries.start == 0), e.sum(weights, e.times(cell, 4 * cell_step))
                now = e.load_all(places)
                for field in range(fields):
                    value, chain = number(field), field % chains * len(rows)
                    for i, g in enumerate(queries, chain):
                        weight = e.broadcast(own, 4 * (g * T + field * field_step))
                        now[i] = e.multiply_add(weight, value, now[i])
                e.store_all(now, places)
            totals = e.load_all(places)
            for i, row in enumerate(rows):
                total = functools.reduce(e.b.fadd, totals[i :: len(rows)])
                e.b.store(total, e.place(e.floats, *row), align=4)
