"""Prefill and decode through the cache equal transformers' runs with its own: the prompt, then 20 greedy tokens.

The cache is uncompressed, in blocks of 32, so that one block seals while decoding and 12 tokens wait. The windows and
dynamic frequencies of the variants change within the run.
"""

import numpy as np
import pytest
from model.variants import PROMPT, VARIANTS, golden

import kvjax.decode
from kvjax.policy import bind, preset


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_cache_equals_transformers(variant):
    run, model = golden(variant), variant.loaded_to_run()
    tokens, wanted = run["tokens"][None], run["logits"]
    policy = bind("f32", preset("f32"), model.config.layers)
    cache = kvjax.decode.init_cache(model, policy, batch=1, capacity=tokens.shape[1], block=32)
    last, cache = kvjax.decode.prefill(model, cache, tokens[:, :PROMPT])
    np.testing.assert_allclose(last[0], wanted[PROMPT - 1], atol=1e-4, rtol=0)
    logits, cache = kvjax.decode.score(model, cache, tokens[:, PROMPT:])
    np.testing.assert_allclose(logits[0], wanted[PROMPT:], atol=1e-4, rtol=0)
    assert cache.length.tolist() == [tokens.shape[1]]
