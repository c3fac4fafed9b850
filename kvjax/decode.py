"""The public decode API: a compressed cache for our Llama models, and for anyone's.

    cache = init_cache(model, policy, batch=B, capacity=n)
    logits, cache = prefill(model, cache, tokens, lengths)
    logits, cache = step(model, cache, token)
    tokens, cache = generate(model, cache, tokens, lengths, max_new_tokens=100)

`prefill`, `step`, `score` and `generate` consume the cache they are given (its buffers are donated): keep the one they
return. Bring your own model with `append`, `attend` and `advance` (`kvjax.byo`), which consume nothing.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import attention as _attention
from kvjax import cache as _cache
from kvjax import checks, sharding
from kvjax.attention import explain
from kvjax.byo import advance, append, attend, attend_and_count
from kvjax.cache import CacheShape, KVCache
from kvjax.fused import arranged, block_tokens
from kvjax.model import cached
from kvjax.rows import crop, fork
from kvjax.sampling import Sampler, sample
from kvjax.targets import default_target

__all__ = [
    "CacheShape", "KVCache", "advance", "append", "attend", "attend_and_count", "bits_per_element", "bits_read", "crop",
    "explain", "fork", "generate", "init_cache", "nbytes", "prefill", "score", "statistics", "step",
]  # fmt: skip


def init_cache(
    model: Any,
    policy: Any,
    *,
    batch: int,
    capacity: int,
    dtype: Any = None,
    block: int | None = None,
    target: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> KVCache:
    """An empty cache for `batch` rows of up to `capacity` tokens each.

    Args:
      model: a loaded model, or a `CacheShape` for a model of your own.
      policy: from `kvjax.policy`.
      batch: rows.
      capacity: tokens per row, rounded up to whole blocks.
      dtype: type of recent tokens and sinks; the model's, or float32 for a `CacheShape`.
      block: tokens per block, a multiple of 32; None for what suits the target (`kvjax.fused.block_tokens`).
      target: what a decode step's attention is compiled for, such as "tpu:v5p", "gpu:sm_90" or "cpu"; "reference" for
        plain jnp everywhere; None for the first device.
      mesh: devices to spread the cache over, from `kvjax.sharding.make_mesh`: rows over `data`, blocks of the context
        over `seq`, heads over `tensor`. The model's weights must be on it too (`kvjax.load(..., mesh=mesh)`).

    Raises:
      NotImplementedError: for methods that read in part (AlignedKV) where `seq` is not 1.
      ValueError: for sizes that make no cache, and for a policy fitted to another shape.
    """
    if isinstance(policy, str):
        raise ValueError(f"`policy={policy!r}` is a name; pass kvjax.policy({policy!r}, model).")
    shape = model if isinstance(model, CacheShape) else shape_of(model)
    dtype = dtype or (jnp.float32 if model is shape else model.dtype)
    policy.check(shape)
    if (
        mesh is not None
        and mesh.shape.get("seq", 1) > 1
        and any(codec.reads_in_part for s in policy.segments for codec in (s.k_codec, s.v_codec))
    ):
        raise NotImplementedError(
            f"`mesh`: seq={mesh.shape['seq']}, but {policy.name} chooses what it reads of a block by those before; "
            "use seq=1 (data and tensor may be more), or kivi4, kvquant3 or int4."
        )
    target = target or default_target(mesh)
    block = block or block_tokens(policy, target)
    policy = arranged(policy, shape, target, mesh)
    return _cache.init(
        shape, policy, batch=batch, capacity=capacity, dtype=dtype, target=target, block=block, mesh=mesh
    )


def prefill(
    model: Any,
    cache: KVCache,
    tokens: Any,
    lengths: Any = None,
    attention: Literal["exact", "cached"] = "exact",
) -> tuple[jax.Array, KVCache]:
    """Reads prompts, or further text behind what the cache holds, and returns each row's next-token logits.

    Args:
      model: a loaded model.
      cache: consumed; may hold tokens already (multi-turn).
      tokens: `[B, S]` integers, right-padded.
      lengths: `[B]` tokens of each row, 1 to S; None for S.
      attention: "exact": the tokens of this call see each other's uncompressed K/V and earlier calls through the cache,
        as in the papers; keeps the call's hidden states and one layer's K/V, and chunks everything else.
        "cached": every token sees what a decode step at its position would see, so any split of a text gives the same
        result; its temporaries do not depend on S.

    Returns:
      logits `[B, V]` float32 of each row's last token, and the cache.

    Raises:
      ValueError: for an empty or out-of-range prompt, and where it does not fit the cache, which stays usable; also
        where the method stores float16 planes (AlignedKV) and a key or value leaves float16's range.
    """
    tokens, counts = checks.prompt(cache, tokens, lengths, model.config.vocab)
    checks.mode(attention)
    checks.room(cache, counts)
    padded = np.zeros((tokens.shape[0], _bucket(tokens.shape[1])), np.int32)
    padded[:, : tokens.shape[1]] = tokens
    run = cached.prefill_exact if attention == "exact" else cached.prefill_cached
    _check_range(cache)
    logits, cache = run(model, cache, padded, counts)
    _check_range(cache)
    return logits, cache


def step(model: Any, cache: KVCache, token: Any, active: Any = None) -> tuple[jax.Array, KVCache]:
    """One decode step: `token[B]` in, logits `[B, V]` of the next one out. One trace for any number of steps.

    Args:
      cache: consumed.
      active: `[B]` booleans; rows that are False do not take the token. None for all rows.

    Raises:
      ValueError: for what is not one id per row, and where a row is full; the cache stays usable. Under a trace the row
        is left as it is and counted in `statistics(cache)["overrun"]`. Also where a key or value that an earlier call
        stored left the range of float16 planes (this call's own is found by the next: a step does not wait for its
        result).
    """
    counts, token = checks.active(cache, active), checks.token(cache, token, model.config.vocab)
    checks.room(cache, counts)
    _check_range(cache)
    return cached.step(model, cache, token, counts)


def score(model: Any, cache: KVCache, tokens: Any) -> tuple[jax.Array, KVCache]:
    """Teacher-forced decoding: `tokens[B, S]` one by one through the real decode step; logits `[B, S, V]`."""
    tokens, counts = checks.prompt(cache, tokens, None, model.config.vocab)
    checks.room(cache, counts)
    _check_range(cache)
    logits, cache = cached.score(model, cache, tokens)
    _check_range(cache)
    return logits, cache


def generate(
    model: Any,
    cache: KVCache,
    tokens: Any,
    lengths: Any = None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    eos: tuple[int, ...] | None = None,
    attention: Literal["exact", "cached"] = "exact",
    on_token: Any = None,
    on_prefill: Any = None,
) -> tuple[np.ndarray, KVCache]:
    """Prefills and samples.

    Args:
      cache: consumed.
      tokens, lengths, attention: as in `prefill`.
      max_new_tokens: at least 1; a row ends earlier at an end-of-sequence token.
      temperature: 0 is greedy; otherwise logits are divided by it.
      top_k: sample among the k most likely; 0 for all.
      top_p: sample among the most likely tokens whose probabilities reach p together.
      seed: the draws of row i depend on the seed and on i, not on the other rows.
      eos: ids that end a row; None for the model's, () for none.
      on_token: called with `[B]` int32 after every token (streaming); rows that ended repeat their last token. Where
        there are many processes, each calls its own.
      on_prefill: called with the cache when it holds the prompt, to save or to fork it; it is consumed afterwards.

    Returns:
      new tokens `[B, max_new_tokens]` int32, padded with the row's end-of-sequence token, and the cache, which holds
      everything but the last sampled token.
    """
    if max_new_tokens < 1:
        raise ValueError(f"`max_new_tokens={max_new_tokens}` must be at least 1.")
    sampler = Sampler(temperature, top_k, top_p)
    eos_ids = jnp.asarray(model.config.eos_ids if eos is None else eos, jnp.int32)
    tokens, counts = checks.prompt(cache, tokens, lengths, model.config.vocab)
    checks.room(cache, counts + (max_new_tokens - 1))
    logits, cache = prefill(model, cache, tokens, counts, attention)
    if on_prefill:
        on_prefill(cache)
    key = jax.random.key(seed)
    token, done = _first_token(sampler, cache.mesh, logits, key, eos_ids)
    out = [token]
    if on_token:
        on_token(np.asarray(token))
    for i in range(1, max_new_tokens):
        # Waiting for `done` on every step would keep the device idle between steps; streaming waits anyway.
        if (on_token or i % 16 == 1) and np.asarray(done).all():
            break
        token, done, cache = _next_token(sampler, model, cache, token, done, key, i, eos_ids)
        out.append(token)
        if on_token:
            on_token(np.asarray(token))
    _check_range(cache)
    new = np.stack([np.asarray(t) for t in out], axis=1)
    return np.concatenate([new, np.repeat(new[:, -1:], max_new_tokens - new.shape[1], axis=1)], axis=1), cache


def bits_per_element(cache: KVCache) -> float:
    """Bits of sealed storage per K/V element: codes, metadata and outlier slots as allocated (abstract arrays too)."""
    bits = sum(8 * _bytes((s.k, s.v)) for s in cache.segments)
    elements = 2 * sum(s.layers * _blocks(s) for s in cache.segments)
    return bits / (elements * cache.batch * cache.block * cache.shape.kv_heads * cache.shape.head_dim)


def bits_read(cache: KVCache) -> dict[str, float] | None:
    """Average bits that attention read per sealed element it saw, by methods that read in part (AlignedKV).

    Counted over the cache's life, by layers whose codecs are read in part, where tokens attended through the cache:
    decode steps and prefill with attention "cached". Metadata and estimates are included; see `kvjax.reads`.

    Returns:
      `keys`, `values` and `all`: bits needed; `keys_units`, `values_units` and `all_units`: as moved in units of 64
      bytes. None where everything is read, and before anything was.
    """
    counts = [sharding.on_host(s.reads).astype(np.float64).sum((0, 1)) for s in cache.segments if s.reads is not None]
    if not counts or not np.sum(counts):
        return None
    (k, k_bits, k_units), (v, v_bits, v_units) = np.sum(counts, 0).reshape(2, -1)
    ratios = {
        "keys": k_bits / k, "values": v_bits / v, "all": (k_bits + v_bits) / (k + v),
        "keys_units": k_units / k, "values_units": v_units / v, "all_units": (k_units + v_units) / (k + v),
    }  # fmt: skip
    return {name: float(ratio) for name, ratio in ratios.items()}


def nbytes(cache: KVCache) -> int:
    """Everything the cache allocates: sealed blocks, ring, sinks, tables, counters and spare capacity."""
    return _bytes(cache)


def statistics(cache: KVCache) -> dict[str, int]:
    """What did not fit, over the cache's life.

    Returns:
      `dropped_outliers`: elements of sealed blocks that saturated, because no slot was left or because they leave the
      range of the method's float16; `overrun`: tokens refused under a trace for want of capacity.
    """
    dropped = sum(int(sharding.on_host(s.dropped).sum()) for s in cache.segments)
    return {"dropped_outliers": dropped, "overrun": int(sharding.on_host(cache.overrun).sum())}


def _check_range(cache: KVCache) -> None:
    """Raises where float16 planes hold a key or value that saturated; a traced cache can't be checked."""
    for segment in cache.segments:
        if segment.reads is None or isinstance(segment.dropped, jax.core.Tracer):
            continue
        dropped = sharding.on_host(segment.dropped).sum((0, 2))
        if dropped.any():
            row = int(dropped.argmax())
            raise ValueError(
                f"`policy` {cache.policy!r} stores float16, but {dropped[row]} keys and values of row {row} leave its "
                "range of +-65504 with this model; use bf16, which has float32's."
            )


