"""A decode step against float64 attention over the decoded cache, and the time that a growing prefill has left."""

import dataclasses

import numpy as np
import pytest
from cases import make_policy

from kvjax import decode
from kvjax.evaluate import float64_step, progress
from kvjax.model.config import ModelConfig
from kvjax.model.rope import make_rope
from kvjax.model.weights import init_random
from kvjax.policy import preset

CONFIG = ModelConfig(
    layers=2, width=32, mlp_width=32, q_heads=4, kv_heads=2, head_dim=32, vocab=64, initializer_range=0.2
)


# kvquant3: a sink, keys before RoPE, seen as stored at once. kivi2: groups, windows, several faces of recent tokens.
@pytest.mark.parametrize(("name", "lengths"), [("kvquant3", (1, 96, 161)), ("kivi2", (1, 140, 300)), ("bf16", (64,))])
def test_a_step_agrees_with_float64(name, lengths):
    model = init_random(CONFIG, make_rope(32, 512), seed=0)
    policy = make_policy(preset(name), 2, 2, 32, name)
    rng = np.random.default_rng(0)
    for length in lengths:
        cache = decode.init_cache(model, policy, batch=1, capacity=400, block=32)
        padded = rng.integers(0, 64, (1, 300))
        _, cache = decode.prefill(model, cache, padded, [length])
        found = float64_step.compare(model, cache, np.asarray([5]))
        assert max(found.outputs) < 2e-6 and len(found.outputs) == 2
        assert found.logits < 1e-5 and found.largest_logit > 1


def test_a_token_of_the_cache_that_is_off_shows():
    model = init_random(CONFIG, make_rope(32, 512), seed=0)
    cache = decode.init_cache(model, make_policy(preset("bf16"), 2, 2, 32, "bf16"), batch=1, capacity=400, block=32)
    _, cache = decode.prefill(model, cache, np.arange(200)[None] % 64)
    q = np.ones((2, 2, 32))
    k = v = np.zeros((2, 32))
    right = float64_step.attention(cache, 1, q, k, v)
    (segment,) = cache.segments
    values = segment.v.values.at[1, 0, 3].set(segment.v.values[1, 0, 4])
    segment = dataclasses.replace(segment, v=dataclasses.replace(segment.v, values=values))
    wrong = float64_step.attention(dataclasses.replace(cache, segments=(segment,)), 1, q, k, v)
    assert np.abs(wrong - right).max() > 1e-4 * np.abs(right).max()


def test_time_left_of_a_prefill_whose_calls_grow():
    # Tokens cost 1 + position / 100 seconds each: a million of them 10^4 (1 + 50).
    def seconds(tokens):
        return tokens + tokens**2 / 200

    calls = [(n, seconds(n)) for n in range(0, 5000, 1000)]
    assert progress.seconds_left(calls, 10_000) == pytest.approx(seconds(10_000) - seconds(4000))
    assert progress.seconds_left(calls[:2], 10_000) == pytest.approx(9 * seconds(1000))
    assert progress.clock(3725.4) == "1:02:05"
