"""One long context, prefilled call by call and continued, with its memory measured against what is predicted.

The prediction: on every device its part of the cache, by `kvjax.plan`, and the larger of the temporaries of prefill and
of a decode step, by XLA for the compiled functions. Virtual devices of CPU share a process, whose memory must grow by
the sum over them once the model is loaded and everything is compiled.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from kvjax import decode, sharding
from kvjax.cache import KVCache
from kvjax.chips import Chip
from kvjax.evaluate import float64_step
from kvjax.evaluate.resident import CompiledBytes, Watch, compiled_bytes, peak_bytes
from kvjax.model import cached
from kvjax.model.config import ModelConfig
from kvjax.model.llama import LoadedModel
from kvjax.model.rope import make_rope
from kvjax.model.weights import ASSETS, init_random
from kvjax.plan import PARTS, plan
from kvjax.policy import Policy, policy

# The shipped tokenizer's vocabulary. Weights so large that attention is to a few thousand of a million tokens: with
# the usual 0.02 all weigh alike, and no error in attention would show.
RANDOM = ModelConfig(
    layers=1, width=64, mlp_width=128, q_heads=1, kv_heads=1, head_dim=32, vocab=4096, initializer_range=0.2
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is run.

    Attributes:
      quant: a preset.
      tokens: of context; chunk: of a prefill call.
      new_tokens: decode steps.
      attention: of prefill, as in `decode.prefill`.
      prefill_window: in prefill a token attends to this many of the newest only, so that its time is linear in
        `tokens`; decode steps see all. None for what the model says.
      compare_at: other contexts to compile for, to compare temporaries.
    """

    quant: str
    tokens: int
    chunk: int = 16384
    new_tokens: int = 16
    attention: str = "exact"
    prefill_window: int | None = None
    compare_at: tuple[int, ...] = ()

    def __post_init__(self):
        for name in ("tokens", "chunk", "new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}={getattr(self, name)}` must be at least 1.")

    @property
    def calls(self) -> int:
        return -(-self.tokens // self.chunk)

    @property
    def capacity(self) -> int:
        return self.tokens + self.new_tokens + 1  # a step more, for the check


def random_model(tokens: int, mesh: jax.sharding.Mesh | None = None, seed: int = 0) -> LoadedModel:
    """One layer, one head of 32 channels, with the shipped model's tokenizer."""
    model = init_random(RANDOM, make_rope(RANDOM.head_dim, tokens), seed)
    model = dataclasses.replace(model, path=str(ASSETS / "tiny"))
    return model if mesh is None else sharding.shard_model(model, mesh)


@dataclasses.dataclass(frozen=True)
class Bench:
    """A model and a preset on a mesh, and what they make for a context."""

    model: Any
    policy: Policy
    settings: Settings
    mesh: jax.sharding.Mesh | None

    @property
    def devices(self) -> int:
        return 1 if self.mesh is None else self.mesh.size

    def cache(self, capacity: int | None = None) -> KVCache:
        return decode.init_cache(
            self.model, self.policy, batch=1, capacity=capacity or self.settings.capacity, mesh=self.mesh
        )

    def abstract(self, capacity: int | None = None) -> KVCache:
        """The cache without its memory."""
        return sharding.placed(jax.eval_shape(lambda: self.cache(capacity)))

    def in_prefill(self, cache: KVCache, inside: bool = True) -> KVCache:
        """The cache with the window of prefill, or with the model's again."""
        if self.settings.prefill_window is None:
            return cache
        window = self.settings.prefill_window if inside else self.model.config.sliding_window
        return dataclasses.replace(cache, shape=dataclasses.replace(cache.shape, sliding_window=window))

    def compiled(self, capacity: int | None = None) -> dict[str, CompiledBytes]:
        """Compiles prefill and step; bytes on each device."""
        cache = self.abstract(capacity)
        run = cached.prefill_exact if self.settings.attention == "exact" else cached.prefill_cached
        tokens = np.zeros((1, decode._bucket(self.settings.chunk)), np.int32)
        counts = np.ones(1, np.int32)
        token = jax.ShapeDtypeStruct((1,), np.int32)
        return {
            "prefill": compiled_bytes(run, self.model, self.in_prefill(cache), tokens, counts),
            "step": compiled_bytes(cached.step, self.model, cache, token, token),
        }


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run left behind.

    Attributes:
      cache: with the context and the steps' tokens.
      logits: `[1 + new_tokens, V]`, of prefill and of every step.
      prefill_seconds: since the start, at the end of every call.
      step_seconds: of each step.
    """

    cache: KVCache
    logits: np.ndarray
    prefill_seconds: list[float]
    step_seconds: list[float]

    @property
    def tokens(self) -> np.ndarray:
        """The likeliest after each of them: what the next step is fed."""
        return self.logits.argmax(-1).astype(np.int32)


def measure(
    model: Any,
    text: np.ndarray,
    settings: Settings,
    mesh: jax.sharding.Mesh | None = None,
    check: bool = False,
    one_device: bool = False,
    say: Callable[[str], None] = print,
    track: Callable[[int, float], None] = lambda done, seconds: None,
) -> dict[str, Any]:
    """Prefills `text` repeated to the wanted length, takes greedy decode steps, and reports.

    Args:
      model: loaded, on the mesh.
      text: token ids `[n]`.
      check: compare one more step with float64 attention over the decoded cache (`kvjax.evaluate.float64_step`).
      one_device: do it again without the mesh, and compare logits.
      say: told what is going on; track: told tokens and seconds of prefill after every call.

    Returns:
      figures, ready for JSON.
    """
    bench = Bench(model, policy(settings.quant, model), settings, mesh)
    compiled = {settings.tokens: bench.compiled()}
    for tokens in settings.compare_at:
        compiled[tokens] = bench.compiled(tokens + settings.new_tokens + 1)
    predicted = predict(bench, compiled[settings.tokens])
    say(f"compiled; memory should grow by {predicted['sum_over_devices'] / 2**20:.1f} MiB")
    ids = np.resize(np.asarray(text, np.int32), settings.tokens)
    with Watch() as watch:
        outcome = run(bench, ids, track)
    facts = describe(bench, outcome) | {
        "memory": {
            "before": watch.before, "growth": watch.growth, "peak_of_process": peak_bytes(), "predicted": predicted,
        },
        "compiled_per_device": {n: {k: dataclasses.asdict(v) for k, v in c.items()} for n, c in compiled.items()},
    }  # fmt: skip
    if one_device:
        say("doing it again on one device")
        alone = Bench(jax.device_put(model, jax.devices()[0]), bench.policy, settings, None)
        again = run(alone, ids, fed=outcome.tokens)
        facts["one_device"] = {
            "logits": float(np.abs(outcome.logits - again.logits).max()),
            "largest_logit": float(np.abs(again.logits).max()),
        }
    if check:
        say("checking a step against float64 attention")
        found = float64_step.compare(model, outcome.cache, outcome.tokens[-1:])
        facts["check"] = dataclasses.asdict(found)
    return facts


def describe(bench: Bench, outcome: Outcome) -> dict[str, Any]:
    """The figures of a run that need no prediction."""
    settings, mesh, cache = bench.settings, bench.mesh, outcome.cache
    seconds, step = outcome.prefill_seconds, float(np.median(outcome.step_seconds))
    return {
        **dataclasses.asdict(settings),
        "mesh": None if mesh is None else {axis: size for axis, size in mesh.shape.items() if size > 1},
        "devices": bench.devices,
        "path": decode.explain(cache),
        "bits_per_element": decode.bits_per_element(cache),
        "cache_bytes": decode.nbytes(cache),
        "cache_bytes_per_device": sharding.device_bytes(cache),
        "bf16_bytes": decode.nbytes(dataclasses.replace(bench, policy=policy("bf16", bench.model)).abstract()),
        **decode.statistics(cache),
        "prefill_seconds": seconds[-1],
        "prefill_tokens_per_s": settings.tokens / seconds[-1],
        "prefill_curve": thinned(settings, seconds),
        "decode_ms_per_step": 1e3 * step,
        "decode_tokens_per_s": 1 / step,
    }


def predict(bench: Bench, compiled: dict[str, CompiledBytes]) -> dict[str, int]:
    """Bytes by which memory must grow: the cache as `kvjax.plan` counts it, and what comes and goes beside it."""
    settings, model = bench.settings, bench.model
    chip = Chip("cpu", "cpu", memory=1, bandwidth=1.0, interconnect=1.0, flops=1.0)  # only bytes are asked for
    sizes = dict(bench.mesh.shape) if bench.mesh is not None else {}
    planned = plan(model.config, settings.quant, settings.capacity, chip, bench.devices, mesh=sizes, dtype=model.dtype)
    per_device = {
        "cache": sum(planned.parts[part] for part in PARTS if part not in ("weights", "temporaries")),
        "temporaries": max(c.temporary + c.output for c in compiled.values()),
    }
    return per_device | {"sum_over_devices": bench.devices * sum(per_device.values())}


def run(
    bench: Bench,
    ids: np.ndarray,
    track: Callable[[int, float], None] = lambda done, seconds: None,
    fed: np.ndarray | None = None,
) -> Outcome:
    """Prefill call by call, then decode steps: greedy, or of the tokens `fed`."""
    cache = jax.block_until_ready(bench.in_prefill(bench.cache()))
    chunk, padded = bench.settings.chunk, np.zeros((1, bench.settings.chunk), np.int32)
    attention: Any = bench.settings.attention
    prefill_seconds, step_seconds = [], []
    began = time.perf_counter()
    for first in range(0, len(ids), chunk):
        here = ids[first : first + chunk]
        padded[0, : len(here)] = here
        logits, cache = decode.prefill(bench.model, cache, padded, [len(here)], attention=attention)
        jax.block_until_ready((logits, cache))
        prefill_seconds.append(time.perf_counter() - began)
        track(first + len(here), prefill_seconds[-1])
    cache = bench.in_prefill(cache, inside=False)
    found = [sharding.on_host(logits)[0]]
    for i in range(bench.settings.new_tokens):
        token = np.asarray([found[-1].argmax() if fed is None else fed[i]], np.int32)
        began = time.perf_counter()
        logits, cache = decode.step(bench.model, cache, token)
        jax.block_until_ready((logits, cache))
        step_seconds.append(time.perf_counter() - began)
        found.append(sharding.on_host(logits)[0])
    return Outcome(cache, np.stack(found), prefill_seconds, step_seconds)


def thinned(settings: Settings, seconds: Sequence[float], points: int = 16) -> list[tuple[int, float]]:
    """Tokens and seconds at the end of some of the calls, the last among them."""
    every = max(1, len(seconds) // points)
    chosen = sorted({*range(every - 1, len(seconds), every), len(seconds) - 1})
    return [(min((i + 1) * settings.chunk, settings.tokens), round(seconds[i], 3)) for i in chosen]
