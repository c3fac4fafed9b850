"""Time of a whole model's decode step at several contexts, against the bf16 cache in the same run."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import kvjax
from kvjax.decode import init_cache, prefill, step
from kvjax.policy import preset

BASE = "bf16"
_WARM_UP = 3


def measure(
    model_name: str,
    quants: Sequence[str],
    contexts: Sequence[int],
    batch: int,
    rounds: int,
    track: Callable[[range, str], Any],
) -> list[dict[str, Any]]:
    """Rows of `quant, context, batch, ms_per_step, time_over_bf16`; `track(range, what)` shows progress."""
    quants = [BASE, *(q for q in quants if q != BASE)]
    for quant in quants:
        preset(quant)
    model = kvjax.load(model_name)
    policies = {quant: kvjax.policy(quant, model) for quant in quants}
    rng = np.random.default_rng(0)
    rows = []
    for context in contexts:
        # Random tokens: what the K/V are does not matter to the time, that they are not zeros does.
        tokens = rng.integers(0, model.config.vocab, (batch, context))
        caches = {}
        for quant in quants:
            cache = init_cache(model, policies[quant], batch=batch, capacity=context + rounds + 8)
            _, caches[quant] = prefill(model, cache, tokens)
        seconds: dict[str, list[float]] = {quant: [] for quant in quants}
        token = tokens[:, -1]
        for i in track(range(rounds + _WARM_UP), f"decoding at {context} tokens"):
            for quant in quants:  # in turn, so that a busy machine slows all alike
                start = time.perf_counter()
                logits, caches[quant] = step(model, caches[quant], token)
                logits.block_until_ready()
                if i >= _WARM_UP:
                    seconds[quant].append(time.perf_counter() - start)
        base = np.median(seconds[BASE])
        for quant in quants:
            median = float(np.median(seconds[quant]))
            rows.append({"quant": quant, "context": context, "batch": batch, "ms_per_step": 1e3 * median})
            rows[-1]["time_over_bf16"] = median / base
    return rows
