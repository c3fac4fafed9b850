"""Scores of a block's keys, compiled by numba.

Keys are never written down: codes become numbers in registers, are turned there where they are stored before RoPE, and
meet several queries at once. Scales and zeros per channel go into queries, per token into scores; only keys that are
turned are multiplied by them.
"""

import dataclasses
from collections.abc import Callable

import numba
import numpy as np
from numba import carray, types, uint8
from numba.extending import intrinsic

from pallas_kernels.decode_attention.formats import Format
from pallas_kernels.decode_attention.numba_constants import MANY, Constants, constants
from pallas_kernels.decode_attention.numba_vectors import Emitter, Numbers, in_parts, registers
from pallas_kernels.native_cpu import JIT, address, pointer

QUERIES = 8  # at a time, at most


@dataclasses.dataclass(frozen=True)
class Keys:
    """How the keys of one block and head are scored.

    Attributes:
      meta_size: of the float32 array `meta`.
      prepare: `prepare(meta, buffers, at)`, as of `Constants`.
      score: `score(scores, q, angles, meta, buffers, at)`: `scores[G, T] = q[G, H] . keys`, turned by `angles[T, H]`,
        cos and sin side by side.
    """

    meta_size: int
    prepare: Callable
    score: Callable


def keys(fmt: Format, first: int, group: int, turns: bool) -> Keys:
    """For a format whose arrays are those from number `first` on."""
    own, numbers = constants(fmt, first), Numbers.of(fmt)
    if turns or not own.groups:
        size, score = own.total, _as_they_are(own, numbers, first, group, turns)
    elif own.per == "channel":
        size, score = own.total + own.groups * group * (numbers.channels + 1), _per_channel(own, numbers, first, group)
    else:
        size, score = own.total + group * numbers.tokens, _per_token(own, numbers, first, group)
    return Keys(size, own.prepare, _with_slots(score, own, numbers, first, group, turns) if own.slots else score)


def _as_they_are(own: Constants, numbers: Numbers, first: int, group: int, turns: bool) -> Callable:
    nbytes, size = numbers.nbytes, own.size
    scaled = turns and own.groups > 0
    multiply = _Scores(numbers, numbers.channels, group, numbers.fields, turns, scaled).compile()

    @numba.njit(**JIT)
    def score(scores, q, angles, meta, buffers, at):
        words, constant = address(buffers, first) + at.block * nbytes, meta.ctypes.data
        turning = (constant, constant + 4 * size, angles.ctypes.data)
        multiply(scores.ctypes.data, q.ctypes.data, words, constant + 8 * size, turning, at.heads * nbytes)

    return score


