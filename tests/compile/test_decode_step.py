"""Whole decode steps compiled from abstract arrays: Llama-3-8B's 32 layers for one v5p chip and one H100, and on TPUs
those of models with heads of 64 and 96 channels (the shapes of Llama-3.2-1B and Phi-3-mini)."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from kvjax import decode
from kvjax.evaluate.memory import abstract_cache
from kvjax.model import cached
from kvjax.model.config import ModelConfig
from kvjax.model.llama import LoadedModel, weight_shapes
from kvjax.model.rope import make_rope
from kvjax.policy import preset
from pallas_kernels import deviceless

CONTEXT = 131072
CONFIG = ModelConfig(layers=32, width=4096, mlp_width=14336, q_heads=32, kv_heads=8, head_dim=128, vocab=128256)
TARGETS = {"v5p": "tpu:v5p", "h100": "gpu:sm_90"}
# One preset of each kind of storage, and two segments; all that a preset adds to these is other bits.
PRESETS = ("bf16", "int4", "kivi2", "kvquant3", "asymkv-16-0", "alignedkv-budget")


SMALL_HEADS = {
    64: ModelConfig(layers=16, width=2048, mlp_width=8192, q_heads=32, kv_heads=8, head_dim=64, vocab=128256),
    96: ModelConfig(layers=8, width=3072, mlp_width=8192, q_heads=32, kv_heads=32, head_dim=96, vocab=32064),
}


@functools.cache
def model_and_cache(name, target, config=CONFIG):
    weights = {n: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for n, shape in weight_shapes(config).items()}
    model = LoadedModel(weights, make_rope(config.head_dim, CONTEXT), config)
    shape = decode.CacheShape(config.layers, config.q_heads, config.kv_heads, config.head_dim, model.rope)
    return model, abstract_cache(name, preset(name), shape, CONTEXT, target=target)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("chip", TARGETS)
def test_a_decode_step_reads_the_packed_cache_and_nothing_else(on, chip, name):
    target = on(chip)
    model, cache = model_and_cache(name, TARGETS[chip])
    try:
        decode.explain(cache, strict=True)
    except NotImplementedError as reason:
        pytest.skip(str(reason))
    token = jax.ShapeDtypeStruct((1,), jnp.int32)
    compiled = deviceless.compile(cached.step, (model, cache, token, token), target)
    assert compiled.memory.alias >= decode.nbytes(cache)  # updated in place, all of it
    # A layer's keys of this context in bf16 are 268 MB; what remains are recent tokens of 32 layers and activations.
    layer_keys = CONTEXT * CONFIG.kv_heads * CONFIG.head_dim * 2
    assert compiled.memory.temporary < layer_keys / 8
    assert largest_copy(compiled.text) < layer_keys / 8
    kernels = len(cache.segments)
    assert compiled.text.count(CALL[target.platform]) >= kernels


@pytest.mark.parametrize(
    ("chip", "name", "head_dim"),
    [("v5p", "int4", 64), ("v6e", "kvquant3", 64), ("v5e", "kivi4", 96)],
)
def test_heads_that_do_not_fill_a_register_are_read_as_packed(on, chip, name, head_dim):
    """As they stood, XLA copied the codes on every step: 2 GB at 4 bits for 16 layers of 8 heads of 64."""
    target = on(chip)
    model, cache = model_and_cache(name, f"tpu:{chip}", SMALL_HEADS[head_dim])
    decode.explain(cache, strict=True)
    token = jax.ShapeDtypeStruct((1,), jnp.int32)
    compiled = deviceless.compile(cached.step, (model, cache, token, token), target)
    assert compiled.memory.alias >= decode.nbytes(cache)
    # The ring, of keys and of values, is copied to another layout and back.
    assert compiled.memory.temporary < 8 * cache.segments[0].k_recent.size
    assert largest_copy(compiled.text) <= 2 * cache.segments[0].k_recent.size
    assert len(compiled.kernels) == 1


CALL = {"tpu": 'custom_call_target="tpu_custom_call"', "cuda": 'custom_call_target="mosaic_gpu'}
SIZES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4}


def largest_copy(text):
    """Bytes of the largest copy in optimised HLO."""
    copies = re.findall(r" = (\w+)\[([\d,]*)\]\S* copy\(", text)
    sizes = (SIZES.get(dtype, 8) * functools.reduce(lambda n, d: n * int(d), filter(None, dims.split(",")), 1)
             for dtype, dims in copies)  # fmt: skip
    return max(sizes, default=0)
