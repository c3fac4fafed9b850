"""A decode step with attention computed in float64 by numpy, over the cache decoded: what a step must agree with.

Written from the table in `kvjax.attention`, without its code: blocks are decoded by their codec and put in order,
angles are position * inv_freq in float64, and one softmax runs over all tokens. Everything else (projections, MLP) is
the model's own.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import decode, sharding, striped
from kvjax.cache import KVCache, Segment

_BLOCKS = 256  # decoded at a time


@dataclasses.dataclass(frozen=True)
class Agreement:
    """A step against float64.

    Attributes:
      outputs: for each layer, the largest difference of attention's output over its largest magnitude.
      logits: the largest difference of a logit.
      largest_logit: for scale.
      same_token: whether the likeliest token is the same.
    """

    outputs: tuple[float, ...]
    logits: float
    largest_logit: float
    same_token: bool


def compare(model: Any, cache: KVCache, token: np.ndarray) -> Agreement:
    """Takes the step `token[1]` both ways. The cache is consumed.

    Raises:
      NotImplementedError: for several rows, dynamic RoPE, and a cache that was cropped.
    """
    if cache.batch != 1 or cache.shape.rope.dynamic is not None or sharding.on_host(cache.frozen).any():
        raise NotImplementedError("float64 attention is for one row that was not cropped, without dynamic RoPE")
    x, errors = _embed(model, jnp.asarray(token, jnp.int32)[:, None]), []
    for layer in range(cache.shape.layers):
        q, k, v = _qkv(model, layer, x)
        exact = attention(cache, layer, *(np.asarray(y, np.float64)[0, 0] for y in (q, k, v)))
        held = decode.append(cache, layer, k, v)
        found = np.asarray(decode.attend(held, layer, q.reshape(1, 1, -1, q.shape[-1])), np.float64)
        errors.append(float(np.abs(found.ravel() - exact.ravel()).max() / np.abs(exact).max()))
        x = _finish(model, layer, x, jnp.asarray(exact.reshape(q.shape), x.dtype))
    wanted = np.asarray(_logits(model, x))
    logits, _ = decode.step(model, cache, token)
    found = sharding.on_host(logits)
    return Agreement(
        tuple(errors),
        float(np.abs(found - wanted).max()),
        float(np.abs(wanted).max()),
        bool(found.argmax() == wanted.argmax()),
    )


def attention(cache: KVCache, layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Attention of the row's next token, in float64.

    Args:
      layer: of the model.
      q: `[K, G, H]`, k, v: `[K, H]` of the next token, before RoPE.

    Returns:
      `[K, G, H]`.
    """
    segment = next(s for s in cache.segments if layer in s.layer_ids)
    position = int(sharding.on_host(cache.length)[0])
    q = _rotate(cache, q, np.asarray([position])) / np.sqrt(cache.shape.head_dim)
    acc, total, top = np.zeros_like(q), np.zeros(q.shape[:2]), np.full(q.shape[:2], -np.inf)
    for at, keys, values in _tokens(cache, segment, segment.layer_ids.index(layer), position, k, v):
        if cache.shape.sliding_window is not None:
            near = position - at < cache.shape.sliding_window
            at, keys, values = at[near], keys[:, near], values[:, near]
        if not len(at):
            continue
        keys = _rotate(cache, keys, at) if segment.k_codec.pre_rope else keys
        scores = np.einsum("kgh,kth->kgt", q, keys)
        higher = np.maximum(top, scores.max(-1))
        weights, before = np.exp(scores - higher[..., None]), np.exp(top - higher)
        acc = acc * before[..., None] + np.einsum("kgt,kth->kgh", weights, values)
        total, top = total * before + weights.sum(-1), higher
    return acc / total[..., None]


