"""The keys and values of a whole window as a cache of some policy would return them.

Packed and unpacked for real, block by block, without a cache around it: protocol "all" needs one K and V that every
query of the window sees.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import decode
from kvjax.codecs.base import AbstractCodec, Params
from kvjax.model.forward import forward_with_kv
from kvjax.model.llama import LoadedModel
from kvjax.model.rope import cos_sin, rotate
from kvjax.policy import Policy, SegmentPolicy

KVMap = Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, jax.Array, bool]]


def through_storage(
    codec: AbstractCodec, params: Params, x: jax.Array, sinks: int, block: int, dtype: Any
) -> jax.Array:
    """`x[B, S, K, H]` encoded to packed blocks and decoded, the first `sinks` tokens as they are.

    Args:
      block: tokens per block, counted from behind the sinks. The last block is filled up with copies of the last token,
        which moves no minimum or maximum; token-local codecs do not see it at all.
      dtype: of the cache; what the codec decodes to is rounded to it, as attention does.

    Returns:
      `[B, S, K, H]` in `dtype`.
    """
    head, tail = x[:, :sinks].astype(dtype), x[:, sinks:]
    batch, tokens, heads, channels = tail.shape
    if not tokens:
        return head
    blocks = -(-tokens // block)
    tail = jnp.pad(tail, ((0, 0), (0, blocks * block - tokens), (0, 0), (0, 0)), mode="edge")
    tail = tail.reshape(batch, blocks, block, heads, channels).swapaxes(2, 3)
    # The barrier keeps the packed words: without it the compiler may see that unpacking undoes packing.
    stored = jax.lax.optimization_barrier(codec.encode(tail.astype(dtype), params))
    tail = codec.decode(stored, params).astype(dtype)
    tail = tail.swapaxes(2, 3).reshape(batch, blocks * block, heads, channels)[:, :tokens]
    return jnp.concatenate([head, tail], axis=1)


def kv_map(policy: Policy, model: LoadedModel, block: int = 128) -> KVMap:
    """What attention sees of a layer's K and V under `policy`, for `kvjax.model.forward.forward`.

    Keys come back rotated: whether a codec stores them before or after RoPE may differ between layers.
    """

    layers = sum(len(segment.layer_ids) for segment in policy.segments)
    which, index = np.zeros((2, layers), np.int32)
    for n, segment in enumerate(policy.segments):
        which[list(segment.layer_ids)], index[list(segment.layer_ids)] = n, np.arange(len(segment.layer_ids))

    def one(segment: SegmentPolicy, layer: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        at = jnp.asarray(index)[layer]
        k_params, v_params = (
            jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(jnp.asarray(p), at, keepdims=False), params)
            for params in (segment.k_params, segment.v_params)
        )
        store = functools.partial(through_storage, sinks=policy.sinks, block=block, dtype=model.dtype)
        length = k.shape[1]
        cos, sin = cos_sin(model.rope, jnp.arange(length)[None, :, None], jnp.full((1, 1, 1), length))
        if segment.k_codec.pre_rope:
            # Rotated in float32 and not rounded again, as attention rotates decoded keys.
            k = rotate(store(segment.k_codec, k_params, k).astype(jnp.float32), cos, sin)
        else:
            k = store(segment.k_codec, k_params, rotate(k, cos, sin)).astype(jnp.float32)
        return k, store(segment.v_codec, v_params, v).astype(jnp.float32)

    branches = [functools.partial(one, segment) for segment in policy.segments]

    def apply(layer: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, bool]:
        if len(branches) == 1:
            return *branches[0](layer, k, v), True
        return *jax.lax.switch(jnp.asarray(which)[layer], branches, layer, k, v), True

    return apply


def bits_of(model: LoadedModel, policy: Policy, *, capacity: int, block: int = 128) -> float:
    """Bits per element of the cache that `kvjax.decode.init_cache` would allocate, without allocating it."""
    return decode.bits_per_element(
        jax.eval_shape(lambda: decode.init_cache(model, policy, batch=1, capacity=capacity, block=block))
    )


def share_without_slot(model: LoadedModel, policy: Policy, tokens: np.ndarray) -> float:
    """The share of the exact K and V of `tokens[B, S]` that are outliers without a slot."""
    _, keys, values = forward_with_kv(model, tokens)
    length = tokens.shape[1]
    cos, sin = cos_sin(model.rope, jnp.arange(length)[None, :, None], jnp.full((1, 1, 1), length))
    dropped = 0
    for segment in policy.segments:
        for at, layer in enumerate(segment.layer_ids):
            k, v = keys[layer], values[layer]
            k = k if segment.k_codec.pre_rope else rotate(k, cos, sin)
            parts = ((segment.k_codec, segment.k_params, k), (segment.v_codec, segment.v_params, v))
            for codec, params, x in parts:
                params = jax.tree.map(lambda p, at=at: jnp.asarray(p[at]), params)
                dropped += int(codec.dropped(x[:, policy.sinks :].swapaxes(1, 2), params).sum())
    return dropped / (2 * keys.size)
