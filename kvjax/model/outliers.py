"""A model that behaves like a big one: outlier channels for any Llama checkpoint, without changing what it computes.

In models of 7B a few key channels are consistently many times larger than the rest (KVQuant, arXiv 2401.18079, section
3.1; KIVI, arXiv 2402.02750, section 3): one range per token then leaves no levels for the others. A small model has
milder ones, so methods look alike on it. `rewrite` makes them large by scaling channels where another weight undoes it.

`LLAMA2_7B` imitates what is written of Llama-2-7B: a handful of key channels per head (1 RoPE pair in 16) in its slow
pairs (arXiv 2502.01563: massive values sit at low frequencies, in the same region of all heads, and not in the values),
8 or 16 times as large; values milder, without a pattern: 1 channel in 8 twice as large. On the tiny model (one window
of 1024 tokens of wikitext2-test, CPU) the largest channel of a layer, as a multiple of the median one, becomes

    keys    3.3 7.8 7.5 2.9 6.8  ->  8.8 19.8 16.1 23.5 10.5    (aimed at: about 5 to 20)
    values  3.4 1.4 1.5 1.5 2.0  ->  3.3  2.2  2.4  2.4  3.5    (aimed at: about 2 to 4)

Perplexity (16 windows of 1024 tokens of wikitext2-test, protocol "all", calibrated on wikitext2-valid), beside the
paper's LLaMA-7B (Table 1; there bf16 is fp16, kvquant with 1 % outliers):

                bf16               int4              int3          kvquant4          kvquant3
    tiny       87.50    87.95 (+0.5 %)    89.80 (+2.6 %)    87.50 (-0.0 %)    88.03 (+0.6 %)
    rewritten  87.50  109.89 (+25.6 %) 216.84 (+147.8 %)    87.49 (-0.0 %)    88.12 (+0.7 %)
    LLaMA-7B    5.68     5.98 (+5.3 %)   10.87 (+91.4 %)     5.69 (+0.2 %)     5.75 (+1.2 %)

KVQuant's keys do not notice: ranges are per channel, and the k-means weights Fisher * s^2 are the same at any scale.

Not imitated: a scaling moves no mean, so a channel has the offset that it had, in proportion; outlier tokens; and the
queries, which in large models are large where the keys are, become small there, so that the outliers themselves matter
no more than before. int4 loses more here than at 7B. The profile is the first of four tried, not the best
fit: with `key_factors=(8,)` int4 loses 4 % and int3 36 %, with (4, 8, 16) 25 % and 142 %, and kvquant3 the same 0.5 %.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.model.config import ModelConfig
from kvjax.model.forward import forward_with_kv
from kvjax.model.llama import LoadedModel


@dataclasses.dataclass(frozen=True)
class OutlierProfile:
    """Which channels grow, and by how much; the same in every kv head, the channels drawn per layer and head.

    Attributes:
      key_fraction: share of a head's RoPE pairs that are scaled, both channels of a pair alike; rounded up to a pair.
      key_factors: powers of two, one drawn for each of these pairs.
      key_band: the pairs are drawn from this part of a head's pairs, 0 the fastest and 1 the slowest.
      value_fraction: share of a head's value channels that are scaled, rounded up to a channel.
      value_factors: powers of two, one drawn for each of these channels.
      seed: of what is drawn.
    """

    key_fraction: float = 1 / 16
    key_factors: tuple[float, ...] = (8.0, 16.0)
    key_band: tuple[float, float] = (0.75, 1.0)
    value_fraction: float = 1 / 8
    value_factors: tuple[float, ...] = (2.0,)
    seed: int = 0

    def __post_init__(self):
        for name in ("key_fraction", "value_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}={getattr(self, name)}` must lie between 0 (no channel) and 1 (all of them).")
        for name in ("key_factors", "value_factors"):
            factors = getattr(self, name)
            if not factors or not all(math.isfinite(f) and f > 0 and math.frexp(f)[0] == 0.5 for f in factors):
                raise ValueError(
                    f"`{name}={factors}` must be powers of two, such as 4, 8 or 16: only they round no weight."
                )
        low, high = self.key_band
        if not 0 <= low < high <= 1:
            raise ValueError(f"`key_band={self.key_band}` must be two rising numbers from 0 (fastest) to 1 (slowest).")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"`seed={self.seed!r}` must be an integer from 0.")


LLAMA2_7B = OutlierProfile()


def key_factors(config: ModelConfig, profile: OutlierProfile) -> np.ndarray:
    """What each key channel is multiplied by, `[L, K, H]` float32; channels i and i + H/2 turn together: one factor."""
    pairs = config.head_dim // 2
    low, high = profile.key_band
    # A band narrower than a pair still holds the pair it lies in.
    first = min(math.floor(low * pairs), pairs - 1)
    band = max(math.ceil(high * pairs), first + 1) - first
    count = math.ceil(profile.key_fraction * pairs)
    if count > band:
        raise ValueError(
            f"`key_fraction={profile.key_fraction}` asks for {count} pairs per head, but "
            f"`key_band={profile.key_band}` holds {band} of {pairs}; widen the band."
        )
    drawn = _draw(config, count, band, profile.key_factors, (profile.seed, 0))
    factors = np.ones((config.layers, config.kv_heads, pairs), np.float32)
    factors[..., first : first + band] = drawn
    return np.concatenate([factors, factors], axis=-1)


def value_factors(config: ModelConfig, profile: OutlierProfile) -> np.ndarray:
    """What each value channel is multiplied by, `[L, K, H]` float32."""
    count = math.ceil(profile.value_fraction * config.head_dim)
    return _draw(config, count, config.head_dim, profile.value_factors, (profile.seed, 1))


def _draw(config, count: int, width: int, factors: tuple[float, ...], seed: tuple[int, int]) -> np.ndarray:
    """`[L, K, width]` of ones, with `count` random entries of each row drawn from `factors`."""
    drawn = np.ones((config.layers, config.kv_heads, width), np.float32)
    for layer, head in np.ndindex(drawn.shape[:2]):
        # A stream per layer and head: the first layers of a deeper model draw what those of a shallow one do.
        rng = np.random.default_rng([*seed, layer, head])
        drawn[layer, head, rng.permutation(width)[:count]] = rng.choice(factors, count)
    return drawn


def rewrite(model: LoadedModel, profile: OutlierProfile = LLAMA2_7B) -> LoadedModel:
    """The same function of the tokens, by other keys and values.

    With c the key factors and d the value factors, channel by channel,

        k' = k * c,  q' = q / c,  v' = v * d,  o'(x) = o(x / d)

    leave scores and outputs as they are: c is the same for both channels of a RoPE pair, so it commutes with the
    rotation, and the query heads of a group share their kv head's factors. All factors are powers of two: no weight or
    activation is rounded anew (short of float16's range), and the logits are equal to the bit.

    Works on sharded weights and, inside `jax.eval_shape`, on abstract ones. `path` is kept for the tokenizer; the
    fingerprint is the new weights', so calibrations beside the model's files are not used for them.

    Args:
      model: any Llama or Mistral model, with attention biases or without.
      profile: what to scale.

    Raises:
      ValueError: one line, for a profile that asks for more pairs than its band has.
    """
    keys, values = key_factors(model.config, profile), value_factors(model.config, profile)
    factors = {
        "k": keys[..., None],  # [L, K, H, D]
        "k_bias": keys,
        "q": 1 / keys[:, :, None, :, None],  # [L, K, G, H, D]
        "q_bias": 1 / keys[:, :, None, :],
        "v": values[..., None],
        "v_bias": values,
        "o": 1 / values[:, None, :, None, :],  # [L, D, K, G, H]; its bias is added behind it
    }
    scaled = {
        name: weight * jnp.asarray(factors[name], weight.dtype)
        for name, weight in model.state.items()
        if name in factors
    }
    return model.with_state(model.state | scaled)


@dataclasses.dataclass(frozen=True)
class Measured:
    """The outliers that a model has, by layer; channels are those of all kv heads of a layer.

    Attributes:
      keys: `[L]`, the largest mean magnitude of a key channel before RoPE, as a multiple of the median channel's.
      values: `[L]`, the same of the values.
      key_outliers: `[L]`, share of key channels beyond `OUTLIER` times the median.
    """

    keys: np.ndarray
    values: np.ndarray
    key_outliers: np.ndarray


OUTLIER = 5.0


def profile_of(model: LoadedModel, tokens) -> Measured:
    """Measures key and value outliers on `tokens` `[B, S]`; the first of each row, an attention sink, is left out."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise ValueError(f"`tokens` of shape {tokens.shape} must be [B, S], with at least 2 tokens in a row.")
    keys, values = (np.asarray(x) for x in _ratios(model, tokens))
    return Measured(keys.max(-1), values.max(-1), (keys > OUTLIER).mean(-1))


@jax.jit
def _ratios(model, tokens) -> tuple[jax.Array, jax.Array]:
    """Mean magnitude of every channel over its layer's median, `[L, K * H]` float32, of keys and of values."""
    _, k, v = forward_with_kv(model, tokens)

    def ratios(x):  # [L, B, S, K, H]
        magnitude = jnp.abs(x[:, :, 1:].astype(jnp.float32)).mean((1, 2)).reshape(x.shape[0], -1)
        return magnitude / jnp.median(magnitude, axis=-1, keepdims=True)

    return ratios(k), ratios(v)
