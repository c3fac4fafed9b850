"""Softmax over the scores of one block, with running maxima and sums."""

import math

import numba
import numpy as np

from pallas_kernels.decode_attention.numba_constants import float_of, shifted_left
from pallas_kernels.native_cpu import JIT

EMPTY = np.float32(-1e30)  # as the reference has it
LOG2_E = np.float32(math.log2(math.e))
# 2**f = sum of c_i f**i for |f| <= 1/2: Taylor's, off by at most 6e-9.
C1, C2, C3, C4, C5, C6, C7 = (np.float32(math.log(2) ** i / math.factorial(i)) for i in range(1, 8))


@numba.njit(inline="always", **JIT)
def exp(x):
    """exp(x) for x <= 0, to 1e-6 or so; 0 below -87. A library's would not become vector code."""
    y = max(x * LOG2_E, np.float32(-127))
    n = np.int32(y - np.float32(0.5))  # towards 0: the nearest, for y <= 0
    f = y - np.float32(n)
    p = ((((((C7 * f + C6) * f + C5) * f + C4) * f + C3) * f + C2) * f + C1) * f + np.float32(1)
    return p * float_of(shifted_left(n + 127, 23))


@numba.njit(**JIT | {"fastmath": JIT["fastmath"] | {"nnan"}})
def largest(row, least):
    """Of `row` and `least`; NaN are passed over, which LLVM needs to know for vector code."""
    for i in range(row.size):
        least = max(least, row[i])
    return least


@numba.njit(**JIT)
def soften(scores, first, last, top, total, acc):
    """Turns `scores[g, t]` of a block into exp(score - max), 0 outside of `first <= t < last`.

    `top`, `total` and `acc`, of the tokens before, follow the new maximum.
    """
    queries, tokens = scores.shape
    start, end = max(first, 0), min(last, tokens)
    for g in range(queries):
        row, out = scores[g, start:end], acc[g]
        most = largest(row, top[g])
        fade, added = exp(top[g] - most), np.float32(0)
        for i in range(row.size):
            row[i] = exp(row[i] - most)
        for i in range(row.size):
            added += row[i]
        for t in range(start):
            scores[g, t] = 0
        for t in range(end, tokens):
            scores[g, t] = 0
        top[g], total[g] = most, total[g] * fade + added
        if fade != 1:
            for h in range(out.size):
                out[h] *= fade
