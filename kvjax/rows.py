"""Operations on whole rows of a cache: cutting them short and copying them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import checks, sharding, striped
from kvjax.cache import KVCache
from kvjax.sharding import constrain


def crop(cache: KVCache, lengths: Any) -> KVCache:
    """Forgets all but the first `lengths[B]` tokens of each row (rejected drafts, another turn).

    A block that was sealed and is cut is opened again: its first tokens keep their codes, so what follows is stored as
    if the forgotten tokens had never been there. An exact window cannot come back: tokens that were sealed stay as
    stored. The result shares buffers with `cache`; use one of the two.

    Args:
      lengths: `[B]` int32, at most the rows' lengths.

    Raises:
      ValueError: for lengths beyond the rows', and where a codec with statistics over a group of tokens would have to
        cut a sealed block, whose exact values are gone.
    """
    checks.alive(cache)
    lengths = jnp.asarray(checks.integers(cache, lengths, "lengths"), jnp.int32)
    traced = isinstance(lengths, jax.core.Tracer) or isinstance(cache.length, jax.core.Tracer)
    grouped = [c for s in cache.segments for c in (s.k_codec, s.v_codec) if not c.token_local]
    if traced and grouped:
        raise ValueError(
            f"`lengths` must be known when a cache with {grouped[0].describe()} is cropped; call it outside jit."
        )
    if not traced:
        old, new = sharding.on_host(cache.length), np.asarray(lengths)
        if (new < 0).any() or (new > old).any():
            raise ValueError(f"`lengths={new.tolist()}` must lie between 0 and the rows' {old.tolist()} tokens.")
        now = jnp.asarray(new)
        cut = np.asarray((cache.sealed(now) < cache.sealed(jnp.asarray(old))) & (now > cache.recent_start(now)))
        if grouped and cut.any():
            row = int(cut.argmax())
            kept = cache.sinks + cache.window + int(cache.sealed(jnp.asarray(old))[row]) * cache.block
            # With an exact window the newest tokens of any shorter row would be in a block.
            shorter = cache.sinks if cache.window else int(cache.recent_start(now)[row])
            raise ValueError(
                f"`lengths={new.tolist()}`: row {row} would cut a sealed block of {grouped[0].describe()}, "
                f"whose exact values are gone; crop to {kept} or more, or to {shorter} and append the rest."
            )
    return _crop(cache, lengths)


@jax.jit
def _crop(cache: KVCache, lengths: jax.Array) -> KVCache:
    T = cache.block
    before, after = cache.sealed(cache.length), cache.sealed(lengths)
    from_storage = (before - after) * T
    segments = []
    for segment in cache.segments:
        out = {}
        for name in ("k", "v"):
            recent = getattr(segment, f"{name}_recent")
            codec, storage = getattr(segment, f"{name}_codec"), getattr(segment, name)
            params = getattr(segment, f"{name}_params")
            count = recent.shape[3] // T
            at = after[:, None] + jnp.arange(count)[None, :]

            def one_layer(recent, block, params, codec=codec):
                stored = codec.decode(block, params).astype(recent.dtype).swapaxes(1, 2).reshape(recent.shape)
                t = jnp.arange(recent.shape[2])[None, :]
                old = jax.vmap(lambda x, i: jnp.take(x, i, axis=1, mode="clip"))(recent, t - from_storage[:, None])
                return jnp.where((t < from_storage[:, None])[:, None, :, None], stored, old)

            out[f"{name}_recent"] = jax.vmap(one_layer)(recent, striped.read(cache, storage, at), params)
        segments.append(dataclasses.replace(segment, **out))
    held = jnp.maximum(lengths - cache.recent_start(lengths), 0)
    frozen = jnp.minimum(cache.frozen + from_storage, held)
    return constrain(dataclasses.replace(cache, segments=tuple(segments), length=lengths, frozen=frozen), sealed=False)


def fork(cache: KVCache, rows: Any) -> KVCache:
    """A new cache whose row i is a copy of row `rows[i]` of `cache`, which stays usable (beams, shared prompts).

    Args:
      rows: `[B']` integers below B; B' may differ from B.
    """
    checks.alive(cache)
    rows = np.asarray(rows)
    if rows.ndim != 1 or not rows.size or rows.min() < 0 or rows.max() >= cache.batch:
        raise ValueError(f"`rows={rows.tolist()}` must be a list of rows 0 to {cache.batch - 1}.")
    if cache.mesh is not None:
        sharding.check(cache.mesh, batch=rows.size, kv_heads=cache.shape.kv_heads)
    return _fork(cache, rows)


@jax.jit
def _fork(cache: KVCache, rows: jax.Array) -> KVCache:
    def take(tree: Any, axis: int) -> Any:
        return jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=axis), tree)

    copied = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), cache)  # nothing shared: either may be donated
    segments = tuple(
        dataclasses.replace(
            take(dataclasses.replace(segment, k_params=None, v_params=None), 1),
            k_params=segment.k_params,
            v_params=segment.v_params,
        )
        for segment in copied.segments
    )
    return constrain(
        dataclasses.replace(
            copied,
            segments=segments,
            length=take(cache.length, 0),
            frozen=take(cache.frozen, 0),
            overrun=take(cache.overrun, 0),
            pending=take(cache.pending, 1),
        )
    )
