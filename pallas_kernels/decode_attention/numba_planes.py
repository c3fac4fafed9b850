"""Keys and values in bit planes, of which a block of one kv head is read to one level, compiled by numba.

Keys have a level each before the call; values get theirs here, from a bound on their probability: what a program has
seen so far, with what the caller knows of other tokens (`formats.Planes.known`), bounds the sum of all. Planes that a
level leaves out are not touched.
"""

import dataclasses
import math
from collections.abc import Callable

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pallas_kernels.decode_attention.formats import Planes, shape_of
from pallas_kernels.decode_attention.numba_constants import arrays_of, floats_at, integers_at
from pallas_kernels.decode_attention.numba_keys import QUERIES, Keys
from pallas_kernels.decode_attention.numba_softmax import EMPTY
from pallas_kernels.decode_attention.numba_values import Values, emit_sums
from pallas_kernels.decode_attention.numba_vectors import Emitter, Numbers, in_parts, registers
from pallas_kernels.native_cpu import JIT, address

BITS = (8, 4, 4)  # of a number in each plane, from the upper ones on
LEVELS = len(BITS)


def plane_keys(fmt: Planes, first: int, group: int) -> Keys:
    """As `numba_keys.keys`, in order "channels"."""
    read = _by_level(_Scores, fmt, first, group)

    @numba.njit(**JIT)
    def score(scores, q, angles, meta, buffers, at):
        level = integers_at(buffers, first + LEVELS)[at.own]
        if level == 0:
            scores[:] = 0
        read(level, scores, q, buffers, at)

    return Keys(0, _nothing, score)


def plane_values(fmt: Planes, first: int, group: int) -> Values:
    """As `numba_values.values`, in order "words"; the levels that are read are the fourth result of the call."""
    read, told = _by_level(_Sums, fmt, first, group), first + len(arrays_of(fmt)) + 3
    level_of = (_given if fmt.limits is None else _by_limits)(first + LEVELS, group)

    @numba.njit(**JIT)
    def add(acc, p, top, total, meta, buffers, at):
        level = level_of(p, top, total, buffers, at)
        integers_at(buffers, told)[at.own] = level
        read(level, acc, p, buffers, at)

    return Values(0, _nothing, add)


