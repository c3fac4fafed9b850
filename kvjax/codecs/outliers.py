"""KVQuant's ranges and the elements outside them, which go to outlier slots (arXiv 2401.18079, sections 3.1, 3.4)."""

import jax
import jax.numpy as jnp

from kvjax.codecs.base import FLOAT16_MAX

# The smallest normal float16: a narrower range is stored as this, which rounds a constant token to itself.
_MIN_SCALE = 2.0**-14


def normalize_keys(x: jax.Array, scale: jax.Array, zero: jax.Array, slots: int) -> tuple[jax.Array, jax.Array]:
    """Keys in units of their offline range, and which of them the codes carry alone (calibration's set).

    Args:
      x: `[..., K, T, H]`; scale, zero: broadcastable against it; slots: outlier slots per token and head.

    Returns:
      `(x - zero) / scale` clipped to [-1, 1], float32, and a mask that is False where a slot takes the element.
    """
    x = x.astype(jnp.float32)
    scaled = (x - zero) / scale
    inlier = jnp.ones(x.shape, bool)
    if slots:
        index, is_outlier = farthest(x, scale, zero, slots)
        inlier = ~marked(jnp.where(is_outlier, index, x.shape[-1]), x.shape[-1])
    return jnp.clip(scaled, -1.0, 1.0), inlier


def normalize_values(x: jax.Array, slots: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Values in units of their token's range: `(normalized, scale, zero, inlier)`; scale and zero `[..., 1, T, 1]`."""
    x = x.astype(jnp.float32)
    index, scale, zero = token_range(x, slots)
    inlier = jnp.ones(x.shape, bool) if index is None else ~marked(index, x.shape[-1])
    return jnp.clip((x - zero) / scale, -1.0, 1.0), scale, zero, inlier


def stored_range(low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scale and zero of [low, high], rounded to their stored type before any code is computed."""
    scale = jnp.clip((high - low) * 0.5, _MIN_SCALE, FLOAT16_MAX).astype(jnp.float16)
    zero = jnp.clip((high + low) * 0.5, -FLOAT16_MAX, FLOAT16_MAX).astype(jnp.float16)
    return scale.astype(jnp.float32), zero.astype(jnp.float32)


def token_range(x: jax.Array, slots: int) -> tuple[jax.Array | None, jax.Array, jax.Array]:
    """The slots' channels `[..., K, T, s]`, and the stored range `[..., 1, T, 1]` of what is left of each token."""
    if not slots:
        return None, *stored_range(x.min((-3, -1), keepdims=True), x.max((-3, -1), keepdims=True))
    centre = x.mean((-3, -1), keepdims=True)
    _, index = largest(jnp.abs(x - centre), slots)
    rest = ~marked(index, x.shape[-1])
    # All channels in slots (fraction 1): the range is empty, and any will do.
    low = jnp.minimum(jnp.where(rest, x, jnp.inf).min((-3, -1), keepdims=True), x.max((-3, -1), keepdims=True))
    high = jnp.maximum(jnp.where(rest, x, -jnp.inf).max((-3, -1), keepdims=True), low)
    return index, *stored_range(low, high)


def farthest(x, scale, zero, slots: int) -> tuple[jax.Array, jax.Array]:
    """Channels `[..., K, T, s]` of the elements farthest outside the range, and whether they are outside at all."""
    distance, index = largest(jnp.abs((x - zero) / scale), slots)
    return index, distance > 1.0


def largest(x: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` largest of the last axis and where they are, int32, as `lax.top_k`; a few without its sort."""
    if count > 4:
        return jax.lax.top_k(x, count)
    values, indices = [], []
    for _ in range(count):
        index = jnp.argmax(x, axis=-1, keepdims=True).astype(jnp.int32)
        values.append(jnp.take_along_axis(x, index, axis=-1))
        indices.append(index)
        x = jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1) == index, -jnp.inf, x)
    return jnp.concatenate(values, axis=-1), jnp.concatenate(indices, axis=-1)


def marked(index: jax.Array, channels: int) -> jax.Array:
    """Mask `[..., H]` of the channels listed in `index[..., s]`; an index of `channels` marks none."""
    channel = jax.lax.broadcasted_iota(index.dtype, (1,) * (index.ndim - 1) + (channels,), index.ndim - 1)
    mask = jnp.zeros((*index.shape[:-1], channels), bool)
    for s in range(index.shape[-1]):
        mask = mask | (index[..., s, None] == channel)
    return mask
