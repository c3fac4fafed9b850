"""Products of a few queries with decoded rows of keys and values, four queries and two or four rows at a time.

So that a row is loaded once for four queries, and a query once for two rows: the sums fill half of the 32 vector
registers that there are.
"""

import functools
from collections.abc import Callable

import numba
import numpy as np

from pallas_kernels.native_cpu import JIT

QUERIES, KEYS, VALUES = 4, 2, 4  # at a time


def products(group: int, channels: int, key_rows: int, value_rows: int, turns: bool) -> tuple[Callable, Callable]:
    """`multiply` and `add`.

    Args:
      group: queries per head; any number, best a multiple of 4.
      key_rows, value_rows: of a tile.
      turns: whether `multiply` turns keys by the angles of their tokens.
    """
    multiply = _multiply_turned(group, channels, key_rows) if turns else _multiply(group, channels, key_rows)
    return multiply, _add(group, channels, value_rows)


@functools.cache
def _multiply(group: int, channels: int, rows: int) -> Callable:
    H, whole = channels, group - group % QUERIES

    @numba.njit(**JIT)
    def multiply(scores, token, step, q, tile, angles):
        """`scores[g, token + r * step] = q[g] . tile[r]`."""
        for r in range(0, rows, KEYS):
            t0, t1, row0, row1 = token + r * step, token + (r + 1) * step, tile[r], tile[r + 1]
            for g in range(0, whole, QUERIES):
                q0, q1, q2, q3 = q[g], q[g + 1], q[g + 2], q[g + 3]
                a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = np.float32(0)
                for h in range(H):
                    x, y = row0[h], row1[h]
                    a0, b0 = a0 + q0[h] * x, b0 + q0[h] * y
                    a1, b1 = a1 + q1[h] * x, b1 + q1[h] * y
                    a2, b2 = a2 + q2[h] * x, b2 + q2[h] * y
                    a3, b3 = a3 + q3[h] * x, b3 + q3[h] * y
                scores[g, t0], scores[g + 1, t0], scores[g + 2, t0], scores[g + 3, t0] = a0, a1, a2, a3
                scores[g, t1], scores[g + 1, t1], scores[g + 2, t1], scores[g + 3, t1] = b0, b1, b2, b3
            for g in range(whole, group):
                q0 = q[g]
                a0 = b0 = np.float32(0)
                for h in range(H):
                    a0, b0 = a0 + q0[h] * row0[h], b0 + q0[h] * row1[h]
                scores[g, t0], scores[g, t1] = a0, b0

    return multiply


@functools.cache
def _multiply_turned(group: int, channels: int, rows: int) -> Callable:
    half, whole = channels // 2, group - group % QUERIES

    @numba.njit(**JIT)
    def turned(low, high, cos, sin, h):
        return low[h] * cos[h] - high[h] * sin[h], high[h] * cos[h] + low[h] * sin[h]

    @numba.njit(**JIT)
    def multiply_turned(scores, token, step, q, tile, angles):
        """As `multiply`, of rows turned by the angles of their tokens, `[T, H]` cos and sin side by side."""
        for r in range(0, rows, KEYS):
            t0, t1 = token + r * step, token + (r + 1) * step
            low0, high0, cos0, sin0 = tile[r, :half], tile[r, half:], angles[t0, :half], angles[t0, half:]
            low1, high1, cos1, sin1 = tile[r + 1, :half], tile[r + 1, half:], angles[t1, :half], angles[t1, half:]
            for g in range(0, whole, QUERIES):
                q0, q1, q2, q3 = q[g, :half], q[g + 1, :half], q[g + 2, :half], q[g + 3, :half]
                p0, p1, p2, p3 = q[g, half:], q[g + 1, half:], q[g + 2, half:], q[g + 3, half:]
                a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = np.float32(0)
                for h in range(half):
                    w, x = turned(low0, high0, cos0, sin0, h)
                    y, z = turned(low1, high1, cos1, sin1, h)
                    a0, b0 = a0 + (q0[h] * w + p0[h] * x), b0 + (q0[h] * y + p0[h] * z)
                    a1, b1 = a1 + (q1[h] * w + p1[h] * x), b1 + (q1[h] * y + p1[h] * z)
                    a2, b2 = a2 + (q2[h] * w + p2[h] * x), b2 + (q2[h] * y + p2[h] * z)
                    a3, b3 = a3 + (q3[h] * w + p3[h] * x), b3 + (q3[h] * y + p3[h] * z)
                scores[g, t0], scores[g + 1, t0], scores[g + 2, t0], scores[g + 3, t0] = a0, a1, a2, a3
                scores[g, t1], scores[g + 1, t1], scores[g + 2, t1], scores[g + 3, t1] = b0, b1, b2, b3
            for g in range(whole, group):
                q0, p0 = q[g, :half], q[g, half:]
                a0 = b0 = np.float32(0)
                for h in range(half):
                    w, x = turned(low0, high0, cos0, sin0, h)
                    y, z = turned(low1, high1, cos1, sin1, h)
                    a0, b0 = a0 + (q0[h] * w + p0[h] * x), b0 + (q0[h] * y + p0[h] * z)
                scores[g, t0], scores[g, t1] = a0, b0

    return multiply_turned


@functools.cache
def _add(group: int, channels: int, rows: int) -> Callable:
    H, whole = channels, group - group % QUERIES

    @numba.njit(**JIT)
    def add(acc, p, token, step, tile):
        """`acc[g] += sum over r of p[g, token + r * step] * tile[r]`."""
        for r in range(0, rows, VALUES):
            t0, t1, t2, t3 = token + r * step, token + (r + 1) * step, token + (r + 2) * step, token + (r + 3) * step
            row0, row1, row2, row3 = tile[r], tile[r + 1], tile[r + 2], tile[r + 3]
            for g in range(0, whole, QUERIES):
                out0, out1, out2, out3 = acc[g], acc[g + 1], acc[g + 2], acc[g + 3]
                a0, a1, a2, a3 = p[g, t0], p[g, t1], p[g, t2], p[g, t3]
                b0, b1, b2, b3 = p[g + 1, t0], p[g + 1, t1], p[g + 1, t2], p[g + 1, t3]
                c0, c1, c2, c3 = p[g + 2, t0], p[g + 2, t1], p[g + 2, t2], p[g + 2, t3]
                d0, d1, d2, d3 = p[g + 3, t0], p[g + 3, t1], p[g + 3, t2], p[g + 3, t3]
                for h in range(H):
                    w, x, y, z = row0[h], row1[h], row2[h], row3[h]
                    out0[h] += a0 * w + a1 * x + a2 * y + a3 * z
                    out1[h] += b0 * w + b1 * x + b2 * y + b3 * z
                    out2[h] += c0 * w + c1 * x + c2 * y + c3 * z
                    out3[h] += d0 * w + d1 * x + d2 * y + d3 * z
            for g in range(whole, group):
                out0, a0, a1, a2, a3 = acc[g], p[g, t0], p[g, t1], p[g, t2], p[g, t3]
                for h in range(H):
                    out0[h] += a0 * row0[h] + a1 * row1[h] + a2 * row2[h] + a3 * row3[h]

    return add
