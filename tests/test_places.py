"""Blocks of storage are read and written where they stand, in tiles too, as for TPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax import places


@pytest.mark.parametrize("target", ["tpu:v5e", "reference"])
def test_a_block_is_read_and_written(target):
    """8-bit slots of 2 layers, 2 rows, 64 blocks, 2 heads, 1 slot a token."""
    rng = np.random.default_rng(0)
    storage = rng.integers(0, 256, (2, 2, 64, 2, 1, 32), np.uint8)
    assert places.in_tiles(jnp.asarray(storage), target) == (target != "reference")
    read = jax.jit(lambda x, *at: places.read(x, *at, target))
    write = jax.jit(lambda x, new, *at: places.write(x, new, *at, target))
    for at in ((0, 0, 0), (1, 0, 31), (0, 1, 32), (1, 1, 63)):
        np.testing.assert_array_equal(read(storage, *at)[0, 0], storage[at])
        new = rng.integers(0, 256, (1, 1, 2, 1, 32), np.uint8)
        expected = storage.copy()
        expected[at] = new[0, 0]
        np.testing.assert_array_equal(write(storage, new, *at), expected)


@pytest.mark.parametrize(
    "shape, dtype, tiles",
    [
        ((2, 1, 64, 1, 2, 256), jnp.uint8, True),
        ((2, 1, 64, 2, 2, 256), jnp.uint8, True),
        ((2, 1, 64, 4, 2, 256), jnp.uint8, False),  # heads fill words
        ((2, 1, 65, 1, 2, 256), jnp.uint8, False),
        ((2, 1, 64, 1, 2, 256), jnp.uint16, False),
        ((2, 1, 64, 1, 256), jnp.uint8, False),
    ],
)
def test_which_arrays_stand_in_tiles(shape, dtype, tiles):
    x = jax.ShapeDtypeStruct(shape, dtype)
    assert places.in_tiles(x, "tpu:v5p") == tiles
    assert not places.in_tiles(x, "gpu:sm_90")
