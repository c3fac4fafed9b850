"""Choosing the next token: greedy, temperature, top-k, top-p."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How to draw from logits; static under jit.

    Attributes:
      temperature: 0 is greedy.
      top_k: keep the k most likely tokens; 0 keeps all.
      top_p: keep the most likely tokens until their probabilities reach p (at least one); 1 keeps all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ValueError(f"`temperature={self.temperature}` must be 0 (greedy) or positive.")
        if self.top_k < 0:
            raise ValueError(f"`top_k={self.top_k}` must be 0 (all) or positive.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p={self.top_p}` must lie in (0, 1].")


def sample(sampler: Sampler, logits: jax.Array, key: jax.Array) -> jax.Array:
    """Draws one token per row of `logits[B, V]`, int32 `[B]`; row i's draw depends on `key` and i alone."""
    if sampler.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampler.temperature
    if sampler.top_k and sampler.top_k < logits.shape[-1]:
        floor = jax.lax.top_k(logits, sampler.top_k)[0][:, -1:]
        logits = jnp.where(logits < floor, -jnp.inf, logits)
    if sampler.top_p < 1:
        ranked = jnp.sort(logits, axis=-1, descending=True)
        p = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(p, axis=-1) - p  # mass of the tokens more likely than this one
        floor = jnp.where(before < sampler.top_p, ranked, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits < floor, -jnp.inf, logits)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(logits.shape[0]))
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
