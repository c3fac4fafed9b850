"""Codes of 1, 2, 3, 4 or 8 bits in 32-bit words, packed along tokens.

The canonical layout of every codec. A *cell* is the smallest run of whole words that holds whole codes: one word of
`32 / bits` codes, or, at 3 bits, three words of 32 codes (a 96-bit little-endian string in which code j takes bits
3j to 3j+2, so codes 10 and 21 straddle words). A block of T tokens has `C = T / codes_per_cell` cells, and

    field f of cell c  is token  f * C + c,        word i of cell c  is row  i * C + c.

Field f of all cells is then a contiguous run of tokens, so unpacking is shifts and masks on whole rows and a stack
along the leading axis: no shuffle on any backend (kernels-guide: "token planes"). With one cell (T = codes_per_cell)
this is plain little-endian packing, as in the released KVQuant code.
"""

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
    cells = tokens // fields
    planes = codes.astype(jnp.uint32).reshape(*lead, fields, cells, channels)
    words: list[jax.Array | None] = [None] * (rows // cells)

    def put(word: int, value: jax.Array) -> None:
        old = words[word]
        words[word] = value if old is None else old | value

    for field in range(fields):
        word, offset = divmod(field * bits, 32)
        plane = planes[..., field, :, :]
        put(word, plane << jnp.uint32(offset))
        if offset + bits > 32:  # 3 bits: the code's high bits open the next word
            put(word + 1, plane >> jnp.uint32(32 - offset))
    return jnp.stack([w for w in words if w is not None], axis=-3).reshape(*lead, rows, channels)


def unpack(words: jax.Array, bits: int) -> jax.Array:
    """Inverse of `pack`: `words[..., W, H]` uint32 to codes `[..., 32 * W / bits, H]` uint8."""
    *lead, rows, channels = words.shape
    fields = codes_per_cell(bits)
    words_per_cell = fields * bits // 32
    cells = rows // words_per_cell
    planes = words.reshape(*lead, words_per_cell, cells, channels)
    mask = jnp.uint32((1 << bits) - 1)
    codes = []
    for field in range(fields):
        word, offset = divmod(field * bits, 32)
        code = planes[..., word, :, :] >> jnp.uint32(offset)
        if offset + bits > 32:
            code = code | (planes[..., word + 1, :, :] << jnp.uint32(32 - offset))
        codes.append((code & mask).astype(jnp.uint8))
    return jnp.stack(codes, axis=-3).reshape(*lead, fields * cells, channels)
