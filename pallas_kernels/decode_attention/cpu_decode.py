"""Decoding a few blocks at a time, in the forms that XLA for CPU turns into vector loops."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.decode_attention.formats import Affine, Codebook, Dense, Format, describe

# Of each of a 3-bit cell's four groups of eight codes: right shift of the word it starts in, left shift and mask of the
# next.
_CELL = ([0, 24, 16, 8], [0, 8, 16, 0], [0, 0xFFFFFFFF, 0xFFFFFFFF, 0])


def take(x: Format, layer: jax.Array, start: jax.Array, blocks: int) -> Format:
    """Blocks `start ..` of one layer: leaves `[B, K or 1, n, ...]`; levels `[2**bits]`, ranges `[1, K, 1, 1, H]`."""

    def cut(leaf):
        if leaf is None:
            return None
        # One slice for layer and blocks: `leaf[layer]` alone would be hoisted out of the loop and copy a layer.
        at = (layer, 0, start) + (0,) * (leaf.ndim - 3)
        return jax.lax.dynamic_slice(leaf, at, (1, leaf.shape[1], blocks, *leaf.shape[3:]))[0].swapaxes(1, 2)

    if not isinstance(x, Codebook):
        return jax.tree.map(cut, x)
    per_channel = x.per == "channel"
    scale, zero = (m[layer][None, :, None] if per_channel else cut(m) for m in (x.scale, x.zero))
    slots = {"slot_channel": cut(x.slot_channel), "slot_residual": cut(x.slot_residual)}
    return dataclasses.replace(x, codes=cut(x.codes), levels=x.levels[layer], scale=scale, zero=zero, **slots)


def decode(x: Format, apart: Callable[[Callable[[], jax.Array]], jax.Array]) -> jax.Array:
    """Elements of blocks from `take`, `[B, K, n, T, H]` float32; `apart(make)` is `make()`, stored."""
    if isinstance(x, Dense):
        # Without the barrier JAX 0.12 makes float32 first and then orders it by heads, in two passes over the tile.
        return floats(jax.lax.optimization_barrier(x.values), x.dtype)
    if isinstance(x, Affine):
        return _affine(x, apart)
    if isinstance(x, Codebook):
        return _codebook(x, apart)
    raise NotImplementedError(f"xla_cpu does not read {describe(x)}")


def floats(bits: jax.Array, dtype: str = "float16") -> jax.Array:
    """16-bit patterns as float32."""
    if dtype == "bfloat16":  # the conversion proper is not turned into vector code
        return jax.lax.bitcast_convert_type(bits.astype(jnp.uint32) << jnp.uint32(16), jnp.float32)
    return jax.lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32)


def fields(words: jax.Array, bits: int, apart: Callable) -> jax.Array:
    """Words `[..., W, H]` shifted so that each code stands lowest in its copy: `[..., F, C, H]`, token f * C + c.

    All fields by one broadcast shift: a concatenation of fields becomes scalar code (10 times slower).
    """
    *lead, rows, channels = words.shape
    axes = (1,) * len(lead)
    if bits != 3:
        shift = jnp.arange(32 // bits, dtype=jnp.uint32) * jnp.uint32(bits)
        return words[..., None, :, :] >> shift.reshape(*axes, -1, 1, 1)
    # The 96 bits of a cell as four words of eight codes: each the end of one word and the start of the next.
    words = words.reshape(*lead, 3, rows // 3, channels)
    column = [jnp.asarray(x, jnp.uint32).reshape(*axes, 4, 1, 1) for x in _CELL]

    def as_groups() -> jax.Array:
        first, second, third = (words[..., i : i + 1, :, :] for i in range(3))
        group = jnp.arange(4, dtype=jnp.int32).reshape(*axes, 4, 1, 1)
        low = jnp.where(group < 2, first, jnp.where(group == 2, second, third))
        high = jnp.where(group < 2, second, third)
        return (low >> column[0]) | ((high << column[1]) & column[2])

    groups = apart(as_groups)  # once for the eight codes of each
    shift = jnp.arange(8, dtype=jnp.uint32) * jnp.uint32(3)
    shifted = groups[..., None, :, :] >> shift.reshape(*axes, 1, 8, 1, 1)
    return shifted.reshape(*lead, 32, rows // 3, channels)


def _affine(x: Affine, apart: Callable) -> jax.Array:
    shifted = fields(x.codes, x.bits, apart)
    *lead, F, C, H = shifted.shape
    T = F * C
    code = (shifted & jnp.uint32(2**x.bits - 1)).astype(jnp.int32).astype(jnp.float32)
    scale, zero = (floats(m, x.dtype) for m in (x.scale, x.zero))
    groups = scale.shape[-2]
    if x.along == "tokens":
        code = code.reshape(*lead, groups, T // groups, H)
        scale, zero = (m[..., None, :] for m in (scale, zero))
    else:
        code = code.reshape(*lead, T, groups, H // groups)
        scale, zero = (m.swapaxes(-1, -2)[..., None] for m in (scale, zero))
    return (scale * code + zero).reshape(*lead, T, H)


def _codebook(x: Codebook, apart: Callable) -> jax.Array:
    shifted = fields(x.codes, x.bits, apart)
    *lead, F, C, H = shifted.shape
    value = lookup(shifted, x.levels, x.bits)
    if x.per == "channel":
        scale, zero = (m[..., None, :] for m in (x.scale, x.zero))
    else:
        scale, zero = (floats(m).reshape(*m.shape[:-1], F, C, 1) for m in (x.scale, x.zero))
    value = (scale * value + zero).reshape(*lead, F * C, H)
    # Numbers that XLA cannot count: it makes a counter (iota) of `arange`, which is compared as 64 bits.
    scrambled = jnp.asarray((np.arange(H) ^ 0x55).astype(np.int32)).reshape((1,) * (len(lead) + 1) + (-1,))
    for s in range(x.slots):
        here = (x.slot_channel[..., s, :, None].astype(jnp.int32) ^ jnp.int32(0x55)) == scrambled
        value = jnp.where(here, value + floats(x.slot_residual[..., s, :, None]), value)
    return value


def lookup(shifted: jax.Array, levels: jax.Array, bits: int) -> jax.Array:
    """`levels[code]` by selects, one bit after the other: gathers become scalar loads (2 times slower at 4 bits)."""
    values = [levels[i] for i in range(2**bits)]
    for b in range(bits):
        is_set = (shifted >> jnp.uint32(b)) & jnp.uint32(1) != 0
        values = [jnp.where(is_set, high, low) for low, high in zip(values[::2], values[1::2])]
    return values[0]
