"""AsymKV's error analysis of attention over stored keys and values (arXiv 2410.13212, section 3), corrected.

One query q against T tokens: s = q K^T / sqrt(H), A = softmax(s), o = A V. With E^k = K - K*, E^v = V - V* of what is
stored (K*, V*), and e = q E^k^T / sqrt(H), the error of each logit, the output is off by

    o - o* = A E^v                                        from values (Proposition 2)
    o - o* = (A (1 - sr exp(-e))) V                       from keys (Theorem 1)
    sr = sum_j exp(s_j) / sum_j exp(s*_j) = 1 / sum_j A_j exp(-e_j)

The paper prints the second with exp(+e), which the line before the last of its own proof contradicts; the tests tell
them apart. To first order in e

    A_r - A*_r ≈ A_r (e_r - sum_j A_j e_j):

an error that all tokens share cancels, because softmax does not see a shift. For independent zero-mean errors of
variance σ_k² and σ_v² per element that leaves the variance law (ours) of one output element,

    from keys: (sum_c q_c² σ_kc² / H) sum_r A_r² (v_r - o)²             from values: σ_v² sum_r A_r²

so keys matter more where |q|² / H, what the query adds to a key's error, is large: not because of the exponential.

Works on numpy arrays (in their precision, so also in float64) and on JAX arrays. Shapes: q `[..., H]`; k, v and their
errors `[..., T, H]`; A and e `[..., T]`. A masked token has weight 0 through `visible`.
"""

from typing import Any

Array = Any  # numpy or JAX


def attention_weights(q: Array, k: Array, visible: Array | None = None) -> Array:
    """A `[..., T]`; `visible[..., T]` (bool) are the tokens that the query may see, None for all."""
    xp = q.__array_namespace__()
    scores = _dot(q, k) / q.shape[-1] ** 0.5
    if visible is not None:
        scores = xp.where(visible, scores, xp.asarray(-1e30, dtype=scores.dtype))
    weights = xp.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def logit_error(q: Array, k_error: Array) -> Array:
    """e `[..., T]`, how much each logit loses."""
    return _dot(q, k_error) / q.shape[-1] ** 0.5


def sum_ratio(weights: Array, e: Array) -> Array:
    """sr `[...]`: the softmax's denominator over that with stored keys (not a free quantity, as the paper has it)."""
    return 1 / (weights * e.__array_namespace__().exp(-e)).sum(-1)


def error_from_keys(weights: Array, e: Array, v: Array, sign: int = -1) -> Array:
    """o - o* `[..., H]` by Theorem 1: exact with the proof's sign (-1), wrong with the printed one (+1).

    sr is the true ratio of the sums with either.
    """
    growth = e.__array_namespace__().exp(sign * e)
    return mix(weights * (1 - sum_ratio(weights, e)[..., None] * growth), v)


def error_from_keys_first_order(weights: Array, e: Array, v: Array) -> Array:
    """o - o* `[..., H]` up to terms of second order in e."""
    return mix(weights * (e - (weights * e).sum(-1, keepdims=True)), v)


def error_from_values(weights: Array, v_error: Array) -> Array:
    """o - o* `[..., H]`: a convex mean of the values' errors, never amplified (Proposition 2)."""
    return mix(weights, v_error)


def variance_from_keys(q: Array, weights: Array, v: Array, k_variance: Array) -> Array:
    """Variance of o - o* `[..., H]` for independent key errors.

    Args:
      k_variance: σ_k² of the elements, `[..., H]` by channel.
    """
    spread = mix(weights**2, v**2)
    o = mix(weights, v)
    # sum A² (v - o)² = sum A² v² - 2 o sum A² v + o² sum A²
    spread = spread - 2 * o * mix(weights**2, v) + o**2 * (weights**2).sum(-1)[..., None]
    return (q**2 * k_variance).sum(-1)[..., None] / q.shape[-1] * spread


def variance_from_values(weights: Array, v_variance: Array) -> Array:
    """Variance of o - o* `[..., H]` for independent value errors; σ_v² by channel, `[..., H]`."""
    return (weights**2).sum(-1)[..., None] * v_variance


def sensitivity_ratio(q: Array, weights: Array, v: Array, k_variance: Array, v_variance: Array) -> Array:
    """ρ `[...]`: the variance that keys cause over the one that values cause, summed over the output's elements."""
    keys = variance_from_keys(q, weights, v, k_variance).sum(-1)
    return keys / variance_from_values(weights, v_variance).sum(-1)


def mix(weights: Array, v: Array) -> Array:
    """Σ_t weights[..., t] v[..., t, :]."""
    return (weights[..., None, :] @ v)[..., 0, :]


def _dot(q: Array, k: Array) -> Array:
    return (k @ q[..., None])[..., 0]
