"""Angles as fixed-point fractions of a turn: exact at any position, in 32-bit integers alone.

A float32 product position * inv_freq has 24 bits for all of its turns: at 10^7 radians its unit is 1, so the angle is
lost. Only the fraction of the last turn matters, and integers keep it: with inv_freq / 2 pi as a fraction of 2^48,

    position * inv_freq / (2 pi)  mod 1  =  (position * high + floor(position * low / 2^16)) / 2^32,   high, low:
    inv_freq / (2 pi) = high / 2^32 + low / 2^48,   0 <= low < 2^16,

where the sum and the first product wrap around at 2^32, as int32 does, which is the "mod 1". Rounding to 2^-48 is the
larger error: |position| * 2^-49 turns, 1.1e-7 rad at 10^7 and 2.4e-5 rad at 2^31; the floor adds at most 2^-32 turns.
Negative positions need no care: two's complement is arithmetic modulo 2^32.

Cosine and sine then need no reduction of their argument, which is most of their cost: the two highest bits of the phase
are the quadrant. For 39,063 positions (10^7 tokens in blocks of 256) and 64 frequencies one CPU core takes 5 to 8 ms,
and 65 for float32 products with `jnp.cos` and `jnp.sin`; a v5p by its compiler's count 26 thousand cycles, and 99.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Turns(NamedTuple):
    """Turns per position, modulo 1: high / 2^32 + low / 2^48. Two arrays: slices of one are computations of their own.

    Attributes:
      high: `[H/2]` int32, from -2^31 to 2^31 - 1.
      low: `[H/2]` int32, from 0 to 2^16 - 1.
    """

    high: Any
    low: Any


def from_frequencies(inv_freq: np.ndarray) -> Turns:
    """Fixed-point turns of radians per position `[H/2]` float64."""
    count = np.rint(np.asarray(inv_freq, np.float64) * (2.0**48 / (2 * math.pi))).astype(np.int64)
    return Turns((count >> 16).astype(np.int32), (count & 0xFFFF).astype(np.int32))  # astype drops whole turns


def to_frequencies(turns: Turns) -> np.ndarray:
    """Radians per position `[H/2]` float64, in [0, 2 pi): the inverse of `from_frequencies`. Not for use inside jit."""
    high, low = (np.asarray(word).astype(np.int64) for word in turns)
    return ((high % 2**32 << 16) + low) * (2 * math.pi / 2.0**48)


def phase(turns: Turns, positions: jax.Array) -> jax.Array:
    """position * inv_freq as a signed fraction of a turn, in units of 2^-32 turn.

    Args:
      turns: of `[H/2]` frequencies.
      positions: `[...]` int32; negative ones too.

    Returns:
      `[..., H/2]` int32.
    """
    high, low = (jnp.asarray(word).reshape((1,) * positions.ndim + (-1,)) for word in turns)
    positions = positions[..., None]
    # position * low takes 48 bits, so 16 bits of the position at a time; the shift sees 32 unsigned bits.
    fraction = (positions >> 16) * low + ((((positions & 0xFFFF) * low) >> 16) & 0xFFFF)
    return positions * high + fraction


def cos_sin(phase: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, float32 within 2e-7, of angles `[...]` int32 in units of 2^-32 turn."""
    quarters = (phase + 2**29) >> 30  # to the nearest; -2 and 2 are the same
    angle = (phase - (quarters << 30)).astype(jnp.float32) * np.float32(2 * math.pi / 2**32)  # within +-pi/4
    # Taylor: what follows is below 2.5e-8 there, less than half a float32 unit of the result.
    square = angle * angle
    cos = _polynomial(square, [(-1) ** n / math.factorial(2 * n) for n in range(5)])
    sin = angle * _polynomial(square, [(-1) ** n / math.factorial(2 * n + 1) for n in range(5)])
    odd = (quarters & 1) == 1
    cos, sin = jnp.where(odd, sin, cos), jnp.where(odd, cos, sin)
    # A quarter takes (cos, sin) to (-sin, cos): the cosine is negated after 1 and 2, the sine after 2 and 3.
    return jnp.where((quarters + 1) & 2 == 2, -cos, cos), jnp.where(quarters & 2 == 2, -sin, sin)


def _polynomial(x: jax.Array, coefficients: list[float]) -> jax.Array:
    """sum of coefficients[n] * x^n, by Horner's rule."""
    value = jnp.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value = value * x + np.float32(coefficient)
    return value
