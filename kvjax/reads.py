"""What an aligned read touches: bits needed, and bytes in units of memory.

Attention counts, for each query by itself, what a decode step at its position would read of the sealed blocks:

    elements    of sealed tokens that it sees, once per kv head
    bits        of the planes that it needs of these elements, of metadata and of estimates
    unit bits   the same in whole units of 64 bytes, what a GPU's memory moves at least: where the bits that one channel
                has in a plane are fewer, neighbours share a unit, and one that is needed brings the others, as tokens
                bring those that share their words

Prefill with attention "exact" reads a block once for many queries and is not counted.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

UNIT_BYTES = 64
FIELDS = ("k_elements", "k_bits", "k_unit_bits", "v_elements", "v_bits", "v_unit_bits")


def plane_bits(level: jax.Array, needed: jax.Array, widths: Sequence[int]) -> jax.Array:
    """The sum of widths: `level[..., K, R]` int of channels or tokens, `needed[..., K, R]` elements wanted of each."""
    width = jnp.asarray(widths, jnp.float32)[level]
    return (width * needed).sum((-2, -1))


def unit_bits(level: jax.Array, needed: jax.Array, row_bytes: Sequence[int], together: Sequence[int]) -> jax.Array:
    """Bits moved when channels or tokens are read to their levels, in whole units.

    Args:
      level: `[..., K, R]` int, planes to read of each channel, or of each token.
      needed: `[..., K, R]` booleans.
      row_bytes: of one row of words in each plane; a plane's rows follow each other, head by head, from the start of a
        unit on.
      together: how many of the R share a row in each plane: number r lies in row `r % (R / together)`.
    """
    total = jnp.zeros(level.shape[:-2], jnp.float32)
    for i, (size, shared) in enumerate(zip(row_bytes, together)):
        wanted = ((level > i) & needed).reshape(*level.shape[:-1], shared, -1).any(-2)
        wanted = wanted.astype(jnp.int32).reshape(*level.shape[:-2], -1)
        end = wanted.shape[-1] * size
        start = np.arange(0, end, UNIT_BYTES)
        first, last = start // size, np.minimum(start + UNIT_BYTES - 1, end - 1) // size
        before = jnp.concatenate([jnp.zeros_like(wanted[..., :1]), jnp.cumsum(wanted, -1)], -1)
        touched = before[..., last + 1] > before[..., first]
        total = total + touched.sum(-1).astype(jnp.float32) * (8 * UNIT_BYTES)
    return total


def whole_bits(leaves: Any, skip: int = 0) -> tuple[float, float]:
    """Bits, and bits in whole units, of arrays that are read entirely; `skip` leading axes do not count."""
    sizes = [int(np.prod(leaf.shape[skip:])) * leaf.dtype.itemsize for leaf in jax.tree.leaves(leaves)]
    return 8.0 * sum(sizes), 8.0 * UNIT_BYTES * sum(-(-size // UNIT_BYTES) for size in sizes)


def rows_unit_bits(row: jax.Array, row_bytes: int) -> jax.Array:
    """Bits of the units that row number `row` touches, each row by itself."""
    first = row * row_bytes
    return ((first + row_bytes - 1) // UNIT_BYTES - first // UNIT_BYTES + 1).astype(jnp.float32) * (8 * UNIT_BYTES)