def _by_level(kind: "type[_Read]", fmt: Planes, first: int, group: int) -> Callable:
    """`read(level, a, b, buffers, at)` of a block's planes, which at level 0 does nothing."""
    *_, T, H = shape_of(fmt)
    one, two, three = (kind(level, T, H, group).compile() for level in range(1, LEVELS + 1))
    sizes = tuple(T * bits // 8 * H for bits in BITS)

    @numba.njit(**JIT)
    def read(level, a, b, buffers, at):
        planes = (
            address(buffers, first) + at.block * sizes[0],
            address(buffers, first + 1) + at.block * sizes[1],
            address(buffers, first + 2) + at.block * sizes[2],
        )
        if level == 1:
            one(a.ctypes.data, b.ctypes.data, planes, at.heads)
        elif level == 2:
            two(a.ctypes.data, b.ctypes.data, planes, at.heads)
        elif level > 2:
            three(a.ctypes.data, b.ctypes.data, planes, at.heads)

    return read


@numba.njit(**JIT)
def _nothing(meta, buffers, at):
    """There are no scales."""


def _given(levels: int, group: int) -> Callable:
    @numba.njit(**JIT)
    def level_of(p, top, total, buffers, at):
        return integers_at(buffers, levels)[at.own]

    return level_of


def _by_limits(limits: int, group: int) -> Callable:
    @numba.njit(**JIT)
    def level_of(p, top, total, buffers, at):
        """The number of limits below the largest log-probability of the block, `p / total` at most."""
        known = floats_at(buffers, limits + 1)
        largest = EMPTY
        for g in range(group):
            weight = np.float32(0)
            for t in range(p.shape[1]):
                weight = max(weight, p[g, t])
            seen, other = top[g] + math.log(total[g]), known[at.row_head * group + g]
            most = max(seen, other)
            log_sum = most + math.log(math.exp(seen - most) + math.exp(other - most))
            if weight > 0:
                largest = max(largest, math.log(weight) + top[g] - log_sum)
        level = 0
        rule = floats_at(buffers, limits)
        for i in range(LEVELS):
            if largest > rule[i * at.count + at.own]:
                level += 1
        return level

    return level_of


def _half(e: Emitter, level: int, planes: list, places: list[int]):
    """float32 of what is read of float16: `places`, how far each plane's number is to the right in its word."""
    b, bits, shift = e.b, None, 16
    for word, width, place in zip(planes[:level], BITS, places):
        shift -= width
        move, mask = place - shift, ((1 << width) - 1) << shift
        word = b.lshr(word, e.word(move)) if move > 0 else b.shl(word, e.word(-move)) if move else word
        word = b.and_(word, e.word(mask))
        bits = word if bits is None else b.or_(bits, word)
    if level < LEVELS:  # 1000... in place of the rest
        bits = b.or_(bits, e.word(1 << (shift - 1)))
    return e.half(bits)


@dataclasses.dataclass(frozen=True)
class _Read:
    """What is made of a block's planes, read to one level."""

    level: int
    tokens: int
    channels: int
    queries: int

    def _emit(self, builder: ir.IRBuilder, a, b, first, second, third, heads) -> None:
        raise NotImplementedError

    def compile(self) -> Callable:
        """`function(a, b, planes, heads)` on addresses; `heads`: blocks from a head's to its next."""

        @intrinsic
        def emit(typing, a, b, first, second, third, heads):
            def build(context, builder, signature, args):
                self._emit(builder, *args)
                return context.get_dummy_value()

            return types.void(*[types.int64] * 6), build

        @numba.njit(**JIT)
        def function(a, b, planes, heads):
            emit(a, b, planes[0], planes[1], planes[2], heads)

        return function


class _Scores(_Read):
    """`scores[g, t] = sum over h of q[g, h] * number(t, h)`, tokens on lanes."""

    def _emit(self, builder: ir.IRBuilder, scores, q, first, second, third, heads) -> None:
        T, H = self.tokens, self.channels
        e, planes = Emitter(builder, Numbers("float16", 16, T, H), T // 8), (first, second, third)
        groups = T // e.width
        for queries in in_parts(self.queries, QUERIES):
            together = max(1, registers() // 2 // len(queries))
            for begin in range(0, groups, together):
                tokens = [i * e.width for i in range(begin, min(begin + together, groups))]
                places = e.carried([e.zero()] * (len(queries) * len(tokens)))
                with e.loop(H) as channel:
                    now, held = e.load_all(places), {}

                    def word(plane, cells, token, channel=channel, held=held):
                        key = plane, token % cells
                        if key not in held:
                            row = e.times(channel, 4 * cells)
                            held[key] = e.load(e.words, planes[plane], row, 4 * (token % cells))
                        return held[key]

                    weights = [e.broadcast(q, e.times(channel, 4), 4 * g * H) for g in queries]
                    for n, token in enumerate(tokens):
                        words, shifts = [], []
                        for plane, bits in enumerate(BITS[: self.level]):
                            cells = T * bits // 32
                            words.append(word(plane, cells, token))
                            shifts.append(token // cells * bits)
                        value = _half(e, self.level, words, shifts)
                        for i, weight in enumerate(weights):
                            at = i * len(tokens) + n
                            now[at] = e.multiply_add(weight, value, now[at])
                    e.store_all(now, places)
                for i, x in enumerate(e.load_all(places)):
                    g, n = divmod(i, len(tokens))
                    builder.store(x, e.place(e.floats, scores, 4 * (queries[g] * T + tokens[n])), align=4)


class _Sums(_Read):
    """`acc[g, h] += sum over t of weights[g, t] * number(t, h)`, channels on lanes."""

    def _emit(self, builder: ir.IRBuilder, acc, weights, first, second, third, heads) -> None:
        T, H = self.tokens, self.channels
        e, planes = Emitter(builder, Numbers("float16", 16, T, H), H), (first, second, third)
        cells, fields = T // 8, 8  # of the planes of 4 bits; of 8 bits a field has two rows of words

        def read(cell, channel, prefetch):
            start, words = e.sum(e.times(cell, 4 * H), e.times(channel, 4)), []
            for plane, bits in zip(planes[: self.level], BITS):
                rows = [4 * H * cells * i for i in range(bits // 4)]
                words.append([e.load(e.words, plane, start, row) for row in rows])
                for row in rows if prefetch else ():
                    e.prefetch(plane, start, e.times(heads, T * bits // 8 * H), row)

            def number(field):
                mine = [words[0][field % 2], *(x[0] for x in words[1:])]
                return _half(e, self.level, mine, [field // 2 * 8, field * 4, field * 4])

            return number

        emit_sums(e, H, self.queries, fields, (cells, 1), read, acc, weights)
