"""Level tables that need no data: NormalFloat and uniform.

A table holds the `2^bits` sorted levels in [-1, 1] that a normalised element is rounded to. The fitted
tables of KVQuant come from `kvjax.calibrate`; these two are its baselines (arXiv 2401.18079, Tables 1, 11).
"""

from statistics import NormalDist

import numpy as np


def nf_levels(bits: int) -> np.ndarray:
    """NormalFloat levels: equally likely under a normal distribution, 0 and both ends included.

    The end points are the percentiles `o = (1/32 + 1/30) / 2` and `1 - o`. The lower half has `2^(bits-1)`
    levels evenly spaced in percentile from `o` to 1/2, the upper half as many from just above 1/2 to `1 - o`,
    and each half is scaled to reach ±1 (Dettmers et al., QLoRA, arXiv 2305.14314, App. E; for widths other
    than 4 as the KVQuant authors extend it).

    Returns:
      `[2^bits]` float64, sorted.
    """
    half = 2 ** _checked(bits) // 2
    offset = (1 / 32 + 1 / 30) / 2
    lower = np.linspace(offset, 0.5, half)
    upper = np.linspace(0.5, 1 - offset, half + 1)[1:]
    inverse_cdf = np.vectorize(NormalDist().inv_cdf, otypes=[np.float64])
    lower, upper = inverse_cdf(lower), inverse_cdf(upper)
    return np.concatenate([lower / abs(lower[0]), upper / upper[-1]])


def uniform_levels(bits: int) -> np.ndarray:
    """`2^bits` evenly spaced levels from -1 to 1, float64: the integer quantizer of the same range."""
    return np.linspace(-1.0, 1.0, 2 ** _checked(bits))


def _checked(bits: int) -> int:
    if not 1 <= bits <= 8:
        raise ValueError(f"`bits={bits}` is not a table width; use 1 to 8.")
    return bits
