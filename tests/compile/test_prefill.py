"""Prefill compiled from abstract arrays: what it needs beside the cache does not grow with the cache."""

import jax
import jax.numpy as jnp
import pytest

from kvjax import decode
from kvjax.evaluate.memory import abstract_cache, abstract_model
from kvjax.model import cached
from kvjax.model.config import ModelConfig
from kvjax.policy import preset
from pallas_kernels import deviceless

CONTEXT = 1 << 22
CONFIG = ModelConfig(layers=2, width=128, mlp_width=128, q_heads=4, kv_heads=4, head_dim=128, vocab=128)


@pytest.mark.parametrize("prefill", [cached.prefill_exact, cached.prefill_cached])
def test_prefill_on_tpu_copies_no_part_of_the_cache(on, prefill):
    """XLA copied slots and scales to other layouts and back: 355 ("exact") and 350 MB for this cache of 2.6 GB."""
    model = abstract_model(CONFIG, CONTEXT, jnp.bfloat16)
    shape = decode.CacheShape(CONFIG.layers, CONFIG.q_heads, CONFIG.kv_heads, CONFIG.head_dim, model.rope)
    cache = abstract_cache("kvquant2", preset("kvquant2"), shape, CONTEXT, target="tpu:v5e")
    tokens, row = jax.ShapeDtypeStruct((1, 64), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    compiled = deviceless.compile(prefill, (model, cache, tokens, row), on("v5e"))
    assert compiled.memory.alias >= decode.nbytes(cache)
    assert compiled.memory.temporary < cache.segments[0].k.slot_channel.size  # bytes: a fortieth of the cache