def shape_of(model: Any) -> CacheShape:
    """What a cache must know of a loaded model."""
    c = model.config
    return CacheShape(c.layers, c.q_heads, c.kv_heads, c.head_dim, model.rope, c.sliding_window)


def _bytes(tree: Any) -> int:
    return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def _blocks(segment: Any) -> int:
    return jax.tree.leaves(segment.v)[0].shape[2]


def _bucket(tokens: int) -> int:
    """The padded length: few shapes to compile, at most an eighth wasted beyond 256 tokens."""
    unit = max(_attention.QUERY_CHUNK, 1 << max(tokens.bit_length() - 3, 0))
    return 1 << max(tokens - 1, 31).bit_length() if tokens <= unit else -(-tokens // unit) * unit


@functools.partial(jax.jit, static_argnames=("sampler", "mesh"))
def _first_token(sampler, mesh, logits, key, eos_ids):
    token = sample(sampler, logits, jax.random.fold_in(key, 0))
    return sharding.replicated((token, (token[:, None] == eos_ids[None, :]).any(-1)), mesh)


@functools.partial(jax.jit, static_argnames="sampler", donate_argnames="cache")
def _next_token(sampler, model, cache, token, done, key, i, eos_ids):
    """Feeds `token` to the rows that go on and draws their next one; ended rows repeat theirs."""
    x, cache = cached.forward_chunk(model, cache, token[:, None], jnp.where(done, 0, 1))
    drawn = sample(sampler, model.module().logits(x[:, 0]), jax.random.fold_in(key, i))
    token = jnp.where(done, token, drawn)
    done = done | (token[:, None] == eos_ids[None, :]).any(-1)
    return *sharding.replicated((token, done), cache.mesh), cache
