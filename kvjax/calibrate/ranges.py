"""Exact quantiles per channel over a stream of tokens, in bounded memory.

KVQuant fixes the range of every key channel offline as the percentiles f/2 and 1 - f/2 of its calibration
tokens (arXiv 2401.18079, Section 3.4). Only the ends of each channel's distribution matter for that, and the
number of tokens is known before the first batch: keeping the `f/2 * N + 3` largest and smallest values is
enough to read both percentiles exactly, whatever the batches were.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Leaf = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tails:
    """The ends of each channel's values so far.

    Attributes:
      largest: `[..., C, m]` float32, descending, filled with -inf.
      smallest: `[..., C, m]` float32, ascending, filled with +inf.
      seen: int32 scalar, how many values per channel have been merged.
    """

    largest: Leaf
    smallest: Leaf
    seen: Leaf


def init_tails(shape: tuple[int, ...], tokens: int, outlier_fraction: float) -> Tails:
    """Empty tails for channels of `shape` `[..., C]` that will see `tokens` values each.

    They answer `range_of` for any fraction up to `outlier_fraction`.
    """
    if tokens < 1:
        raise ValueError(f"`tokens={tokens}`: a range needs at least one calibration token besides the sinks.")
    _check_fraction(outlier_fraction)
    kept = min(math.ceil(outlier_fraction / 2 * (tokens - 1)) + 2, tokens)
    return Tails(
        largest=jnp.full((*shape, kept), -jnp.inf, jnp.float32),
        smallest=jnp.full((*shape, kept), jnp.inf, jnp.float32),
        seen=jnp.int32(0),
    )


def merge_tails(tails: Tails, x) -> Tails:
    """Adds a batch `x` `[..., N, C]` of N values per channel."""
    x = jnp.swapaxes(jnp.asarray(x, jnp.float32), -1, -2)
    kept = tails.largest.shape[-1]
    largest, _ = jax.lax.top_k(jnp.concatenate([tails.largest, x], -1), kept)
    smallest, _ = jax.lax.top_k(-jnp.concatenate([tails.smallest, x], -1), kept)
    return Tails(largest, -smallest, tails.seen + x.shape[-1])


def range_of(tails: Tails, outlier_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """The percentiles f/2 and 1 - f/2 of each channel, `[..., C]` float64; f = 0 gives minimum and maximum.

    Equal to `numpy.quantile` with linear interpolation over all values merged so far.
    """
    _check_fraction(outlier_fraction)
    last = int(tails.seen) - 1
    position = outlier_fraction / 2 * last
    low = math.floor(position)
    lower = _between(tails.smallest, low, min(low + 1, last), position - low)
    # From the top, but with the rounding of (1 - f/2) * (N - 1) that numpy has.
    position = (1 - outlier_fraction / 2) * last
    low = math.floor(position)
    upper = _between(tails.largest, last - low, max(last - low - 1, 0), position - low)
    return lower, upper


def _between(values: Leaf, index: int, following: int, weight: float) -> np.ndarray:
    if max(index, following) >= values.shape[-1]:
        raise ValueError("`outlier_fraction` is larger than the one these tails were made for.")
    a, b = (np.asarray(values[..., i], np.float64) for i in (index, following))
    with np.errstate(invalid="ignore"):  # an infinite channel gives nan
        # From the nearer end, as numpy: exact at both ends and monotone in between.
        return a + (b - a) * weight if weight < 0.5 else b - (b - a) * (1 - weight)


def _check_fraction(outlier_fraction: float) -> None:
    if not 0 <= outlier_fraction < 1:
        raise ValueError(f"`outlier_fraction={outlier_fraction}` must be at least 0 and below 1, e.g. 0.01.")
