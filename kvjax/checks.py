"""Arguments of calls on a cache, checked before anything is touched; of what is traced, the shape alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import sharding
from kvjax.cache import KVCache


def counts(cache: KVCache, given: Any, most: int, name: str = "counts", least: int = 0) -> Any:
    """`[B]` integers from `least` to `most`, None for `most` in every row; int32, on the host unless traced."""
    if given is None:
        return np.full(cache.batch, most, np.int32)
    x = integers(cache, given, name)
    if isinstance(x, jax.core.Tracer):
        return x.astype(jnp.int32)
    if x.min() < least or x.max() > most:
        raise ValueError(f"`{name}={x.tolist()}` must lie between {least} and {most}, the tokens of this call.")
    return x.astype(np.int32)


def active(cache: KVCache, given: Any) -> Any:
    """`[B]` booleans as 0 and 1, int32; None for all rows."""
    if given is None:
        return np.ones(cache.batch, np.int32)
    return _per_row(cache, given, "active", np.bool_, "booleans").astype(np.int32)


def integers(cache: KVCache, given: Any, name: str) -> Any:
    """`[B]` integers."""
    return _per_row(cache, given, name, np.integer, "integers")


def token(cache: KVCache, given: Any, vocab: int) -> Any:
    """One id per row, `[B]` int32; those on a device are not waited for."""
    x = given if isinstance(given, jax.Array) else np.asarray(given)
    if x.shape != (cache.batch,) or not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"`token` of shape {x.shape} and type {x.dtype} must be {cache.batch} integers, one per row.")
    if isinstance(x, np.ndarray):
        _ids("token", x, vocab)
    return x.astype(np.int32)


def prompt(cache: KVCache, tokens: Any, lengths: Any, vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens `[B, S]`, zeros beyond each row's length, and lengths `[B]` from 1 to S; int32."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or tokens.shape[0] != cache.batch:
        raise ValueError(f"`tokens` of shape {tokens.shape} must be [B, S] with the cache's B={cache.batch} rows.")
    if not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"`tokens` of type {tokens.dtype} must be integers.")
    if not tokens.shape[1]:
        raise ValueError("`tokens` have no columns; an empty prompt has no last token to continue.")
    lengths = counts(cache, lengths, tokens.shape[1], "lengths", least=1)
    used = np.where(np.arange(tokens.shape[1])[None, :] < lengths[:, None], tokens, 0)
    _ids("tokens", used, vocab)
    return used.astype(np.int32), lengths


def mode(attention: str) -> None:
    if attention not in ("exact", "cached"):
        raise ValueError(f'`attention={attention!r}` must be "exact" or "cached".')


def layer(cache: KVCache, index: Any) -> None:
    if not isinstance(index, jax.core.Tracer) and not 0 <= int(index) < cache.shape.layers:
        raise ValueError(f"`layer={int(index)}` must lie between 0 and {cache.shape.layers - 1}.")


def room(cache: KVCache, counts: Any) -> None:
    """Raises where a row would overrun, and where the cache was consumed; a traced length can't be checked."""
    if isinstance(cache.length, jax.core.Tracer):
        return
    alive(cache)
    if isinstance(counts, jax.core.Tracer):
        return
    held = sharding.on_host(cache.length)
    need = held + np.asarray(counts)
    row = int(need.argmax())
    if need[row] > cache.capacity:
        raise ValueError(
            f"`capacity={cache.capacity}` tokens: row {row} holds {int(held[row])} and would need {int(need[row])}; "
            "make the cache with a larger `capacity`, or crop it."
        )


def alive(cache: KVCache) -> None:
    if not isinstance(cache.length, jax.core.Tracer) and any(x.is_deleted() for x in jax.tree.leaves(cache)):
        raise ValueError("`cache` was consumed (its buffers are donated); use the one that the last call returned.")


def _per_row(cache: KVCache, given: Any, name: str, kind: Any, called: str) -> Any:
    x = given if isinstance(given, jax.core.Tracer) else np.asarray(given)
    if x.shape != (cache.batch,) or not jnp.issubdtype(x.dtype, kind):
        raise ValueError(f"`{name}` of shape {x.shape} and type {x.dtype} must be {cache.batch} {called}, one per row.")
    return x


def _ids(name: str, x: np.ndarray, vocab: int) -> None:
    if x.min() < 0 or x.max() >= vocab:
        raise ValueError(f"`{name}` hold the id {x.max() if x.min() >= 0 else x.min()}; valid are 0 to {vocab - 1}.")
