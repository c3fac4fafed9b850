"""Heads side by side as one (`pallas_kernels.joined`): their queries, and what becomes of them.

A query meets the channels of its own head and zeros elsewhere, so that the rows of p * G queries are those of p heads:
more rows of a matrix product, which cost little in decode steps, and no byte more.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels import joined
from pallas_kernels.decode_attention.formats import Affine, Codebook, Dense, Format, Partial, Rotation, describe


def padded_group(group: int, heads: int) -> int:
    """Queries per head, so that those of joined heads fill whole registers of 8 rows, or divide one."""
    while heads * group % 8 and 8 % (heads * group):
        group += 1
    return group


def joined_queries(q: jax.Array, heads: int, halves: bool) -> jax.Array:
    """q `[B, K, G, H]` as `[B, K / heads, heads * G', heads * H]`, zero but at a query's own head; G' = `padded_group`.

    Args:
      halves: channels are ordered by halves.
    """
    G = padded_group(q.shape[2], heads)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, G - q.shape[2]), (0, 0)))
    B, K, _, H = q.shape
    parts = 2 if halves else 1
    q = q.reshape(B, K // heads, heads, G, parts, 1, H // parts)
    own = jnp.eye(heads, dtype=bool).reshape(1, 1, heads, 1, 1, heads, 1)
    return jnp.where(own, q, jnp.zeros((), q.dtype)).reshape(B, K // heads, heads * G, heads * H)


def joined_rotation(rotation: Rotation | None, heads: int) -> Rotation | None:
    """The rotation of joined heads, whose first halves come before their second ones."""
    if rotation is None:
        return None
    angles = rotation.angles

    def repeated(offsets: jax.Array) -> tuple[jax.Array, jax.Array]:
        cos, sin = angles(offsets)
        return jnp.concatenate([cos] * heads, axis=-1), jnp.concatenate([sin] * heads, axis=-1)

    return dataclasses.replace(rotation, angles=repeated)


def separate_results(part: Partial, heads: int, group: int) -> Partial:
    """Of each of `group` queries per head its own head's channels; what `joined_queries` is to queries."""
    B, groups, rows, channels = part.acc.shape
    G, H = rows // heads, channels // heads
    acc = part.acc.reshape(B, groups, heads, G, heads, H)
    acc = jnp.stack([acc[:, :, h, :group, h] for h in range(heads)], axis=2).reshape(B, groups * heads, group, H)
    top, total = (x.reshape(B, groups * heads, G)[:, :, :group] for x in (part.max, part.sum))
    return Partial(acc, top, total)


def join_formats(k: Format, v: Format, heads: int, rotates: bool) -> tuple[Format, Format]:
    """Storage of keys and values of K heads as that of K / heads joined ones; `rotates` as of `api.check`."""
    return (join_format(k, heads, halves=rotates), join_format(v, heads)) if heads > 1 else (k, v)


def join_format(x: Format, heads: int, halves: bool = False) -> Format:
    """Storage of K heads as that of K / heads joined ones.

    Args:
      halves: channels by halves, as keys that are rotated on the fly need them.
    """
    if isinstance(x, Dense):
        return dataclasses.replace(x, values=joined.join(x.values, heads, halves), joined=heads)
    if not isinstance(x, (Affine, Codebook)):
        raise NotImplementedError(f"heads of {describe(x)} are not joined")
    codes = joined.join(x.codes, heads, halves)
    if isinstance(x, Affine):
        shared = x.scale.shape[3] == 1  # by all heads
        move = joined.join if x.along == "tokens" else joined.join_groups
        scale, zero = (m if shared else move(m, heads) for m in (x.scale, x.zero))
        return dataclasses.replace(x, codes=codes, scale=scale, zero=zero, joined=heads)
    scale, zero = (m if x.per == "token" else joined.join(m, heads, halves) for m in (x.scale, x.zero))
    channel, residual = x.slot_channel, x.slot_residual
    if x.slots and heads * x.codes.shape[-1] <= 256:  # what 8 bits can name
        channel = joined.join_names(channel, heads, x.codes.shape[-1], halves)
        residual = joined.join_rows(residual, heads)
    changes = {"slot_channel": channel, "slot_residual": residual, "joined": heads}
    return dataclasses.replace(x, codes=codes, scale=scale, zero=zero, **changes)
