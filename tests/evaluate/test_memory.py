"""Bytes at a chosen shape are those that a cache of that shape allocates."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from cases import make_policy

from kvjax import decode
from kvjax.cache import CacheShape
from kvjax.codecs import NUQTokenCodec
from kvjax.evaluate.memory import SHAPES, abstract_params, cache_shape, footprint
from kvjax.model.rope import make_rope
from kvjax.policy import Override, preset


@pytest.mark.parametrize("name", ["bf16", "kvquant3", "int4", "kivi2", "asymkv-2-1"])
def test_footprint_is_what_is_allocated(name):
    shape = CacheShape(3, 2, 2, 32, make_rope(32, 4096))
    policy = make_policy(preset(name), 3, 2, 32)
    cache = decode.init_cache(shape, policy, batch=1, capacity=300, dtype=jnp.bfloat16)
    cost = footprint(name, preset(name), shape, 300)
    assert cost.nbytes == decode.nbytes(cache)
    assert cost.bits_per_element == decode.bits_per_element(cache)


def test_fitted_constants_of_several_codecs():
    shape = CacheShape(3, 2, 2, 32, make_rope(32, 4096))
    mixed = dataclasses.replace(
        preset("kvquant3"), overrides=(Override((0, -1), preset("kvquant4").keys, preset("kvquant2").values),)
    )
    costs = [footprint("mixed", mixed, shape, 300)] + [
        footprint(n, preset(n), shape, 300) for n in ("kvquant3", "bf16")
    ]
    widths = [cost.bits_per_element for cost in costs]
    assert widths[0] == pytest.approx(widths[1]) and costs[0].nbytes < costs[2].nbytes  # 4 + 2 is 3 + 3


def test_presets_that_fit_no_other_shape():
    shape = cache_shape("3x2x64")
    for name, message in (
        ("asymkv-16-0", "`quant=asymkv-16-0` sets layer 3, but the model has 3 layers"),
        ("asymkv-auto@2.5", "`quant=asymkv-auto@2.5`: .* measurements on a model"),
    ):
        with pytest.raises(ValueError, match=message):
            footprint(name, preset(name), shape, 1024)


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
