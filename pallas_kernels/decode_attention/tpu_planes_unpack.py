"""Bit planes to bfloat16 tiles for the matrix unit, by integer operations (Mosaic TPU has no float16).

Words lie along tokens, `[T * b / 32, H]`, channels on lanes. A lane of a first-plane word holds four tokens; its bytes
0 and 2, or 1 and 3, sit in the two halves of the word, and so do the nibbles of the same tokens in the other planes.
One operation on a word therefore works on two values, and a finished pair of bfloat16 is two rows of a tile. Tokens
come out in the order of `token_order`: the same for keys and values, which is all that attention asks for.

A float16 of which 12 bits are read, and the rest filled, is a bfloat16: 6 bits of mantissa and the 1 of the filling.
With all 16 it is a sum of several, each exact, and deepens the product. Exponent 31 is taken for a number like the
others, not as an infinity or NaN.

Exponent 0. Rebiased by an addition like all others, a subnormal m * 2^-24 becomes y = 2^-15 (1 + m/1024). The least of
y and 2y - 2^-14 is right for it, and is y for all others: so on chips that have bfloat16 arithmetic. v5 does not, and
float32 would take the two values of a word one by one. There integers raise exponent 0 to 1, and a second term takes
off the 2^-14 that this adds; the matrix units have the time. All terms are 2^15 times as large: what is taken off is
a single bit, that of 2.0.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

_REBIAS = 127 - 15
_SMALLEST = 2.0**-14  # normal float16
_SCALE_BITS = 15


def scale(bf16: bool) -> float:
    """How many times as large as what is stored `tiles` are: a power of 2."""
    return 1.0 if bf16 else 2.0**_SCALE_BITS


def token_order(position: jax.Array, tokens: int) -> jax.Array:
    """Token of the block at each position in a tile (int32, `tokens` a power of 2)."""
    quarter = tokens // 4
    row, half_row = position & (quarter - 1), (position & (quarter - 1)) >> 1
    # A piece, a quarter of the tile, is 2 * pair of bytes + half of the rows.
    half_of_rows = (position >> (quarter.bit_length() - 1)) & 1
    return ((position & (2 * quarter)) >> 1) + half_of_rows * (quarter // 2) + half_row + (row & 1) * (tokens // 2)


def tiles(planes: list[jax.Array], level: int, bf16: bool) -> list[jax.Array]:
    """Terms `[T, H]` bfloat16 whose sum is `scale` times the block read at `level` (1 to 3).

    Args:
      planes: the first `level` planes, uint32 `[T * b / 32, H]`.
      bf16: the chip has bfloat16 vector arithmetic.
    """
    rows = planes[0].shape[0] // 2
    pieces = []
    for piece in range(4):  # 2 * pair of bytes + half of the rows
        first = planes[0][piece % 2 * rows : (piece % 2 + 1) * rows]
        pieces.append(_piece([first, *planes[1:]], piece, level, bf16))
    return [jnp.concatenate([_pair(x) for x in part], axis=0) for part in zip(*pieces)]


def _piece(planes: list[jax.Array], piece: int, level: int, bf16: bool) -> list[jax.Array]:
    """Pairs of bfloat16, uint32 `[T / 8, H]`: rows of four tokens' words of which nibble `piece` is next."""
    first, *rest = planes
    if piece < 2:
        magnitude, sign = first << _u(5), first << _u(8)
    else:
        magnitude, sign = first >> _u(3), first
    magnitude, sign = magnitude & _both(0x0FE0), sign & _both(0x8000)
    if level > 1:
        magnitude = magnitude | (_shift(rest[0], 1 - 4 * piece) & _both(0x001E))
    filled = {1: 16, 2: 1, 3: 0}[level]
    if not bf16:
        return _integer_terms(magnitude | sign, filled, rest[1:], piece)
    bits = magnitude + _both(_REBIAS << 7 | filled)
    upper = [_pairs(_subnormal(_pair(bits))) | sign]
    return upper if level < 3 else [*upper, _last_bits(bits, rest[1], piece) | sign]


def _integer_terms(x: jax.Array, filled: int, last: list[jax.Array], piece: int) -> list[jax.Array]:
    """Terms made by integer operations alone, from sign, exponent and 6 bits of mantissa in a bfloat16's place.

    Args:
      filled: in place of what is not read.
      last: the last plane, where it is read. Its first bit is the seventh of the first term's mantissa; the others are
        the difference of two numbers of that term's exponent, times 2^-7.
    """
    if last:
        x = x | (_shift(last[0], -3 - 4 * piece) & _both(1))
    # The opposite sign, and 2.0 where the exponent is 0: bit 14 stays where no more than a mantissa is subtracted.
    less = (_both(0xC07F) - x) & _both(0xC000)
    upper = x + _both((_REBIAS + _SCALE_BITS) << 7 | filled) + ((less >> _u(7)) & _both(0x0080))
    if not last:
        return [upper, less]
    one = (upper & _both(0xFF80)) - _both(7 << 7)
    return [upper, less, one | (_shift(last[0], 4 - 4 * piece) & _both(0x0070)), one ^ _both(0x8000)]


def _last_bits(bits: jax.Array, last: jax.Array, piece: int) -> jax.Array:
    """Pairs of `last * 2^(e - 25)`: the difference of two numbers of exponent e, times 2^-6."""
    one = jnp.maximum(_pair(bits & _both(0x7F80)), jnp.asarray(_SMALLEST, jnp.bfloat16))
    one = _pairs(one) - _both(6 << 7)
    more = one | (_shift(last, 3 - 4 * piece) & _both(0x0078))
    return _pairs(_pair(more) - _pair(one))


def _subnormal(x: jax.Array) -> jax.Array:
    """Magnitudes whose exponent 0 was rebiased like the others (see the module)."""
    return jnp.minimum(x, x + x - jnp.asarray(_SMALLEST, x.dtype))


def _pair(bits: jax.Array) -> jax.Array:
    """uint32 `[R, H]` as bfloat16 `[2 R, H]`, and back."""
    return pltpu.bitcast(bits, jnp.bfloat16)


def _pairs(x: jax.Array) -> jax.Array:
    return pltpu.bitcast(x, jnp.uint32)


def _shift(x: jax.Array, left: int) -> jax.Array:
    return x << _u(left) if left > 0 else x >> _u(-left)


def _both(x: int) -> jax.Array:
    """The same in both halves of a word."""
    return _u(x << 16 | x)


def _u(x: int) -> jax.Array:
    return jnp.uint32(x)