def _tokens(
    cache: KVCache, segment: Segment, at: int, position: int, k: np.ndarray, v: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Positions `[n]`, keys and values `[K, n, H]` of all tokens up to `position`, as its query sees them."""
    sinks, T = cache.sinks, cache.block
    sealed = max(position - sinks - cache.window, 0) // T
    start = sinks + sealed * T
    k = k if segment.k_codec.pre_rope else _rotate(cache, k[:, None], np.asarray([position]))[:, 0]
    new = {"k": k, "v": v}
    if held := min(position, sinks):
        keys, values = (np.asarray(_leaf(segment, f"{n}_sinks", at), np.float64)[:, :held] for n in "kv")
        yield np.arange(held), keys, values
    stored = [
        jax.tree.map(lambda x: _in_order(cache, np.asarray(x[at, 0])), getattr(segment, name)) for name in ("k", "v")
    ]
    codecs = (segment.k_codec, segment.v_codec)
    params = [jax.tree.map(lambda p: np.asarray(p[at]), p) for p in (segment.k_params, segment.v_params)]
    for first in range(0, sealed, _BLOCKS):
        last = min(first + _BLOCKS, sealed)
        parts = (
            _decode(c, cache.dtype, jax.tree.map(functools.partial(_padded, first=first, last=last), s), p)
            for c, s, p in zip(codecs, stored, params)
        )
        keys, values = (_flat(x)[:, : (last - first) * T] for x in parts)
        yield sinks + np.arange(first * T, last * T), keys, values
    if position < sinks:  # the new token is a sink itself
        yield np.asarray([position]), new["k"][:, None], new["v"][:, None]
        return
    keys, values = (_recent(cache, segment, name, at, position, start, new[name]) for name in "kv")
    yield np.arange(start, position + 1), keys, values


def _recent(
    cache: KVCache, segment: Segment, name: str, at: int, position: int, start: int, new: np.ndarray
) -> np.ndarray:
    """Tokens `start .. position` `[K, n, H]`, each exact or as stored."""
    codec, window = getattr(segment, f"{name}_codec"), getattr(cache, f"{name}_window")
    held = position - start
    ring = np.asarray(_leaf(segment, f"{name}_recent", at), np.float64)
    ring = np.concatenate([ring[:, :held], new[:, None], np.zeros_like(ring[:, : cache.block])], axis=1)
    blocks = -(-(held + 1) // cache.block)
    exact = ring[:, : blocks * cache.block].reshape(ring.shape[0], blocks, cache.block, -1).swapaxes(0, 1)
    params = jax.tree.map(lambda p: np.asarray(p[at]), getattr(segment, f"{name}_params"))
    stored = np.asarray(_roundtrip(codec, cache.dtype, jnp.asarray(exact, jnp.float32), params), np.float64)
    exact, stored = _flat(exact)[:, : held + 1], _flat(stored)[:, : held + 1]
    tokens = np.arange(start, position + 1)
    if codec.token_local:
        seen_stored = tokens <= position - window
    else:
        run = window or cache.block
        seen_stored = ((tokens - cache.sinks) // run + 1) * run + cache.sinks <= position
    return np.where(seen_stored[None, :, None], stored, exact)


def _rotate(cache: KVCache, x: np.ndarray, position: np.ndarray) -> np.ndarray:
    """RoPE in float64, of tokens `[..., t, H]` or of one token's heads."""
    rope = cache.shape.rope
    angles = position[:, None] * _frequencies(rope)
    cos, sin = (f(angles) * rope.attention_factor for f in (np.cos, np.sin))
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _frequencies(rope: Any) -> np.ndarray:
    from kvjax.model.turns import to_frequencies

    return to_frequencies(rope.turns)


def _leaf(segment: Segment, name: str, at: int) -> np.ndarray:
    return np.asarray(getattr(segment, name)[at, 0])


def _in_order(cache: KVCache, x: np.ndarray) -> np.ndarray:
    """Blocks `[N, ...]` as they follow each other in the context."""
    return x[striped.order(len(x), cache.stripes)]


def _padded(x: np.ndarray, first: int, last: int) -> np.ndarray:
    """Blocks `first .. last` and zeros up to `_BLOCKS`, so that one decoder is compiled."""
    return np.concatenate([x[first:last], np.zeros((_BLOCKS - (last - first), *x.shape[1:]), x.dtype)])


def _flat(x: np.ndarray) -> np.ndarray:
    """Blocks `[n, K, T, H]` as tokens `[K, n * T, H]`, float64."""
    n, K, T, H = x.shape
    return np.asarray(x, np.float64).swapaxes(0, 1).reshape(K, n * T, H)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode(codec, dtype, block, params):
    return codec.decode(block, params).astype(dtype)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _roundtrip(codec, dtype, x, params):
    return codec.roundtrip(x, params).astype(dtype)


@jax.jit
def _embed(model, tokens):
    return model.module().embed(tokens)


@jax.jit
def _qkv(model, layer, x):
    return model.module().qkv(layer, x)


@jax.jit
def _finish(model, layer, x, out):
    return model.module().finish(layer, x, out)


@jax.jit
def _logits(model, x):
    return model.module().logits(x[:, 0])
