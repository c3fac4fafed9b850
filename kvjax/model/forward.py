"""Plain forward passes without a cache: the yardstick of the cache, and calibration's source of K and V.

B batch, S tokens, L layers, K kv heads, G query heads per kv head, H head size, V vocabulary.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kvjax.model.llama import LoadedModel
from kvjax.model.rope import cos_sin, rotate

# Scores are [B, K, G, queries, keys] float32. Up to this many queries they are formed at once, as in the definition;
# longer texts go through in pieces of this many queries, so that memory grows with S and not with S * S.
QUERIES_AT_ONCE = 2048


def causal_attention(q, k, v, q_positions, k_positions, sliding_window: int | None = None) -> jax.Array:
    """Masked softmax attention in float32: the definition that every fused path is tested against.

        out = softmax(q k^T / sqrt(H) over keys with 0 <= q_position - k_position < sliding_window) v

    A position beyond every query's hides a key (padding). A query that sees no key gets the mean of all values.

    Args:
      q: `[B, S, K, G, H]`, rotated.
      k: `[B, T, K, H]`, rotated.
      v: `[B, T, K, H]`.
      q_positions: integers `[B or 1, S]`.
      k_positions: integers `[B or 1, T]`.
      sliding_window: how many positions back a query sees, itself included; None: all.

    Returns:
      `[B, S, K, G, H]` in the dtype of `q`.
    """
    dtype = q.dtype
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))  # exact; `kv_map` may return k and v in its own dtype
    scores = jnp.einsum("bskgh,btkh->bkgst", q, k) * q.shape[-1] ** -0.5
    distance = q_positions[:, :, None] - k_positions[:, None, :]
    visible = distance >= 0
    if sliding_window is not None:
        visible &= distance < sliding_window
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1)
    return jnp.einsum("bkgst,btkh->bskgh", weights, v).astype(dtype)


def forward(model: LoadedModel, tokens, kv_map: Callable | None = None, probe=None) -> jax.Array:
    """Logits of every position, all tokens attending to each other's K and V.

    Compiled once per shape. With `kv_map` it is traced as it stands: wrap the call in `jax.jit` yourself.
    Up to 2048 tokens one layer's scores `[B, K, G, S, S]` are formed at once; beyond, 2048 queries at a time.

    Args:
      model: the model.
      tokens: integers `[B, S]`; rows shorter than S are padded on the right, where causality hides the padding
        (but dynamic NTK takes S as the length of every row).
      kv_map: `(layer, k, v) -> (k, v, k_is_rotated)`, what attention sees instead of k (before the rotary
        embedding) and v, both `[B, S, K, H]`; `layer` is traced, `k_is_rotated` a Python bool. None: identity.
      probe: `(dk, dv)`, each `[L, B, S, K, H]`, added to k (before the rotary embedding) and v, before `kv_map`.
        The gradient of a loss with respect to a zero probe is its gradient with respect to K and V.

    Returns:
      `[B, S, V]` float32.
    """
    run = _forward_jit if kv_map is None else _forward
    return run(model, tokens, probe, kv_map)[0]


def forward_with_kv(model: LoadedModel, tokens, probe=None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `forward`, with the keys (before the rotary embedding) and values of all layers.

    Returns:
      logits `[B, S, V]` float32; k and v, each `[L, B, S, K, H]` in the model's dtype.
    """
    logits, (k, v) = _forward_jit(model, tokens, probe, None, "kv")
    return logits, k, v


def queries_keys_values(model: LoadedModel, tokens) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What attention works on in all layers, before the rotary embedding.

    Returns:
      q `[L, B, S, K, G, H]`, k and v `[L, B, S, K, H]` in the model's dtype.
    """
    return _forward_jit(model, tokens, None, None, "qkv")[1]


def _forward(model, tokens, probe=None, kv_map=None, keep: str = ""):
    llama, config = model.module(), model.config
    length = tokens.shape[1]
    positions = jnp.arange(length)[None]
    cos, sin = cos_sin(model.rope, positions, jnp.full((1, 1), length))
    cos, sin = cos[:, :, None], sin[:, :, None]  # [1, S, 1, H/2]

    def one_layer(x, scanned):
        layer, probe_of_layer = scanned
        q, k, v = llama.qkv(layer, x)
        if probe_of_layer is not None:
            k, v = k + probe_of_layer[0].astype(k.dtype), v + probe_of_layer[1].astype(v.dtype)
        kept = {"": None, "kv": (k, v), "qkv": (q, k, v)}[keep]
        rotated = False
        if kv_map is not None:
            k, v, rotated = kv_map(layer, k, v)
        q = rotate(q, cos[..., None, :], sin[..., None, :])
        k = k if rotated else rotate(k, cos, sin)
        out = _attention(q, k, v, positions, config.sliding_window)
        return llama.finish(layer, x, out), kept

    x, kept = jax.lax.scan(one_layer, llama.embed(tokens), (jnp.arange(config.layers), probe))
    return llama.logits(x), kept


_forward_jit = jax.jit(_forward, static_argnames=("kv_map", "keep"))


def _attention(q, k, v, positions, sliding_window) -> jax.Array:
    """`causal_attention` of a text with itself, in pieces of queries if it is long."""

    # The backward pass computes the scores again: kept for all layers they would outgrow all else in memory.
    @functools.partial(jax.checkpoint, prevent_cse=False)  # unneeded inside a scan, where it only costs time
    def attend(q, q_positions):
        return causal_attention(q, k, v, q_positions, positions, sliding_window)

    length = q.shape[1]
    if length <= QUERIES_AT_ONCE:
        return attend(q, positions)
    pieces = -(-length // QUERIES_AT_ONCE)
    padding = pieces * QUERIES_AT_ONCE - length
    q = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0), (0, 0)))
    q = q.reshape(q.shape[0], pieces, QUERIES_AT_ONCE, *q.shape[2:]).swapaxes(0, 1)
    q_positions = jnp.pad(positions, ((0, 0), (0, padding))).reshape(1, pieces, QUERIES_AT_ONCE).swapaxes(0, 1)
    out = jax.lax.map(lambda piece: attend(*piece), (q, q_positions))
    return out.swapaxes(0, 1).reshape(q.shape[1], pieces * QUERIES_AT_ONCE, *q.shape[3:])[:, :length]
