"""Packed codes to bfloat16 matrix operands with integer operations only, and the order of tokens that this gives.

A word holds fields of two halves of 16 bits, and a half is a bfloat16: moved to the top of the mantissa under the
exponent of 1, a code of b <= 4 bits reads as `1 + code / 2**b`, exactly. One shift, and, or thus make 2048 operands
of 1024 words, on every generation, with or without bfloat16 arithmetic. The constant part is taken off the products.
Codes of 8 bits are two planes of 4.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention.tpu_plan import SUBLANES

MANTISSA = 7
ONE = 0x3F803F80  # 1.0 in both halves


def plane_bits(bits: int) -> int:
    return min(bits, 4)


def plane_weights(bits: int) -> tuple[float, ...]:
    """What each plane counts for, the low one first."""
    return (1.0, 16.0) if bits == 8 else (1.0,)


def step(bits: int) -> float:
    """Codes per unit of an operand: `code - middle = step * sum(weight * (plane - CENTER))`."""
    return float(1 << plane_bits(bits))


def middle(bits: int) -> float:
    """The middle of the codes, around which they are centred so that what is rounded is small."""
    return ((1 << bits) - 1) / 2


def offset(bits: int) -> float:
    """Sum over planes of weight times the operand of the middle code; exact in bfloat16."""
    return sum(plane_weights(bits)) * (1.5 - 0.5 / step(bits))


def operands(words: jax.Array, bits: int) -> list[jax.Array]:
    """The planes `[blocks * T, H]` bfloat16 of `words[blocks, W, H]` uint32, tokens in `order`."""
    blocks, rows, channels = words.shape
    together = _blocks_together(blocks, rows)
    planes = []
    for plane in range(len(plane_weights(bits))):
        pieces = []
        for i in range(0, blocks, together):
            word = words[i : i + together].reshape(together * rows, channels)
            pieces += [_operand(word, at + 4 * plane, plane_bits(bits)) for at in range(0, 16, bits)]
        planes.append(jnp.concatenate(pieces, axis=0))
    return planes


def order(blocks: int, tokens: int, bits: int) -> np.ndarray:
    """The token at each position of `operands` of a run."""
    rows = tokens * bits // 32
    together = _blocks_together(blocks, rows)
    fields = 16 // bits
    run, field, block, row, half = np.meshgrid(
        *(np.arange(n) for n in (blocks // together, fields, together, rows, 2)), indexing="ij"
    )
    return ((run * together + block) * tokens + (field + half * fields) * rows + row).ravel()


def _blocks_together(blocks: int, rows: int) -> int:
    """Blocks whose words fill whole sublanes."""
    return min(blocks, max(1, SUBLANES // rows))


def _operand(words: jax.Array, at: int, bits: int) -> jax.Array:
    """The codes at bit `at` of both halves of `words[W, H]`, `[2 * W, H]` bfloat16: `1 + code / 2**bits`."""
    right = at - (MANTISSA - bits)
    mask = ((1 << bits) - 1) << (MANTISSA - bits)
    words = words >> jnp.uint32(right) if right >= 0 else words << jnp.uint32(-right)
    return pltpu.bitcast((words & jnp.uint32(mask * 0x10001)) | jnp.uint32(ONE), jnp.bfloat16)
