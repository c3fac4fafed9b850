"""Weighted histograms of normalised elements, accurate enough to stand in for the elements.

134 million elements per layer and tensor (arXiv 2401.18079, Section 4) are not kept: each bin of [-1, 1]
keeps the weight W, first moment X and second moment S of its elements. k-means on the bins' means then
differs from k-means on the elements only in that a bin goes to one cluster as a whole.
"""

import jax.numpy as jnp
import numpy as np

# Measured with 2 M log-normally weighted elements and 16 levels against 262,144 bins: the levels' error
# is larger by 3e-6 of it for Gaussian and Laplace elements, 5e-5 for gamma, 4e-3 where 99 % lie within
# ±0.03.
BINS = 4096


def bin_moments(x, weights, bins: int = BINS):
    """Moments of each bin about its centre, in units of its width: so that float32 keeps its digits.

    Args:
      x: `[n]` float32. What lies beyond ±1 counts in the end bins, with its own moments.
      weights: `[W, n]` float32, one row per weighting; 0 leaves an element out.

    Returns:
      `[W, 3, bins]` float32: sums of w, w d and w d², d = (x - centre) / width.
    """
    position = (x + 1) * (bins / 2)
    index = jnp.clip(jnp.floor(position), 0, bins - 1).astype(jnp.int32)
    d = position - index.astype(jnp.float32) - 0.5
    # One scatter per moment: measured faster on CPU than one scatter of rows of moments.
    empty = jnp.zeros((bins,), jnp.float32)
    moments = [empty.at[index].add(m) for w in weights for m in (w, w * d, w * d * d)]
    return jnp.stack(moments).reshape(len(weights), 3, bins)


def bin_points(moments: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """The non-empty bins as weighted points.

    Args:
      moments: `[3, bins]` float64, sums of what `bin_moments` returns.

    Returns:
      `points` `[n]`, each bin's mean; `weights` `[n]`; and the weighted squared error of replacing the
      elements by their bin's mean, which adds to that of any levels given to whole bins.
    """
    w, x, s = np.asarray(moments, np.float64)
    bins = len(w)
    filled = np.flatnonzero(w > 0)
    w, x, s = w[filled], x[filled], s[filled]
    mean = x / w
    points = (filled + 0.5 + mean) * (2 / bins) - 1
    within = np.sum(np.maximum(s - mean * x, 0)) * (2 / bins) ** 2
    return points, w, float(within)


def weighted_error(moments: np.ndarray, levels, decode_levels=None) -> float:
    """`sum w (x - decoded x)²` of rounding the elements to the nearest of sorted `levels`."""
    points, weights, within = bin_points(moments)
    rounded = np.asarray(levels if decode_levels is None else decode_levels)[nearest_level(points, levels)]
    return float(np.sum(weights * (points - rounded) ** 2)) + within


def nearest_level(points: np.ndarray, levels) -> np.ndarray:
    """Index of the nearest of sorted `levels`; ties go to the lower index, as in the codec."""
    levels = np.asarray(levels, np.float64)
    return np.searchsorted((levels[1:] + levels[:-1]) / 2, points, side="left")