def _per_channel(own: Constants, numbers: Numbers, first: int, group: int) -> Callable:
    nbytes, groups, size, G, T, H = numbers.nbytes, own.groups, own.total, group, numbers.tokens, numbers.channels
    zeros_from, per_group = groups * H, T // groups
    multiply = _Scores(numbers, H, group, numbers.fields // groups).compile()

    @numba.njit(**JIT)
    def score(scores, q, angles, meta, buffers, at):
        """`meta`, and behind it scaled queries `[groups, G, H]`, and what zeros add `[groups, G]`."""
        words, scaled, added = address(buffers, first) + at.block * nbytes, meta[size:], meta[size + groups * G * H :]
        for n in range(groups):
            scale, zero = meta[n * H : (n + 1) * H], meta[zeros_from + n * H : zeros_from + (n + 1) * H]
            for g in range(G):
                row, out, total = q[g], scaled[(n * G + g) * H : (n * G + g + 1) * H], np.float32(0)
                for h in range(H):
                    out[h] = row[h] * scale[h]
                    total += row[h] * zero[h]
                added[n * G + g] = total
        table = meta[2 * zeros_from :].ctypes.data
        multiply(scores.ctypes.data, scaled.ctypes.data, words, table, (0, 0, 0), at.heads * nbytes)
        for n in range(groups):
            for g in range(G):
                for t in range(n * per_group, (n + 1) * per_group):
                    scores[g, t] += added[n * G + g]

    return score


def _per_token(own: Constants, numbers: Numbers, first: int, group: int) -> Callable:
    nbytes, groups, size, G, T = numbers.nbytes, own.groups, own.total, group, numbers.tokens
    zeros_from, width, itemsize = groups * T, numbers.channels // groups, numbers.itemsize
    multiply = _Scores(numbers, width, group, numbers.fields).compile()

    @numba.njit(**JIT)
    def score(scores, q, angles, meta, buffers, at):
        """`meta`, and behind it scores of a group of channels `[G, T]`."""
        part, table = meta[size : size + G * T].reshape((G, T)), meta[2 * zeros_from :].ctypes.data
        for n in range(groups):
            words = address(buffers, first) + at.block * nbytes + itemsize * n * width
            column = q.ctypes.data + 4 * n * width
            multiply(part.ctypes.data, column, words, table, (0, 0, 0), at.heads * nbytes)
            scale, zero = meta[n * T : (n + 1) * T], meta[zeros_from + n * T : zeros_from + (n + 1) * T]
            for g in range(G):
                total = np.float32(0)
                for h in range(n * width, (n + 1) * width):
                    total += q[g, h]
                for t in range(T):
                    value = part[g, t] * scale[t] + total * zero[t]
                    scores[g, t] = value if n == 0 else scores[g, t] + value

    return score


def _with_slots(score: Callable, own: Constants, numbers: Numbers, first: int, group: int, turns: bool) -> Callable:
    slots, G, T, half = own.slots, group, numbers.tokens, numbers.channels // 2
    residuals_from = 2 * own.groups * own.size + own.levels

    @numba.njit(**JIT)
    def with_slots(scores, q, angles, meta, buffers, at):
        score(scores, q, angles, meta, buffers, at)
        channels = carray(pointer(address(buffers, first + 4), uint8), (MANY,))[at.block * slots * T :]
        residuals = meta[residuals_from:]
        for i in range(slots * T):
            channel, residual, t = channels[i], residuals[i], i % T
            if turns:
                upper = channel >= half
                pair = channel - half if upper else channel
                a, b = residual * angles[t, pair], residual * angles[t, half + pair]
                other, b = (pair, -b) if upper else (pair + half, b)
                for g in range(G):
                    scores[g, t] += a * q[g, channel] + b * q[g, other]
            else:
                for g in range(G):
                    scores[g, t] += residual * q[g, channel]

    return with_slots


@dataclasses.dataclass(frozen=True)
class _Scores:
    """`scores[g, t] = sum over h of q[g, h] * number(t, h)`, for `channels` of the H there are.

    Attributes:
      fields: of a cell that share queries; those of other fields come behind them.
      turns: numbers are turned by the angles of their tokens.
      scaled: and before that `scale[h] * number + zero[h]`.
    """

    numbers: Numbers
    channels: int
    queries: int
    fields: int
    turns: bool = False
    scaled: bool = False

    def compile(self) -> Callable:
        """On the addresses of arrays; `turning`: scale, zero, angles. `ahead`: bytes to the block that comes next."""

        @intrinsic
        def emit(typing, scores, q, words, levels, scale, zero, angles, ahead):
            def build(context, builder, signature, args):
                self._emit(Emitter(builder, self.numbers, self.channels // self._sides), *args)
                return context.get_dummy_value()

            return types.void(*[types.int64] * 8), build

        @numba.njit(**JIT)
        def multiply(scores, q, words, levels, turning, ahead):
            emit(scores, q, words, levels, turning[0], turning[1], turning[2], ahead)

        return multiply

    @property
    def _sides(self) -> int:
        """Parts of a row that are read at once: its halves, which are turned into each other."""
        return 2 if self.turns else 1

    def _emit(self, e: Emitter, scores, q, words, levels, scale, zero, angles, ahead) -> None:
        numbers = self.numbers
        (field_step, cell_step), tables = numbers.steps, e.tables(levels)
        with e.loop(numbers.cells) as cell:
            start, token = e.cell(words, cell), e.times(cell, cell_step)
            turning = (scale, zero, e.sum(angles, e.times(token, 4 * numbers.channels)))
            for queries in in_parts(self.queries, QUERIES):
                together = max(1, registers() // 2 // len(queries))
                for begin in range(0, numbers.fields, together):
                    fields = range(begin, min(begin + together, numbers.fields))
                    first = begin == 0 and queries.start == 0
                    sums = self._sums(e, tables, start, q, queries, fields, turning, ahead if first else None)
                    places = ((g * numbers.tokens + field * field_step) for g in queries for field in fields)
                    for x, place in zip(sums, places):
                        e.b.store(x, e.place(x.type, scores, e.times(token, 4), 4 * place), align=4)

    def _sums(self, e: Emitter, tables, cell, q, queries: range, fields: range, turning, ahead) -> list:
        """Numbers: of each query and field, fields fastest."""
        half, H = self.channels // 2, self.numbers.channels
        places = e.carried([e.zero()] * (len(queries) * len(fields)))
        with e.loop(self.channels // self._sides // e.width, e.width) as channel:
            sides = [e.sum(channel, half * side) for side in range(self._sides)]
            readers = [e.reader(tables, cell, x) for x in sides]
            values = [[number(field) for field in fields] for number in readers]
            if self.turns:
                self._turn(e, values, fields, sides, turning)
            now, held = e.load_all(places), {}
            for side, own in zip(sides, values):
                for i, g in enumerate(queries):
                    for n, (field, value) in enumerate(zip(fields, own)):
                        row = (field // self.fields * self.queries + g) * H
                        if (side, row) not in held:
                            held[side, row] = e.load(e.floats, q, e.times(side, 4), 4 * row)
                        at = i * len(fields) + n
                        now[at] = e.multiply_add(held[side, row], value, now[at])
            e.store_all(now, places)
            if ahead is not None:
                for side in sides:
                    e.prefetch_cell(cell, side, ahead)
        return e.sums(e.load_all(places))

    def _turn(self, e: Emitter, values: list[list], fields: range, sides: list, turning) -> None:
        """`values` of both halves, in place."""
        *constants, angles = turning
        if self.scaled:
            for side, own in zip(sides, values):
                factor, shift = (e.load(e.floats, x, e.times(side, 4)) for x in constants)
                own[:] = [e.multiply_add(x, factor, shift) for x in own]
        for n, field in enumerate(fields):
            row = 4 * field * self.numbers.steps[0] * self.numbers.channels
            cos, sin = (e.load(e.floats, angles, e.times(side, 4), row) for side in sides)
            low, high = values[0][n], values[1][n]
            values[0][n] = e.multiply_add(low, cos, e.b.fneg(e.b.fmul(high, sin)))
            values[1][n] = e.multiply_add(high, cos, e.b.fmul(low, sin))
