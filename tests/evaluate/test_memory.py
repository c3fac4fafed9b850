"""Bytes at a chosen shape are those that a cache of that shape allocates."""

import jax.numpy as jnp
import numpy as np
import pytest
from cases import make_policy

from kvjax import decode
from kvjax.cache import CacheShape
from kvjax.codecs import NUQTokenCodec
from kvjax.evaluate.memory import SHAPES, abstract_params, cache_shape, footprint
from kvjax.model.rope import make_rope
from kvjax.policy import preset


@pytest.mark.parametrize("name", ["bf16", "kvquant3", "int4"])
def test_footprint_is_what_is_allocated(name):
    shape = CacheShape(3, 2, 2, 32, make_rope(32, 4096))
    policy = make_policy(preset(name), 3, 2, 32)
    cache = decode.init_cache(shape, policy, batch=1, capacity=300, dtype=jnp.bfloat16)
    cost = footprint(name, preset(name), shape, 300)
    assert cost.nbytes == decode.nbytes(cache)
    assert cost.bits_per_element == decode.bits_per_element(cache)


def test_kvquant3_at_llama_7b():
    """3 bits, 1 % outliers in slots of 24 bits, and 2 numbers of 16 bits per value token (README, Methods)."""
    cost = footprint("kvquant3", preset("kvquant3"), cache_shape("llama-7b"), 131072)
    assert cost.bits_per_element == pytest.approx(3.379, abs=5e-4)
    sealed = cost.bits_per_element / 8 * 2 * 32 * 32 * 128 * 131072
    assert sealed < cost.nbytes < 1.01 * sealed


def test_shapes():
    assert set(SHAPES) == {"llama-7b", "llama-3-8b", "llama-3-70b"}
    shape = cache_shape("3x2x64")
    assert (shape.layers, shape.kv_heads, shape.head_dim) == (3, 2, 64)
    for wrong in ("llama", "3x2", "0x2x64", "3xx2x64", "-3x2x64", "3x2x64x1", "", "3x2x²"):
        with pytest.raises(ValueError, match=f"`shape={wrong}` must be"):
            cache_shape(wrong)
    with pytest.raises(ValueError, match="even"):
        cache_shape("3x2x33")


def test_abstract_params_are_those_of_calibration():
    shape = CacheShape(3, 2, 2, 32, make_rope(32, 4096))
    for codec in (preset("kvquant3").keys, preset("kvquant3").values):
        policy = make_policy(preset("kvquant3"), 3, 2, 32)
        made = policy.segments[0].k_params if codec.pre_rope else policy.segments[0].v_params
        expected = {name: np.shape(value) for name, value in made.items()}
        assert {name: spec.shape for name, spec in abstract_params(codec, shape).items()} == expected
    assert abstract_params(NUQTokenCodec(bits=3, table="uniform"), shape) is None
