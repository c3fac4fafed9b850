"""Level tables from calibration statistics: KVQuant's nuqX, its baselines, and Q-Norm.

Everything is read from the histograms of one pass over the calibration tokens, for any number of bits.
"""

import dataclasses

import numpy as np

from kvjax.calibrate.histogram import bin_points, nearest_level, weighted_error
from kvjax.calibrate.kmeans import weighted_kmeans
from kvjax.codecs.tables import nf_levels, uniform_levels

# What each element's squared error counts in k-means, by row of `TensorStats.moments`.
# fisher*s2 is Eq. 7 of arXiv 2401.18079: errors of normalised elements are s times larger once rescaled.
WEIGHTINGS = ("none", "fisher", "fisher*s2")


@dataclasses.dataclass(frozen=True)
class TensorStats:
    """What calibration keeps of the keys or the values of all layers.

    Attributes:
      moments: `[L, 3, 3, bins]` float64, per weighting, the `histogram.bin_moments` of the normalised
        elements that the codes carry: outliers in slots and sink tokens are left out.
      in_slots: `[L]` int64, elements that went to an outlier slot.
      dropped: `[L]` int64, elements outside their range for which no slot was left; the codes saturate them.
      elements: elements per layer, sinks excluded.
    """

    moments: np.ndarray
    in_slots: np.ndarray
    dropped: np.ndarray
    elements: int


@dataclasses.dataclass(frozen=True)
class Stats:
    """Calibration statistics at one outlier fraction.

    Attributes:
      keys, values: the two tensors.
      scale, zero: `[L, K, 1, H]` float32, the keys' offline ranges: `key ≈ scale * level + zero`.
      outlier_fraction, slots: the fraction outside the ranges, and slots per token and head for it.
      sinks: tokens at the start of each sequence that were left out.
      tokens: calibration tokens, sinks included.
      pre_rope: the keys are those before the rotary embedding.
    """

    keys: TensorStats
    values: TensorStats
    scale: np.ndarray
    zero: np.ndarray
    outlier_fraction: float
    slots: int
    sinks: int
    tokens: int
    pre_rope: bool


def fit_tables(stats: Stats, bits: int, weights: str = "fisher*s2", qnorm: bool = False) -> dict[str, dict]:
    """The codecs' fitted constants for `bits`-bit codes.

    Args:
      stats: from `collect`.
      bits: bits per code, 1 to 8.
      weights: "fisher*s2" (the paper), "fisher" (its released code), "none" (plain k-means), or a table that
        needs no data: "uniform" (intX), "nf" (nfX).
      qnorm: match mean and standard deviation after rounding to those before, in `decode_levels`
        (Q-Norm, arXiv 2401.18079v1 to v3); without it they are the levels.

    Returns:
      `{"keys": {"levels", "decode_levels", "scale", "zero"}, "values": {"levels", "decode_levels"}}`, float32
      numpy: tables `[L, 2^bits]` sorted along the levels, scale and zero `[L, K, 1, H]`.
    """
    keys = _tables(stats.keys, bits, weights, qnorm)
    keys |= {"scale": stats.scale, "zero": stats.zero}
    return {"keys": keys, "values": _tables(stats.values, bits, weights, qnorm)}


def _tables(stats: TensorStats, bits: int, weights: str, qnorm: bool) -> dict[str, np.ndarray]:
    levels = np.stack([_levels(moments, bits, weights) for moments in stats.moments])
    decode_levels = levels
    if qnorm:
        unweighted = stats.moments[:, WEIGHTINGS.index("none")]
        decode_levels = np.stack([_moment_matched(m, table) for m, table in zip(unweighted, levels)])
    return {"levels": levels.astype(np.float32), "decode_levels": decode_levels.astype(np.float32)}


def _levels(moments: np.ndarray, bits: int, weights: str) -> np.ndarray:
    if weights == "uniform":
        return uniform_levels(bits)
    if weights == "nf":
        return nf_levels(bits)
    if weights not in WEIGHTINGS:
        wanted = ", ".join((*WEIGHTINGS, "uniform", "nf"))
        raise ValueError(f"`weights={weights!r}` is not known; use one of {wanted}.")
    points, mass, _ = bin_points(moments[WEIGHTINGS.index(weights)])
    return weighted_kmeans(points, mass, 2**bits)[0]


def _moment_matched(moments: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """`(levels - mu2) * sigma1 / sigma2 + mu1`: 1 before rounding, 2 after."""
    points, mass, within = bin_points(moments)
    if not len(points):
        return levels
    rounded = levels[nearest_level(points, levels)]
    mu1, mu2 = np.average(points, weights=mass), np.average(rounded, weights=mass)
    sigma1 = np.sqrt(np.average((points - mu1) ** 2, weights=mass) + within / mass.sum())
    sigma2 = np.sqrt(np.average((rounded - mu2) ** 2, weights=mass))
    # One level holds everything: there is no spread to restore.
    ratio = sigma1 / sigma2 if sigma2 > 0 else 1.0
    return (levels - mu2) * ratio + mu1


def sensitivity_error(stats: TensorStats, levels, decode_levels=None) -> np.ndarray:
    """Eq. 1 on the calibration data: `[L]`, sums of J² (A - Q(A))² over the elements that codes carry."""
    decode_levels = levels if decode_levels is None else decode_levels
    weighted = stats.moments[:, WEIGHTINGS.index("fisher*s2")]
    return np.array([weighted_error(*layer) for layer in zip(weighted, levels, decode_levels)])
