"""Statistics of predictions against those of the reference, summed so that nothing is lost.

Per token in float32 on the device, where the logits are; over tokens in float64 on the host, in the order of the text,
so that the sums do not depend on how windows were batched.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@jax.jit
def token_statistics(reference: jax.Array, logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Per prediction: negative log-likelihood, KL(reference || this) in nats, and whether the likeliest token agrees.

    With x = log p - log q of the two distributions and x' = x - E_p[x],

        KL = E_p[x] = log E_p[exp(-x')] = log(1 + E_p[expm1(-x') + x']),

    the last because sum q = 1. A divergence of 1e-6 is a mean of log ratios a thousand times larger that cancel, and
    the rounding of either log-sum-exp (1e-6) would drown it; every term of the last form is positive, it does not need
    the log-sum-exp of q, and it is 0 for equal logits.

    Args:
      reference, logits: `[..., V]` float32.
      targets: `[...]` integers, the tokens that came.

    Returns:
      `[3, ...]` float32.
    """
    log_p = jax.nn.log_softmax(reference)
    p = jnp.exp(log_p)
    at_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nll = jax.nn.logsumexp(logits, axis=-1) - at_target
    x = reference - logits  # up to a constant, which x' does not see
    x = x - (p * x).sum(-1, keepdims=True)
    # Far apart, exp(-x') overflows where p has no mass; there nothing cancels in the plain form.
    close = jnp.log1p((p * (jnp.expm1(-jnp.maximum(x, -50.0)) + x)).sum(-1))
    plain = (p * (log_p - jax.nn.log_softmax(logits))).sum(-1)
    kl = jnp.where(plain < 0.01, jnp.maximum(close, 0.0), plain)
    agree = (reference.argmax(-1) == logits.argmax(-1)).astype(jnp.float32)
    return jnp.stack([nll, kl, agree])


@dataclasses.dataclass
class Totals:
    """Running sums over predictions, float64."""

    sums: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(3))
    tokens: int = 0

    def add(self, statistics: np.ndarray) -> None:
        """Adds `[3, rows, predictions]` of `token_statistics`; each row is summed by itself, then the rows in turn."""
        for row in np.asarray(statistics, np.float64).swapaxes(0, 1):
            self.sums = self.sums + row.sum(-1)
            self.tokens += row.shape[-1]

    @property
    def nll(self) -> float:
        return float(self.sums[0] / self.tokens)

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.nll))

    @property
    def kl(self) -> float:
        return float(self.sums[1] / self.tokens)

    @property
    def top1_agreement(self) -> float:
        return float(self.sums[2] / self.tokens)
