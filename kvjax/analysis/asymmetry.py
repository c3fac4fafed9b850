"""How far each layer's attention output is off from stored keys alone, and from stored values alone.

AsymKV's observation (arXiv 2410.13212, section 3, Fig. 1) measured on real q, k and v of a text, every layer fed with
exact activations, beside what the variance law (`kvjax.analysis.theorem`) predicts from nothing but the size of the
codec's errors; and a float64 check of Theorem 1's sign on the same numbers.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.analysis import theorem
from kvjax.cache import CacheShape
from kvjax.evaluate.compress import KVMap, kv_map
from kvjax.evaluate.progress import bar
from kvjax.model.forward import queries_keys_values
from kvjax.model.llama import LoadedModel
from kvjax.model.rope import cos_sin, rotate
from kvjax.policy import Policy

QUERIES = 128  # of each window, evenly spread: scores of all would grow with the square of its length


@dataclasses.dataclass(frozen=True)
class LayerErrors:
    """One layer; errors are root mean squares relative to that of the exact thing.

    Attributes:
      layer: of the model, from 0.
      k_error, v_error: of the stored keys (after RoPE) and values themselves.
      logit_error: spread of the logits' errors over the tokens a query attends to, nats (an error they share is free).
      from_keys, from_values, from_both: of the attention output.
      law_from_keys, law_from_values: the same by the variance law.
      ratio: from_keys / from_values, squared: ρ of the variance law, measured.
      theorem, printed: largest deviation of Theorem 1 from the true difference, relative to the largest difference,
        with the proof's sign and with the printed one; float64, the last query of each row of the first batch.
    """

    layer: int
    k_error: float
    v_error: float
    logit_error: float
    from_keys: float
    from_values: float
    from_both: float
    law_from_keys: float
    law_from_values: float
    ratio: float
    theorem: float
    printed: float

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def asymmetry(
    model: LoadedModel,
    keys: Policy,
    values: Policy,
    windows: np.ndarray,
    *,
    block: int = 128,
    progress: bool = True,
) -> list[LayerErrors]:
    """Errors of each layer's attention output over windows of text.

    Args:
      model: from `kvjax.load`.
      keys, values: the policy whose keys are measured, and the one whose values are (sinks count as theirs).
      windows: `[n, S]` tokens; a window at a time.
      block: tokens per block.
      progress: show a bar on stderr.
    """
    windows = np.asarray(windows)
    if windows.ndim != 2 or not len(windows) or windows.shape[1] < 2:
        raise ValueError(f"`windows` of shape {windows.shape} must be [n, S] with S at least 2.")
    config = model.config
    for policy in (keys, values):
        policy.check(CacheShape(config.layers, config.q_heads, config.kv_heads, config.head_dim, model.rope))
    maps = kv_map(keys, model, block), kv_map(values, model, block)
    measure = jax.jit(functools.partial(_measure, maps))
    layers = config.layers
    sums = np.zeros((layers, 12))
    signs: list[tuple[float, float]] = []
    with bar(progress, "layers") as shown:
        task = shown.add_task("attention errors", total=len(windows) * layers)
        for n, window in enumerate(windows):
            q, k, v = queries_keys_values(model, window[None])
            for layer in range(layers):
                found, last = measure(model, jnp.int32(layer), q[layer], k[layer], v[layer])
                sums[layer] += np.asarray(found, np.float64)
                if n == 0:
                    signs.append(_theorem_in_float64(last))
                shown.advance(task)
    return [_row(layer, sums[layer], *signs[layer]) for layer in range(layers)]


def _measure(maps: tuple[KVMap, KVMap], model: LoadedModel, layer: jax.Array, q, k, v) -> tuple[jax.Array, Any]:
    """Sums over one layer of a batch, and the last query with what it attends to."""
    k_stored, v_stored = maps[0](layer, k, v)[0], maps[1](layer, k, v)[1]
    length = k.shape[1]
    cos, sin = cos_sin(model.rope, jnp.arange(length)[None, :, None], jnp.full((1, 1, 1), length))
    k = rotate(k, cos, sin)
    q = rotate(q, cos[..., None, :], sin[..., None, :])
    at = jnp.arange((length - 1) % max(1, length // QUERIES), length, max(1, length // QUERIES))  # ends with the last
    # Heads in front, query heads of a kv head beside their queries: [B, K, G, Q or T, H].
    q = q[:, at].transpose(0, 2, 3, 1, 4).astype(jnp.float32)
    k, k_stored, v, v_stored = (x.swapaxes(1, 2)[:, :, None].astype(jnp.float32) for x in (k, k_stored, v, v_stored))
    distance = at[:, None] - jnp.arange(length)[None, :]
    visible = distance >= 0
    if model.config.sliding_window is not None:
        visible &= distance < model.config.sliding_window

    a, a_stored = (_weights(q, keys, visible) for keys in (k, k_stored))
    o = a @ v
    from_keys, from_values, from_both = o - a_stored @ v, a @ (v - v_stored), o - a_stored @ v_stored
    k_error, v_error = k - k_stored, v - v_stored
    e = q @ k_error.swapaxes(-1, -2) * q.shape[-1] ** -0.5
    mean = (a * e).sum(-1, keepdims=True)
    spread = (a * jnp.square(e - mean)).sum(-1)
    # The variance law with the errors' variance by channel of each kv head.
    k_variance, v_variance = (jnp.square(x).mean(-2, keepdims=True) for x in (k_error, v_error))
    squared = jnp.square(a)
    moment = squared @ jnp.square(v) - 2 * o * (squared @ v) + jnp.square(o) * squared.sum(-1, keepdims=True)
    law_keys = (jnp.square(q) * k_variance).sum(-1, keepdims=True) / q.shape[-1] * moment
    law_values = squared.sum(-1, keepdims=True) * v_variance
    sums = [jnp.square(x).sum() for x in (k, k_error, v, v_error)]
    sums += [spread.sum(), jnp.float32(spread.size)]
    sums += [jnp.square(x).sum() for x in (o, from_keys, from_values, from_both)] + [law_keys.sum(), law_values.sum()]
    return jnp.stack(sums), (q[..., -1, :], k, k_stored, v, visible[-1])


def _weights(q: jax.Array, k: jax.Array, visible: jax.Array) -> jax.Array:
    scores = q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5
    return jax.nn.softmax(jnp.where(visible[None, None, None], scores, jnp.finfo(jnp.float32).min), axis=-1)


def _theorem_in_float64(last: Any) -> tuple[float, float]:
    q, k, k_stored, v, visible = (np.asarray(x) for x in last)
    q, k, k_stored, v = (x.astype(np.float64) for x in (q, k, k_stored, v))
    a, a_stored = (theorem.attention_weights(q, keys, visible) for keys in (k, k_stored))
    true = theorem.mix(a - a_stored, v)
    e = theorem.logit_error(q, k - k_stored)
    scale = max(float(np.abs(true).max()), np.finfo(np.float64).tiny)
    right, printed = (float(np.abs(theorem.error_from_keys(a, e, v, s) - true).max()) / scale for s in (-1, 1))
    return right, printed


def _row(layer: int, sums: np.ndarray, right: float, printed: float) -> LayerErrors:
    k, k_error, v, v_error, spread, queries, o, keys, values, both, law_keys, law_values = sums

    def relative(part: float, whole: float) -> float:
        return float(np.sqrt(max(part, 0.0) / whole)) if whole else 0.0

    return LayerErrors(
        layer=layer,
        k_error=relative(k_error, k),
        v_error=relative(v_error, v),
        logit_error=relative(spread, queries),
        from_keys=relative(keys, o),
        from_values=relative(values, o),
        from_both=relative(both, o),
        law_from_keys=relative(law_keys, o),
        law_from_values=relative(law_values, o),
        ratio=float(keys / values) if values else float("inf"),
        theorem=right,
        printed=printed,
    )
