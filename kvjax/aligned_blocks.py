"""How much a kernel reads of each block and kv head, by the rules of `kvjax.codecs.align`.

A kernel reads a block of one kv head to one level, so the level is the highest that one of its channels (keys) or
tokens (values) needs: it reads at least what the rule wants, and the error is within the rule's. By the paper's
criterion the channel with the largest product is always read in full, so its keys gain nothing from blocks; budgets do.

For values the rules ask for probabilities, which a kernel learns on the way. Both budgets allow less the larger a
probability w is, so each level suffices up to a limit:

    worst   w e <= tau (1/N + w) / 2               w <= tau / 2N / (e - tau/2), any w where e <= tau/2
    rms     w^2 e^2 / 3 <= tau^2 (1/N + w) / 18    w <= (tau^2 + sqrt(tau^4 + 24 e^2 tau^2 / N)) / 12 e^2
"""

import jax
import jax.numpy as jnp

from kvjax.codecs import align
from kvjax.codecs.planes import PlanesCodec

_MARGIN = 1e-4  # of log-probabilities: a kernel's rounding must not lower a level


def key_levels(codec: PlanesCodec, q: jax.Array, top: jax.Array) -> jax.Array:
    """Planes to read of each block's keys.

    Args:
      q: `[B, K, G, H]` as scored, times the softmax scale.
      top: `[B, N, K, H]` uint8, one layer's; with scope "running" the largest so far, or the same for all blocks.

    Returns:
      int32 `[B, N, K]`.
    """
    q, top = q[:, None], top[..., None, :]
    if codec.read.mode == "criterion":
        return align.align_addends(codec.read, q, top).max((-2, -1))
    weight = jnp.abs(q)
    total, count, budget = weight.sum(-1, keepdims=True), jnp.float32(q.shape[-1]), jnp.float32(codec.read.budget)
    return align.within_budget(codec.read, budget, weight, total, count, codec.errors(top)).max((-2, -1))


def value_limits(codec: PlanesCodec, top: jax.Array, count: jax.Array, largest: jax.Array) -> jax.Array:
    """Log-probabilities up to which each level suffices for a block's values.

    Args:
      top: `[B, N, K, T]` uint8, one layer's.
      count: `[B]`, at least the number of tokens seen.
      largest: `[B, K]` float32, the largest value seen as stored: the unit of the budget.

    Returns:
      float32 `[3, B, N, K]`: the level is the number of limits below the largest log-probability.

    Raises:
      NotImplementedError: for the criterion, which asks for the output's size before the values are read.
    """
    rule = codec.read
    if rule.mode == "criterion" or rule.budget is None:
        raise NotImplementedError(
            "the criterion for values estimates the output from a first pass over all scores; use a budget."
        )
    tau = rule.budget * largest[:, None]
    each = 1.0 / count.astype(jnp.float32)[:, None, None]
    nothing, *errors = codec.errors(top.max(-1))
    if not rule.skip:
        limits = [jnp.zeros_like(nothing)]
    else:
        limits = [_worst(tau * (1.0 if rule.mode == "worst" else 0.25), each, nothing)]
    if rule.mode == "worst":
        limits += [_worst(tau, each, error) for error in errors]
    else:
        limits += [_rms(tau * (0.75 if rule.skip else 1.0), each, error) for error in errors]
    return jnp.log(jnp.stack(limits)) - _MARGIN


def _worst(tau: jax.Array, each: jax.Array, error: jax.Array) -> jax.Array:
    beyond = error - tau / 2
    return jnp.where(beyond > 0, tau * each / 2 / jnp.maximum(beyond, 1e-30), jnp.inf)


def _rms(tau: jax.Array, each: jax.Array, error: jax.Array) -> jax.Array:
    """The larger root, with the unit x = tau / error: none of the squares overflows."""
    x = tau / error
    return x * (x + jnp.sqrt(x * x + 24.0 * each)) / 12.0
