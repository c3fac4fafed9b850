"""The definition: decodes a layer whole and attends to it in float32. For tests and small contexts."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels import packing
from pallas_kernels.decode_attention.formats import Affine, Dense, Format, Partial, Planes, Rotation, shape_of
from pallas_kernels.decode_attention.plane_blocks import where_seen

EMPTY = -1e30  # finite: a row that sees nothing has this maximum, and no NaN arises


def decode_attention(
    q: jax.Array,
    k: Format,
    v: Format,
    layer: jax.Array,
    first: jax.Array,
    last: jax.Array,
    rotation: Rotation | None,
) -> Partial:
    """As `api.decode_attention`."""
    return _attend(q, k, v, layer, first, last, rotation)[0]


def attend_in_part(
    q: jax.Array, k: Planes, v: Planes, layer: jax.Array, first: jax.Array, last: jax.Array
) -> tuple[Partial, jax.Array]:
    """As `api.attend_in_part`."""
    partial, read = _attend(q, k, v, layer, first, last, None)
    assert isinstance(read, Planes)
    return partial, where_seen(read.levels, first, last, shape_of(k)[4] * v.run)


def _attend(
    q: jax.Array,
    k: Format,
    v: Format,
    layer: jax.Array,
    first: jax.Array,
    last: jax.Array,
    rotation: Rotation | None,
) -> tuple[Partial, Format]:
    """The attention, and the values with the levels that their limits come to."""
    _, batch, blocks, heads, tokens, channels = shape_of(k)

    def whole(x: Format) -> jax.Array:
        return dequantize(x, layer).swapaxes(1, 2).reshape(batch, heads, blocks * tokens, channels)

    keys = whole(k)
    token = jnp.arange(blocks * tokens, dtype=jnp.int32)
    if rotation is not None:
        keys = rotate(keys, *(x[None, None] for x in rotation.angles(rotation.place(token, tokens))))
        q = rotate(q, *(x[:, None, None] for x in rotation.angles(rotation.position)))
    scores = jnp.einsum("bkgh,bkth->bkgt", q, keys, precision="highest")
    token = token[None, :]
    seen = ((token >= first[:, None]) & (token < last[:, None]))[:, None, None]
    scores = jnp.where(seen, scores, EMPTY)
    top = scores.max(-1)
    p = jnp.where(seen, jnp.exp(scores - top[..., None]), 0.0)
    total = p.sum(-1)
    if isinstance(v, Planes) and v.levels is None:
        v = dataclasses.replace(v, levels=levels_within(v, scores, top + jnp.log(total)))
    return Partial(jnp.einsum("bkgt,bkth->bkgh", p, whole(v), precision="highest"), top, total), v


def levels_within(v: Planes, scores: jax.Array, log_sum: jax.Array) -> jax.Array:
    """Levels `[B, U, K]` of values by their limits.

    Args:
      scores: `[B, K, G, N * T]`, -1e30 where a token is not seen.
      log_sum: `[B, K, G]` of the exponentials of all scores.
    """
    runs, size = v.limits.shape[2], v.run * shape_of(v)[4]
    scores = jnp.pad(scores, [(0, 0)] * 3 + [(0, runs * size - scores.shape[-1])], constant_values=EMPTY)
    largest = scores.reshape(*scores.shape[:-1], runs, size).max(-1)
    if v.known is not None:
        log_sum = jnp.logaddexp(log_sum, v.known)
    largest = (largest - log_sum[..., None]).max(2).swapaxes(1, 2)
    return (largest[None] > v.limits).sum(0, dtype=jnp.int32)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns channels (i, i + H/2) of `x[..., H]` by angles that broadcast against `[..., H/2]`."""
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def float16(bits: jax.Array) -> jax.Array:
    """float16 bit patterns as float32."""
    return jax.lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32)


def dequantize(x: Format, layer: jax.Array) -> jax.Array:
    """One layer `[B, N, K, T, H]`, float32."""
    if isinstance(x, Dense):
        return jax.lax.bitcast_convert_type(x.values[layer], jnp.dtype(x.dtype)).astype(jnp.float32)
    if isinstance(x, Planes):
        return _planes(x, layer)
    codes = packing.unpack(x.codes[layer], x.bits)
    tokens, channels = codes.shape[-2:]
    if isinstance(x, Affine):
        scale, zero = (
            jax.lax.bitcast_convert_type(m[layer], jnp.dtype(x.dtype)).astype(jnp.float32) for m in (x.scale, x.zero)
        )
        if x.along == "tokens":
            scale, zero = (jnp.repeat(m, tokens // m.shape[-2], axis=-2) for m in (scale, zero))
        else:
            scale, zero = (jnp.repeat(m, channels // m.shape[-2], axis=-2).swapaxes(-1, -2) for m in (scale, zero))
        return scale * codes.astype(jnp.float32) + zero
    value = jnp.take(x.levels[layer], codes.astype(jnp.int32), mode="clip")
    if x.per == "channel":
        value = x.scale[layer][None, None] * value + x.zero[layer][None, None]
    else:
        value = float16(x.scale[layer])[..., None] * value + float16(x.zero[layer])[..., None]
    channel = jnp.arange(channels, dtype=jnp.uint8)
    for s in range(x.slots):
        here = x.slot_channel[layer, ..., s, :, None] == channel.reshape((1,) * (value.ndim - 1) + (-1,))
        value = value + jnp.where(here, float16(x.slot_residual[layer, ..., s, :, None]), 0.0)
    return value


def _planes(x: Planes, layer: jax.Array) -> jax.Array:
    """float16 of which each run's first planes are read, the rest filled with 1000..."""
    bits = jnp.zeros((), jnp.uint16)
    level = jnp.repeat(x.levels, x.run, axis=1)[:, : shape_of(x)[2], :, None, None]
    for i, (plane, width, shift) in enumerate(zip(x.planes, (8, 4, 4), (8, 4, 0), strict=True)):
        words = plane[layer]
        field = packing.unpack(words if x.order == "words" else words.swapaxes(-1, -2), width)
        fill = jnp.where(level == i, jnp.uint16(1 << (width - 1)), jnp.uint16(0))
        bits = bits | jnp.where(level > i, field.astype(jnp.uint16), fill) << shift
    return jnp.where(level > 0, float16(bits), 0.0)
