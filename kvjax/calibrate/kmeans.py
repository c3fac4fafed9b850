"""Exact weighted k-means in one dimension.

KVQuant's levels minimise `sum_i w_i (x_i - nearest level)^2` over the normalised calibration elements
(arXiv 2401.18079, Section 3.3, Eq. 1 and 7). In one dimension the clusters of an optimum are intervals, so
the optimum is found by dynamic programming instead of by Lloyd's iterations, which stop early or in a local
minimum at 16 levels.
"""

import itertools

import numpy as np


def weighted_kmeans(points, weights, clusters: int) -> tuple[np.ndarray, float]:
    """The levels of least weighted squared error, and that error.

    `D_m[j] = min_i D_{m-1}[i] + cost(i, j)` with `cost(i, j) = S - X^2 / W` over points i..j-1, where W, X, S
    are sums of w, wx and wx². `cost` satisfies the quadrangle inequality, so the minimiser i grows with j and
    one layer takes O(n log n); all midpoints of one halving step are evaluated together.

    Args:
      points: `[n]`, any order; repeated points are joined.
      weights: `[n]`, finite and not negative; points lighter than 1e-12 of the whole are ignored, because they would
        drown in the sums. A common factor changes no level.
      clusters: how many levels to return.

    Returns:
      `[clusters]` float64 levels, strictly increasing, and the cost. Where there are fewer distinct points
      than levels, every point is a level and each spare level halves the widest gap left in [-1, 1]: it costs
      nothing here and serves elements that calibration did not see.

    Raises:
      ValueError: for shapes that differ, negative weights, or numbers that are not finite.
    """
    points, weights = np.asarray(points, np.float64), np.asarray(weights, np.float64)
    if points.ndim != 1 or points.shape != weights.shape:
        raise ValueError(f"`points` {points.shape} and `weights` {weights.shape} must be vectors of one length.")
    if not (np.isfinite(points).all() and np.isfinite(weights).all() and (weights >= 0).all()):
        raise ValueError("`points` and `weights` must be finite and no weight negative.")
    # Normalised so that neither weights of 1e-300 nor of 1e300 leave the range of the sums.
    scale = weights.max(initial=0.0)
    points, weights = _distinct(points[weights > 0], weights[weights > 0] / (scale or 1.0))
    heavy = weights > 1e-12 * weights.sum()
    points, weights = points[heavy], weights[heavy]
    if len(points) <= clusters:
        return _spread(points, clusters), 0.0
    edges = _partition(points, weights, clusters)
    levels = np.array([np.average(points[i:j], weights=weights[i:j]) for i, j in itertools.pairwise(edges)])
    members = np.repeat(levels, np.diff(edges))
    return levels, float(scale * np.sum(weights * (points - members) ** 2))


def _distinct(points: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    points, which = np.unique(points, return_inverse=True)
    weights = np.bincount(which.ravel(), weights, minlength=len(points))
    return points, weights


def _spread(points: np.ndarray, clusters: int) -> np.ndarray:
    """All points, and levels in the middle of the widest gaps until there are enough."""
    if not len(points):
        return np.linspace(-1.0, 1.0, clusters)
    levels = list(points)
    while len(levels) < clusters:
        marks = np.array([min(-1.0, levels[0]), *levels, max(1.0, levels[-1])])
        widest = int(np.argmax(np.diff(marks)))
        levels.insert(widest, float(marks[widest] + marks[widest + 1]) / 2)
    return np.array(levels)


def _partition(points: np.ndarray, weights: np.ndarray, clusters: int) -> np.ndarray:
    """Edges `[clusters + 1]` of the best partition of sorted `points` into non-empty runs."""
    n = len(points)
    # About the mean, S - X^2/W loses fewest digits.
    x = points - np.average(points, weights=weights)
    w_sum, x_sum, s_sum = (np.concatenate([[0.0], np.cumsum(v)]) for v in (weights, weights * x, weights * x**2))

    def cost(i, j):
        total = x_sum[j] - x_sum[i]
        return np.maximum(s_sum[j] - s_sum[i] - total * total / (w_sum[j] - w_sum[i]), 0.0)

    ends = np.arange(1, n + 1)
    best = cost(np.zeros_like(ends), ends)  # best[j - m] is D_m[j]; here m = 1
    starts = []
    for m in range(2, clusters + 1):
        # t = j - m counts the points beyond the m that are needed, u = i - (m - 1) likewise for m - 1.
        best, chosen = _layer(best, lambda u, t, m=m: cost(m - 1 + u, m + t), n - m + 1)
        starts.append(chosen)
    edges, t = [n], n - clusters
    for m in range(clusters, 1, -1):
        t = starts[m - 2][t]
        edges.append(m - 1 + t)
    return np.array([*edges, 0][::-1])


def _layer(previous: np.ndarray, cost, size: int) -> tuple[np.ndarray, np.ndarray]:
    """`min over u <= t of previous[u] + cost(u, t)` and its first minimiser, for t in 0..size-1."""
    best = np.empty(size)
    chosen = np.zeros(size, np.int64)
    best[0] = previous[0] + cost(np.array([0]), np.array([0]))[0]
    step = 1 << max(size - 1, 0).bit_length()
    while step > 1:
        half = step // 2
        # The multiples of `step` are known; their minimisers bound those of the odd multiples of `half`.
        t = np.arange(half, size, step)
        low = chosen[t - half]
        above = np.minimum(t + half, size - 1)
        high = np.where(t + half < size, np.minimum(chosen[above], t), t)
        counts = np.maximum(high - low, 0) + 1
        first = np.cumsum(counts) - counts
        u = np.arange(counts.sum()) + np.repeat(low - first, counts)
        values = previous[u] + cost(u, np.repeat(t, counts))
        best[t] = np.minimum.reduceat(values, first)
        chosen[t] = np.minimum.reduceat(np.where(values == np.repeat(best[t], counts), u, size), first)
        step = half
    return best, chosen
