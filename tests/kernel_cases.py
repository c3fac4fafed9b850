"""Decode attention in float64, written from the formats' docstrings alone, and the cases all kernels are tested on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.decode_attention import formats, heads, specs
from pallas_kernels.joined import heads_to_join

EMPTY = float(np.float32(-1e30))


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes `[..., T, H]` of packed words `[..., W, H]`, by `pallas_kernels.packing`'s definition, bit by bit."""
    *lead, rows, channels = words.shape
    fields = 32 if bits == 3 else 32 // bits
    per_cell = fields * bits // 32
    cells = rows // per_cell
    words = words.reshape(*lead, per_cell, cells, channels)
    codes = np.zeros((*lead, fields, cells, channels), np.int64)
    for field in range(fields):
        for bit in range(bits):
            word, at = divmod(field * bits + bit, 32)
            codes[..., field, :, :] |= ((words[..., word, :, :] >> np.uint32(at)) & 1).astype(np.int64) << bit
    return codes.reshape(*lead, fields * cells, channels)


def half(bits: np.ndarray) -> np.ndarray:
    return np.asarray(bits).view(np.float16).astype(np.float64)


def dequantize(x: formats.Format, layer: int) -> np.ndarray:
    """`[B, N, K, T, H]` float64."""
    if isinstance(x, formats.Dense):
        return np.asarray(x.values[layer]).view(jnp.dtype(x.dtype)).astype(np.float64)
    if isinstance(x, formats.Planes):
        return planes(x, layer)
    codes = unpack(np.asarray(x.codes[layer]), x.bits)
    T, H = codes.shape[-2:]
    if isinstance(x, formats.Affine):
        scale, zero = half(x.scale[layer]), half(x.zero[layer])
        if x.along == "tokens":
            group = T // scale.shape[-2]
            scale, zero = (m[..., np.arange(T) // group, :] for m in (scale, zero))
        else:
            group = H // scale.shape[-2]
            scale, zero = (np.moveaxis(m[..., np.arange(H) // group, :], -1, -2) for m in (scale, zero))
        return scale * codes + zero
    value = np.asarray(x.levels[layer], np.float64)[codes]
    if x.per == "channel":
        value = np.asarray(x.scale[layer], np.float64) * value + np.asarray(x.zero[layer], np.float64)
    else:
        value = half(x.scale[layer])[..., None] * value + half(x.zero[layer])[..., None]
    for s in range(x.slots):
        channel, residual = np.asarray(x.slot_channel[layer, ..., s, :]), half(x.slot_residual[layer, ..., s, :])
        value = value + np.where(np.arange(H) == channel[..., None], residual[..., None], 0.0)
    return value


def planes(x: formats.Planes, layer: int) -> np.ndarray:
    bits, blocks = 0, x.planes[0].shape[2]
    level = np.repeat(np.asarray(x.levels), x.run, axis=1)[:, :blocks, :, None, None]
    for i, (plane, width, shift) in enumerate(zip(x.planes, (8, 4, 4), (8, 4, 0))):
        words = np.asarray(plane[layer])
        field = unpack(words if x.order == "words" else words.swapaxes(-1, -2), width)
        bits = bits | np.where(level > i, field, (level == i) << (width - 1)) << shift
    return np.where(level > 0, half(bits.astype(np.uint16)), 0.0)


def attend(q, k, v, layer, first, last, position=None, theta=10000.0, stride=1):
    """Output `[B, K, G, H]` and log of the sum of exp(score) `[B, K, G]`; zeros and -inf where nothing is seen."""
    q, keys, values = operands(np.float64, q, k, v, layer, position, theta, stride)
    scores = np.einsum("bkgh,bkth->bkgt", q, keys)
    scores = np.where(visible(keys, first, last), scores, -np.inf)
    top = np.where(np.isfinite(scores.max(-1)), scores.max(-1), 0.0)
    p = np.exp(scores - top[..., None])
    total = p.sum(-1)
    with np.errstate(divide="ignore"):
        return np.einsum("bkgt,bkth->bkgh", p, values) / np.maximum(total, 1e-300)[..., None], np.log(total) + top


def operands(dtype, q, k, v, layer, position=None, theta=10000.0, stride=1):
    """Queries `[B, K, G, H]`, keys and values `[B, K, N * T, H]` of a layer, rotated, in `dtype`."""
    k, v = jax.tree.map(np.asarray, (k, v))  # else every index of an array is compiled
    q = np.asarray(q, dtype)
    keys, values = (np.moveaxis(dequantize(x, int(layer)), 2, 1).astype(dtype) for x in (k, v))
    B, K, N, T, H = keys.shape
    keys, values = keys.reshape(B, K, N * T, H), values.reshape(B, K, N * T, H)
    if position is not None:
        inv_freq = np.asarray(theta ** (-np.arange(0, H, 2) / H), np.float32).astype(dtype)
        token = np.arange(N * T)
        place = token + token // T * T * (stride - 1)  # other devices hold the blocks between
        keys = rotate(keys, place.astype(dtype)[:, None] * inv_freq)
        q = rotate(q, (np.asarray(position, dtype)[:, None] * inv_freq)[:, None, None])
    return q, keys, values


def visible(keys, first, last):
    """`[B, 1, 1, N * T]`: the tokens that each row sees."""
    token, first, last = np.arange(keys.shape[2]), np.asarray(first)[:, None], np.asarray(last)[:, None]
    return ((token >= first) & (token < last))[:, None, None]


def low_precision(arguments, dtype) -> formats.Partial:
    """The plain evaluation that kernels are measured by: q, K, V and P rounded to `dtype`, sums in float32."""

    def rounded(x):
        return x.astype(dtype).astype(np.float32)

    rotation = arguments["rotation"]
    turned = {} if rotation is None else {"position": rotation.position, "stride": rotation.stride}
    q, keys, values = operands(np.float32, *(arguments[x] for x in ("q", "k", "v", "layer")), **turned)
    scores = rounded(q) @ rounded(keys).swapaxes(-1, -2)
    seen = visible(keys, arguments["first"], arguments["last"])
    top = np.where(seen, scores, np.float32(EMPTY)).max(-1)
    p = np.where(seen, np.exp(scores - top[..., None]), np.float32(0.0))
    return formats.Partial(rounded(p) @ rounded(values), top, p.sum(-1))


def rotate(x, angle):
    a, b = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


@functools.cache
def case(storage: str, shape: str, lengths: str, first: int = 0, stride: int = 1):
    """A named case: arguments of `decode_attention` (numpy leaves, the last layer) and the float64 answer.

    `stride` is that of `Rotation`: the blocks are every stride-th of a context.
    """
    kinds, size = (specs.STORAGES | specs.PLANES)[storage], specs.SHAPES[shape]
    rng = np.random.default_rng(_seed(storage, shape))
    k, v = specs.make(kinds.keys, size, rng), specs.make(kinds.values, size, rng)
    q, layer = specs.query(size, rng), size.layers - 1
    full = size.blocks * size.tokens
    last = np.asarray([full if n is None else n for n in specs.LENGTHS[lengths]], np.int32)
    first = np.full(2, first, np.int32)
    position = stride * last + 37
    rotation = dataclasses.replace(specs.rotation(size, position), stride=stride) if kinds.pre_rope else None
    expected = attend(q, k, v, layer, first, last, position if kinds.pre_rope else None, stride=stride)
    rows = {"first": jnp.asarray(first), "last": jnp.asarray(last)}
    k, v = (jax.tree.map(jnp.asarray, x) for x in (k, v))
    arguments = {"q": jnp.asarray(q), "k": k, "v": v, "layer": jnp.int32(layer), "rotation": rotation, **rows}
    return arguments, expected


def joined(arguments):
    """The case with heads side by side, as a TPU has those that do not fill its lanes."""
    count = heads_to_join(arguments["q"].shape[-1])
    if arguments["q"].shape[1] % count or count == 1:
        return arguments
    k, v = heads.join_formats(arguments["k"], arguments["v"], count, arguments["rotation"] is not None)
    return arguments | {"k": k, "v": v}


def _seed(*names: str) -> int:
    return sum(ord(c) * (i + 1) for i, c in enumerate("/".join(names)))


def errors(partial: formats.Partial, expected) -> tuple[float, float]:
    """The largest error of the output over its root mean square, and of the log-sum, over rows that see tokens."""
    out, log_sum = expected
    seen = np.isfinite(log_sum)
    acc, top, total = (np.asarray(x, np.float64) for x in partial)
    assert np.isfinite(acc).all() and np.isfinite(top).all() and np.isfinite(total).all()
    assert (total[~seen] == 0).all() and (top[~seen] == EMPTY).all() and (acc[~seen] == 0).all()
    if not seen.any():
        return 0.0, 0.0
    got = acc[seen] / total[seen][:, None]
    scale = np.sqrt((out[seen] ** 2).mean())
    return float(np.abs(got - out[seen]).max() / scale), float(
        np.abs(np.log(total[seen]) + top[seen] - log_sum[seen]).max()
    )
