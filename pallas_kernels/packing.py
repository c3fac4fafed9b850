"""Codes of 1, 2, 3, 4 or 8 bits in 32-bit words, packed along tokens.

The canonical layout of every codec. A *cell* is the smallest run of whole words that holds whole codes: one word of
`32 / bits` codes, or, at 3 bits, three words of 32 codes (a 96-bit little-endian string in which code j takes bits
3j to 3j+2, so codes 10 and 21 straddle words). A block of T tokens has `C = T / codes_per_cell` cells, and

    field f of cell c  is token  f * C + c,        word i of cell c  is row  i * C + c.

Field f of all cells is then a contiguous run of tokens, so unpacking is shifts and masks on whole rows and a stack
along the leading axis: no shuffle on any backend (kernels-guide: "token planes"). With one cell (T = codes_per_cell)
this is plain little-endian packing, as in the released KVQuant code.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp

SUPPORTED_BITS = (1, 2, 3, 4, 8)


def codes_per_cell(bits: int) -> int:
    """Codes in the smallest run of whole words: 32 at 3 bits, 32/bits otherwise."""
    if bits not in SUPPORTED_BITS:
        raise ValueError(f"`bits={bits}` cannot be packed; use one of {SUPPORTED_BITS}.")
    return 32 if bits == 3 else 32 // bits


def packed_words(tokens: int, bits: int) -> int:
    """Words that `tokens` codes of one channel take: exactly `tokens * bits / 32`."""
    if tokens % codes_per_cell(bits):
        raise ValueError(
            f"`tokens={tokens}` must be a multiple of {codes_per_cell(bits)} to pack {bits}-bit codes; pad the block."
        )
    return tokens * bits // 32


def pack(codes: jax.Array, bits: int) -> jax.Array:
    """Packs `codes[..., T, H]` (unsigned, below 2**bits) into `[..., T * bits / 32, H]` uint32 words."""
    *lead, tokens, channels = codes.shape
    rows = packed_words(tokens, bits)
    fields = codes_per_cell(bits)
    planes = codes.astype(jnp.uint32).reshape(*lead, fields, tokens // fields, channels)
    words = []
    for whole, straddling in _layout(bits):
        first, last, offset = whole
        shifts = _column(range(offset, offset + bits * (last - first), bits), planes.ndim)
        # Fields are disjoint bits: their sum is their union.
        word = (planes[..., first:last, :, :] << shifts).sum(-3, dtype=jnp.uint32)
        for field, shift in straddling:
            word = word | _shift(planes[..., field, :, :], shift)
        words.append(word)
    return jnp.stack(words, axis=-3).reshape(*lead, rows, channels)


def unpack(words: jax.Array, bits: int) -> jax.Array:
    """Inverse of `pack`: `words[..., W, H]` uint32 to codes `[..., 32 * W / bits, H]` uint8."""
    *lead, rows, channels = words.shape
    fields = codes_per_cell(bits)
    words_per_cell = fields * bits // 32
    cells = rows // words_per_cell
    planes = words.reshape(*lead, words_per_cell, 1, cells, channels)
    pieces: dict[int, jax.Array] = {}
    for i, (whole, straddling) in enumerate(_layout(bits)):
        word = planes[..., i, :, :, :]
        first, last, offset = whole
        pieces[first] = word >> _column(range(offset, offset + bits * (last - first), bits), word.ndim)
        for field, shift in straddling:
            part = _shift(word, -shift)
            pieces[field] = pieces[field] | part if field in pieces else part
    codes = jnp.concatenate([pieces[field] for field in sorted(pieces)], axis=-3)
    return (codes & jnp.uint32((1 << bits) - 1)).astype(jnp.uint8).reshape(*lead, fields * cells, channels)


def token_mask(kept: jax.Array, tokens: int, bits: int) -> jax.Array:
    """Words `[..., 1, tokens * bits / 32, 1]` in which the bits of tokens below `kept[...]` are set."""
    token = jax.lax.broadcasted_iota(jnp.int32, (1,) * kept.ndim + (1, tokens, 1), kept.ndim + 1)
    chosen = token < kept[..., None, None, None]
    return pack(jnp.where(chosen, jnp.uint8(2**bits - 1), jnp.uint8(0)), bits)


def _layout(bits: int) -> list[tuple[tuple[int, int, int], list[tuple[int, int]]]]:
    """Per word of a cell: (first field, one past the last, bit of the first) of the fields wholly inside, and the
    straddling ones as (field, left shift), negative where their high bits go to the bottom of the word."""
    if bits != 3:
        return [((0, 32 // bits, 0), [])]
    return [((0, 10, 0), [(10, 30)]), ((11, 21, 1), [(10, -2), (21, 31)]), ((22, 32, 2), [(21, -1)])]


def _shift(x: jax.Array, left: int) -> jax.Array:
    return x << jnp.uint32(left) if left >= 0 else x >> jnp.uint32(-left)


def _column(values: range, ndim: int) -> jax.Array:
    """`values` along axis -3."""
    return jnp.asarray(list(values), jnp.uint32).reshape((1,) * (ndim - 3) + (-1, 1, 1))


def tpu_block_tokens(bits: Iterable[int | None]) -> int:
    """Tokens per block that suit a TPU: 128; 256 with 3-bit codes: the 12 rows of words of 128 tokens fill no tile."""
    return 256 if 3 in bits else 128
