"""The whole decode step of Llama-3-8B, 32 layers, compiled for one v5p chip and one H100 from abstract arrays."""

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
PRESETS = ("bf16", "int4", "kivi2", "kvquant3", "asymkv-16-0")


@functools.cache
def model_and_cache(name, target):
    weights = {n: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for n, shape in weight_shapes(CONFIG).items()}
    model = LoadedModel(weights, make_rope(CONFIG.head_dim, CONTEXT), CONFIG)
    shape = decode.CacheShape(CONFIG.layers, CONFIG.q_heads, CONFIG.kv_heads, CONFIG.head_dim, model.rope)
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


CALL = {"tpu": 'custom_call_target="tpu_custom_call"', "cuda": 'custom_call_target="mosaic_gpu'}
SIZES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4}


def largest_copy(text):
    """Bytes of the largest copy in optimised HLO."""
    copies = re.findall(r" = (\w+)\[([\d,]*)\]\S* copy\(", text)
    sizes = (SIZES.get(dtype, 8) * functools.reduce(lambda n, d: n * int(d), filter(None, dims.split(",")), 1)
             for dtype, dims in copies)  # fmt: skip
    return max(sizes, default=0)
