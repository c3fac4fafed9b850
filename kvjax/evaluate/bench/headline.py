"""A real decode step of a large model over a cache filled with random codes: how long, and in how much memory.

Weights and cache are made on the device, each array once, so that a cache fits which leaves little beside itself.
Nothing is prefilled: what the codes are does not matter to time or memory, that they are not zeros does.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import decode
from kvjax.codecs.base import AbstractCodec
from kvjax.evaluate.bench import contents, device, timing
from kvjax.evaluate.memory import abstract_cache, abstract_model
from kvjax.model import cached
from kvjax.model.config import ModelConfig
from kvjax.model.known import KNOWN
from kvjax.model.llama import LoadedModel, weight_shapes
from kvjax.model.rope import make_rope
from kvjax.policy import preset

MODELS = {
    **{name: KNOWN[name] for name in ("llama-7b", "llama-3-8b")},
    "small": ModelConfig(layers=2, width=128, mlp_width=256, q_heads=4, kv_heads=2, head_dim=64, vocab=256),
}
_WARM_UP = 3
_ENOUGH_S = 60.0


def random_model(config: ModelConfig, tokens: int, dtype: Any) -> LoadedModel:
    """Weights of `initializer_range`, norms of one."""
    rng = np.random.default_rng(0)

    def weight(i: int, name: str, shape: tuple[int, ...]) -> jax.Array:
        if name.endswith("norm"):
            return jnp.ones(shape, dtype)
        sample = jnp.asarray(config.initializer_range * rng.standard_normal((256, shape[-1])), dtype)
        return contents.draw((2, i), sample, shape)

    state = {name: weight(i, name, shape) for i, (name, shape) in enumerate(weight_shapes(config).items())}
    return LoadedModel(state, make_rope(config.head_dim, tokens), config)


def random_cache(
    name: str, shape: decode.CacheShape, tokens: int, dtype: Any, length: int, block: int | None = None
) -> decode.KVCache:
    """What `decode.init_cache` would make for one row, filled as if it held `length` tokens."""
    empty = abstract_cache(name, preset(name), shape, tokens, dtype, block=block)
    rng = np.random.default_rng(1)
    seed = iter(range(1 << 30))

    def sampled(sample: Any, spec: jax.ShapeDtypeStruct) -> jax.Array:
        return contents.draw((3, next(seed)), sample.astype(spec.dtype), spec.shape)

    def dense(spec: jax.ShapeDtypeStruct) -> jax.Array:
        return sampled(jnp.asarray(rng.standard_normal((1024, spec.shape[-1])), jnp.float32), spec)

    def storage(codec: AbstractCodec, params: Any, specs: Any) -> Any:
        x = rng.standard_normal((shape.kv_heads, empty.block, shape.head_dim))
        one = None if params is None else jax.tree.map(lambda p: p[0], params)
        block = jax.jit(codec.encode)(jnp.asarray(x, jnp.float32), one)
        return jax.tree.map(lambda leaf, spec: sampled(leaf, spec), block, specs)

    segments = []
    for s in empty.segments:
        k_params, v_params = (_params(p, rng) for p in (s.k_params, s.v_params))
        filled: dict[str, Any] = {n: dense(getattr(s, n)) for n in ("k_recent", "v_recent", "k_sinks", "v_sinks")}
        filled |= {"k_params": k_params, "v_params": v_params, "dropped": _zeros(s.dropped), "reads": _zeros(s.reads)}
        filled |= {"k": storage(s.k_codec, k_params, s.k), "v": storage(s.v_codec, v_params, s.v)}
        segments.append(dataclasses.replace(s, **filled))
    rope = jax.tree.map(lambda x: jnp.array(x, copy=True), shape)  # the cache is donated, the model is not
    rest = {n: _zeros(getattr(empty, n)) for n in ("frozen", "overrun", "pending")}
    row = jnp.full((1,), length, jnp.int32)
    return dataclasses.replace(empty, segments=tuple(segments), length=row, shape=rope, **rest)


def _zeros(specs: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), specs)


def _params(specs: Any, rng: np.random.Generator) -> Any:
    """Fitted constants as calibration makes them: levels from -1 to 1, positive scales, small zeros."""
    if specs is None:
        return None
    made = {}
    for name, spec in specs.items():
        low, high = {"scale": (1.0, 3.0), "zero": (-0.5, 0.5)}.get(name, (-1.1, 1.1))
        x = rng.uniform(low, high, spec.shape)
        made[name] = jnp.asarray(np.sort(x, axis=-1) if name.endswith("levels") else x, spec.dtype)
    return made


def measure(
    model_name: str,
    quant: str,
    tokens: int,
    rounds: int,
    layers: int | None = None,
    block: int | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Milliseconds per token at the end of a context of `tokens`, and memory.

    Raises:
      ValueError: where the step needs more memory than the device has; nothing is allocated then.
    """
    config, dtype = MODELS[model_name], jnp.bfloat16
    config = dataclasses.replace(config, layers=layers or config.layers)
    steps = rounds + _WARM_UP
    empty = abstract_cache(
        quant, preset(quant), _shape(abstract_model(config, tokens, dtype)), tokens, dtype, block=block
    )
    start = _start(empty, tokens, steps)
    analysis = _compiled_memory(config, tokens, dtype, empty)
    limit = device.memory_bytes()
    needed = analysis["argument_bytes"] + analysis["temporary_bytes"] + analysis["output_bytes"]
    if needed > limit:
        raise ValueError(
            f"`headline_tokens={tokens}`: a decode step of {model_name} with {quant} needs {needed / 2**30:.2f} GiB, "
            f"but JAX gives {limit / 2**30:.2f}; use fewer tokens or layers, or XLA_PYTHON_CLIENT_MEM_FRACTION=.98."
        )
    say(f"compiled for {needed / 2**30:.2f} of {limit / 2**30:.2f} GiB")
    ceiling = _read_ceiling()
    # The cache first: its arrays are the largest, and the allocator has not been cut up yet.
    cache = random_cache(quant, _shape(abstract_model(config, tokens, dtype)), tokens, dtype, start, block)
    model = random_model(config, tokens, dtype)
    jax.block_until_ready((model, cache))
    say(f"filled {decode.nbytes(cache) / 2**30:.2f} GiB of cache")
    facts = {
        "model": model_name, "layers": config.layers, "quant": quant, "tokens": tokens, "first_length": start,
        "bits_per_element": decode.bits_per_element(cache), "cache_bytes": decode.nbytes(cache),
        "bf16_cache_bytes": 4 * config.layers * config.kv_heads * config.head_dim * tokens,
        "weight_bytes": sum(x.nbytes for x in model.state.values()), "path": decode.explain(cache),
        "memory_limit_bytes": limit,
    } | analysis  # fmt: skip
    token, seconds = jnp.zeros((1,), jnp.int32), []
    for _ in range(steps):
        began = time.perf_counter()
        logits, cache = decode.step(model, cache, token)
        token = logits.argmax(-1).astype(jnp.int32)
        jax.block_until_ready((token, cache))
        seconds.append(time.perf_counter() - began)
        if sum(seconds[1:]) > _ENOUGH_S and len(seconds) > _WARM_UP + 2:
            break  # the reference, over a million tokens
    if not bool(jnp.isfinite(logits).all()):
        raise ValueError(f"`quant={quant}`: the logits are not finite; the times would mean nothing.")
    timed = seconds[_WARM_UP:]
    # All of it is read but the embedding's other rows, and spare blocks, which are few.
    read = facts["cache_bytes"] + facts["weight_bytes"] - model.state["embedding"].nbytes * (not config.tie_embeddings)
    rate = read / float(np.median(timed)) / 1e9
    stats = jax.devices()[0].memory_stats() or {}
    return facts | {
        "last_length": int(np.asarray(cache.length)[0]),
        "ms_per_token": 1e3 * float(np.median(timed)),
        "ms_fastest": 1e3 * min(timed),
        "ms_slowest": 1e3 * max(timed),
        "first_step_s": seconds[0],
        "rounds": len(timed),
        "peak_bytes": stats.get("peak_bytes_in_use"),
        "read_gb_per_step": read / 1e9,
        "gb_per_s": rate,
        "ceiling_gb_per_s": ceiling,
        "share_of_read": rate / ceiling,
    }


