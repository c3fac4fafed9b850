"""What implementations share that read planes by blocks: what they take, and levels only where something is seen."""

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention.formats import Format, Planes


def refusal(k: Format, v: Format) -> str:
    """Why they are no planes that a kernel reads, or nothing."""
    if not (isinstance(k, Planes) and isinstance(v, Planes)):
        return "keys and values must both be stored in float16 planes"
    if k.limits is not None:
        return "keys are read by `levels`; `limits` are on probabilities, for values"
    if (k.order, v.order) != ("channels", "words"):
        return f'keys are in order "{k.order}" and values in "{v.order}"; read are "channels" and "words"'
    return ""


def check_runs(k: Planes, v: Planes) -> None:
    """Raises ValueError where a level is that of several blocks."""
    if not k.run == v.run == 1:
        raise ValueError(f"`run={k.run}` of `k` and {v.run} of `v` must be 1: every block has a level of its own.")


def where_seen(levels: jax.Array, first: jax.Array, last: jax.Array, tokens: int) -> jax.Array:
    """Levels `[B, U, K]` of runs of so many tokens, 0 where none of them is seen."""
    start = jnp.arange(levels.shape[1], dtype=jnp.int32)[None] * tokens
    seen = (start < last[:, None]) & (start + tokens > first[:, None]) & (first < last)[:, None]
    return jnp.where(seen[..., None], levels, 0)
