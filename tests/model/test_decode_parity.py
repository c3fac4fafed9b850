"""Prefill and decode through the cache equal transformers' run with its own: the prompt, then 20 greedy tokens.

An uncompressed cache in blocks of 32, so that one block seals while decoding and 12 tokens wait.
"""

import numpy as np
import pytest
from model.variants import PROMPT, STEPS, VARIANTS, golden

import kvjax.decode
from kvjax.policy import bind, preset

NAMES = ("head96-mqa", "mistral-window8")
# These cross a limit of the model while decoding: the window, the length from which frequencies change.
CROSSING = ("mistral-window30", "rope-dynamic-crossing")


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.name in NAMES + CROSSING], ids=str)
def test_decode_equals_transformers(variant):
    run, model = golden(variant), variant.loaded()
    policy = bind("f32", preset("f32"), model.config.layers)
    cache = kvjax.decode.init_cache(model, policy, batch=1, capacity=PROMPT + STEPS, block=32)
    tokens = run["tokens"][None]
    last, cache = kvjax.decode.prefill(model, cache, tokens[:, :PROMPT])
    np.testing.assert_allclose(last[0], run["logits"][PROMPT - 1], atol=1e-4, rtol=0)
    logits, cache = kvjax.decode.score(model, cache, tokens[:, PROMPT:])
    np.testing.assert_allclose(logits[0], run["logits"][PROMPT:], atol=1e-4, rtol=0)
    assert cache.length.tolist() == [PROMPT + STEPS]