def _read_ceiling() -> float:
    """GB/s of a read-only sum."""
    read = timing.ceilings(min(device.ceiling_bytes(), device.memory_bytes() // 16))["read"]
    return read.nbytes / timing.interleave({"read": read}, rounds=15)["read"].median / 1e9


def _shape(model: LoadedModel) -> decode.CacheShape:
    c = model.config
    return decode.CacheShape(c.layers, c.q_heads, c.kv_heads, c.head_dim, model.rope)


def _start(empty: decode.KVCache, tokens: int, steps: int) -> int:
    """A length to begin at, so that a block fills, and is sealed, in one of the first timed steps."""
    held = empty.sinks + empty.window
    seals_at = held + max((tokens - steps - held) // empty.block, 0) * empty.block
    start = seals_at - _WARM_UP - 2 if seals_at > held else tokens - steps
    if start < 1:
        raise ValueError(f"`headline_tokens={tokens}` must exceed the {steps} steps that are taken.")
    return start


def _compiled_memory(config: ModelConfig, tokens: int, dtype: Any, empty: decode.KVCache) -> dict[str, int]:
    """Bytes that the compiled step needs: the arguments, temporaries, and outputs that are no donated argument."""
    token = jax.ShapeDtypeStruct((1,), jnp.int32)
    compiled = cached.step.lower(abstract_model(config, tokens, dtype), empty, token, token).compile()
    memory = compiled.memory_analysis()
    assert memory is not None  # every backend of ours has it
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes - memory.alias_size_in_bytes,
    }
