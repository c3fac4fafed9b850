"""Packing: golden words, exact sizes, identity."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import packing


def words(codes, bits):
    packed = packing.pack(np.asarray(codes, np.uint8)[:, None], bits)
    return [int(w) for w in np.asarray(packed)[:, 0]]


@pytest.mark.parametrize(
    ("bits", "codes", "golden"),
    [
        # One cell is plain little-endian packing; the words of KVQuant's released code (spec section 8.2).
        (3, [(7 * j + 3) % 8 for j in range(32)], [0x53977053, 0x70539770, 0x97705397]),
        (4, [(5 * j + 1) % 16 for j in range(8)], [0x4FA50B61]),
        (2, [(3 * j + 1) % 4 for j in range(16)], [0xB1B1B1B1]),
        # By hand: KIVI's vectors.
        (2, [0, 1, 2, 3] * 4, [0xE4E4E4E4]),
        (4, range(8), [0x76543210]),
        (1, [1] + [0] * 30 + [1], [0x80000001]),
        (8, [0x12, 0x34, 0x56, 0x78], [0x78563412]),
    ],
)
def test_golden_words(bits, codes, golden):
    assert words(codes, bits) == golden


def test_token_planes():
    """Field f of cell c is token f * C + c: at 4 bits, 16 tokens are 2 cells and word c holds tokens c, c + 2, ..."""
    assert words(range(16), 4) == [0xECA86420, 0xFDB97531]


def test_three_bit_cells_are_planes_of_the_golden_cell():
    cell = np.array([(7 * j + 3) % 8 for j in range(32)], np.uint8)
    other = cell[::-1].copy()
    interleaved = np.stack([cell, other], 1).reshape(-1)  # token f * 2 + c
    packed = words(interleaved, 3)
    assert packed[0::2] == words(cell, 3) and packed[1::2] == words(other, 3)


@given(
    bits=st.sampled_from(packing.SUPPORTED_BITS),
    tokens=st.sampled_from([32, 128]),
    lead=st.sampled_from([(), (2, 3)]),
    seed=st.integers(0, 2**16),
)
def test_unpack_inverts_pack_in_exactly_the_bits(bits, tokens, lead, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (*lead, tokens, 5)).astype(np.uint8)
    packed = jax.jit(packing.pack, static_argnums=1)(codes, bits)
    assert packed.shape == (*lead, tokens * bits // 32, 5)
    assert packed.nbytes * 8 == codes.size * bits
    np.testing.assert_array_equal(packing.unpack(packed, bits), codes)


def test_errors_say_what_fits():
    with pytest.raises(ValueError, match="multiple of 32"):
        packing.pack(np.zeros((48, 1), np.uint8), 3)
    with pytest.raises(ValueError, match=r"`bits=5`"):
        packing.pack(np.zeros((32, 1), np.uint8), 5)
