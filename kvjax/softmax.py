"""Softmax attention over part of the tokens, and how two parts become one (log-sum-exp)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

EMPTY = -1e30  # finite: the maximum of no scores; exp(EMPTY - EMPTY) is masked, never NaN


class Partial(NamedTuple):
    """Softmax attention over some of the tokens, not yet normalised; float32.

    Attributes:
      acc: `[B, K, G, S, H]`, sum of exp(score - max) * value.
      max: `[B, K, G, S]`, the largest score, or -1e30 where there is none.
      sum: `[B, K, G, S]`, sum of exp(score - max).
    """

    acc: jax.Array
    max: jax.Array
    sum: jax.Array


def empty_partial(q: jax.Array) -> Partial:
    """The neutral element of `merge`, for queries `[B, K, G, S, H]`."""
    return Partial(jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:-1], EMPTY), jnp.zeros(q.shape[:-1]))


def merge(a: Partial, b: Partial) -> Partial:
    """Attention over the union of two disjoint sets of tokens. Associative and commutative."""
    top = jnp.maximum(a.max, b.max)
    wa, wb = jnp.exp(a.max - top), jnp.exp(b.max - top)
    return Partial(a.acc * wa[..., None] + b.acc * wb[..., None], top, a.sum * wa + b.sum * wb)


def finish(partial: Partial) -> jax.Array:
    """The attention output `[B, K, G, S, H]`; zeros where no token was visible."""
    return partial.acc / jnp.maximum(partial.sum, 1e-30)[..., None]


def softmax_part(scores: jax.Array, visible: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Unnormalised weights of `scores[B, K, G, S, t]` under `visible[B, S, t]`, their maximum and sum."""
    visible = visible[:, None, None]
    top = jnp.where(visible, scores, EMPTY).max(-1)
    p = jnp.where(visible, jnp.exp(scores - top[..., None]), 0.0)
    return p, top, p.sum(-1)


def dense_partial(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> Partial:
    """Attention over exact tokens: q `[B, K, G, S, H]` scaled and rotated, k, v `[B, K, t, H]`, visible `[B, S, t]`."""
    scores = jnp.einsum("bkgsh,bkth->bkgst", q, k, preferred_element_type=jnp.float32)
    p, top, total = softmax_part(scores, visible)
    return Partial(jnp.einsum("bkgst,bkth->bkgsh", p, v, preferred_element_type=jnp.float32), top, total)
