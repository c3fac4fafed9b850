"""Prefill and decode through the cache equal transformers' runs with its own: the prompt, then 20 greedy tokens.

The cache is uncompressed, in blocks of 32, so that one block seals while decoding and 12 tokens wait. The variants are
those where a cache can go wrong and a forward pass cannot: each crosses a limit of its model.
"""

import numpy as np
import pytest
from model.variants import PROMPT, VARIANTS, golden

import kvjax.decode
from kvjax.policy import bind, preset

# Name to (tokens given to prefill, tokens given to decode steps).
RUNS = {
    "mistral-window8": (PROMPT, 0),  # the window ends within the prompt
    "mistral-window30": (0, 44),  # the text outgrows the window while decoding; MQA
    "rope-dynamic-crossing": (PROMPT, 20),  # frequencies change at each step from the 33rd token on
}


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.name in RUNS], ids=str)
def test_cache_equals_transformers(variant):
    run, model = golden(variant), variant.loaded()
    prefilled, decoded = RUNS[variant.name]
    tokens = run["tokens"][None]
    policy = bind("f32", preset("f32"), model.config.layers)
    cache = kvjax.decode.init_cache(model, policy, batch=1, capacity=44, block=32)
    if prefilled:
        last, cache = kvjax.decode.prefill(model, cache, tokens[:, :prefilled])
        np.testing.assert_allclose(last[0], run["logits"][prefilled - 1], atol=1e-4, rtol=0)
    if decoded:
        logits, cache = kvjax.decode.score(model, cache, tokens[:, prefilled:])
        np.testing.assert_allclose(logits[0], run["logits"][prefilled:], atol=1e-4, rtol=0)
    assert cache.length.tolist() == [prefilled + decoded]
