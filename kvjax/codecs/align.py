"""How much of a value stored in planes a query must read: AlignedKV's criteria, and error budgets.

AlignedKV (arXiv 2409.16546) keeps all 16 bits of every key and value and reads fewer of them: digits that lie below the
uncertainty of the sum they go into are wasted. A value is stored in planes, sign and exponent in the first; a query
reads the first `level` of them. Two ways to choose the level:

    criterion   the paper's: align each addend with the largest (keys) or with the result (values), by exponents alone
    worst, rms  an error budget tau: the logits, or the outputs, err by at most tau in the worst case, or by tau at
                three standard deviations of independent errors

The criterion bounds each addend and not their sum, so its error grows with the number of addends; a budget bounds the
sum. With weights w >= 0 (a query's |q_i|, or the probabilities of tokens) whose sum is W, and reading errors of at most
e_i, the budget is divided half evenly among the N addends and half in proportion to the weights:

    worst   w_i e_i       <= tau   (1/N + w_i/W) / 2       the sum over i of w_i e_i     is at most tau
    rms     w_i^2 e_i^2/3 <= tau^2 (1/N + w_i/W) / 18      the variance of the sum       is at most (tau/3)^2

(an even share alone, tau/N and tau/sqrt(3 N), would read the heaviest addends far too precisely: one token with
probability 1 would get the share of one in N). Both allow less error the larger w is, so a weight may be replaced by
an upper bound. What is not read at all (`skip`) errs in one direction, so "rms" gives it a quarter of the budget by
the rule of "worst".
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class AlignRule:
    """When the lower planes are read.

    Attributes:
      mode: "criterion", "worst" or "rms".
      budget: tau of the last two. Keys: in logits. Values: relative to the largest value the head has stored, taken up
        to the next power of two (float16) or to the outermost level (integer codes).
      scope: a channel's magnitude is the largest in the "block" of tokens at hand, or the largest "running" over all
        that is stored, as released.
      skip: not reading a value at all (it counts as 0) is allowed too.
    """

    mode: Literal["criterion", "worst", "rms"] = "criterion"
    budget: float | None = None
    scope: Literal["block", "running"] = "block"
    skip: bool = False

    def __post_init__(self):
        if self.mode not in ("criterion", "worst", "rms"):
            raise ValueError(f'`mode={self.mode!r}` must be "criterion", "worst" or "rms".')
        if self.scope not in ("block", "running"):
            raise ValueError(f'`scope={self.scope!r}` must be "block" or "running".')
        if self.mode == "criterion" and self.budget is not None:
            raise ValueError(f'`budget={self.budget}` goes with `mode="worst"` or "rms"; the criterion has none.')
        if self.mode != "criterion" and not (self.budget is not None and self.budget > 0):
            raise ValueError(f"`budget={self.budget}` must be above 0, as in 2**-4; it is the error allowed.")

    def describe(self) -> str:
        skip = ", may skip" if self.skip else ""
        if self.mode == "criterion":
            return f"by the {self.scope} criterion{skip}"
        return f"within {self.budget:.2g} ({self.mode}{skip})"


def exponent(x: jax.Array) -> jax.Array:
    """floor(log2 |x|) as int32; -127 for 0 and what is smaller than float32's normal numbers."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    return ((bits >> 23) & 255).astype(jnp.int32) - 127


def level_of_dropped(rule: AlignRule, dropped: jax.Array) -> jax.Array:
    """Planes of 8, 4 and 4 bits to read where the lowest `dropped` bits do not matter (AlignedKV: 16, 12 or 8 bits).

    The second release skips from 11 on, since one bit of the 10 in the mantissa then does not matter either.
    """
    lowest = (dropped < 11).astype(jnp.int32) if rule.skip else 1
    return lowest + (dropped < 8).astype(jnp.int32) + (dropped < 4).astype(jnp.int32)


def align_addends(rule: AlignRule, q: jax.Array, top: jax.Array) -> jax.Array:
    """Levels of channels by the largest product of their head (AlignedKV, alignment on addends).

    Args:
      q: `[..., H]`.
      top: int, the largest biased float16 exponent of the keys' channels; broadcasts against q.

    Returns:
      int32 `[..., H]`.
    """
    product = exponent(q) + jnp.maximum(top.astype(jnp.int32), 1)
    return level_of_dropped(rule, product.max(-1, keepdims=True) - product)


def align_result(rule: AlignRule, p: jax.Array, estimate: jax.Array, top: jax.Array) -> jax.Array:
    """Levels of tokens by the size of the output they go into (AlignedKV, alignment on result).

    Dropping b bits of v_t errs by at most p_t ulp(v) 2^b, which shall not exceed ulp(o).

    Args:
      p: `[..., T]` probabilities.
      estimate: `[..., H]`, of the output's magnitude.
      top: int `[..., H]`, the largest biased float16 exponent of the values' channels; broadcasts against `estimate`.

    Returns:
      int32 `[..., T]`.
    """
    base = (exponent(estimate) + 15 - jnp.maximum(top.astype(jnp.int32), 1)).min(-1, keepdims=True)
    return level_of_dropped(rule, base - exponent(p))


def within_budget(
    rule: AlignRule,
    budget: jax.Array,
    weight: jax.Array,
    total: jax.Array,
    count: jax.Array,
    errors: Sequence[jax.Array],
) -> jax.Array:
    """The lowest level at which each addend keeps to its share of the budget (see the module).

    Args:
      budget: tau, in units of the sum.
      weight: of each addend, or an upper bound of it.
      total: W, the sum of weights.
      count: N, at least the number of addends.
      errors: per level from 0, the largest error of reading no more than that; the level after the last is exact.

    All broadcast against each other.

    Returns:
      int32, in the shape of the broadcast.
    """
    share = 1.0 / count + weight / jnp.maximum(total, 1e-30)
    worst = budget * share * 0.5
    if rule.mode == "worst":
        skipped, rest = worst, worst
    else:
        part = 0.25 if rule.skip else 0.0
        skipped, rest = worst * part, budget * (1.0 - part) * jnp.sqrt(share / 6.0)
    level = jnp.zeros(jnp.broadcast_shapes(share.shape, errors[0].shape), jnp.int32) + (0 if rule.skip else 1)
    for i, error in enumerate(errors):
        if i or rule.skip:
            # Written so that an error that is not a number (infinite times 0) is not within.
            level = level + (~(weight * error <= (rest if i else skipped))).astype(jnp.int32)
    return level
