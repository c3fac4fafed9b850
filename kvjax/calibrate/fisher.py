"""Keys, values and the loss's gradient with respect to them.

The diagonal of the Fisher information, F_ii = (dL/dA_i)², says how much the loss feels an error in
element i of the cache (arXiv 2401.18079, Section 3.3 and Appendix D).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kvjax.model.forward import forward_with_kv
from kvjax.model.llama import LoadedModel
from kvjax.model.rope import cos_sin, rotate


class Activations(NamedTuple):
    """`[L, B, S, K, H]` float32: keys, values, and the gradient of each sequence's loss by them."""

    k: jax.Array
    v: jax.Array
    k_grad: jax.Array
    v_grad: jax.Array


def keys_and_values(model: LoadedModel, tokens: jax.Array, pre_rope: bool = True):
    """`(k, v)` `[L, B, S, K, H]` of `tokens` `[B, S]`; keys before the rotary embedding or after it."""
    _, k, v = forward_with_kv(model, tokens)
    return (k if pre_rope else _rotated(model, k)), v


def activations_and_gradients(model: LoadedModel, tokens: jax.Array, pre_rope: bool = True) -> Activations:
    """Keys, values and loss gradients of `tokens` `[B, S]`.

    The loss of a sequence is the sum of its S - 1 next-token cross-entropies. The paper takes the mean:
    the same times a constant, which no weighted table depends on, but closer to the end of float32 once
    squared.
    """

    def loss(probe):
        logits, k, v = forward_with_kv(model, tokens, probe)
        log_probs = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
        taken = jnp.take_along_axis(log_probs, tokens[:, 1:, None], -1)
        # Summed over the batch too: no sequence's loss depends on another's keys and values.
        return -taken.sum(), (k, v)

    k_shape, v_shape = jax.eval_shape(lambda: keys_and_values(model, tokens))
    probe = (jnp.zeros(k_shape.shape, k_shape.dtype), jnp.zeros(v_shape.shape, v_shape.dtype))
    (k_grad, v_grad), (k, v) = jax.grad(loss, has_aux=True)(probe)
    k, v, k_grad, v_grad = (x.astype(jnp.float32) for x in (k, v, k_grad, v_grad))
    if not pre_rope:
        # k' = a R k with R orthogonal, so dL/dk' = R dL/dk / a = rotate(dL/dk) / a².
        k, k_grad = _rotated(model, k), _rotated(model, k_grad) / model.rope.attention_factor**2
    return Activations(k, v, k_grad, v_grad)


def _rotated(model: LoadedModel, x: jax.Array) -> jax.Array:
    tokens = x.shape[2]
    cos, sin = cos_sin(model.rope, jnp.arange(tokens), lengths=jnp.int32(tokens))
    return rotate(x, cos[None, None, :, None], sin[None, None, :, None])
