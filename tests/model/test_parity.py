"""Logits equal transformers': against stored numbers everywhere, and against torch itself where it is installed."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from model.variants import GOLDEN, PROMPT, VARIANTS, golden, run_torch

from kvjax.model.forward import forward

TOLERANCE = 1e-4
each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=str)


@functools.cache
def our_logits(variant, length: int, tokens: bytes) -> np.ndarray:
    """[S, V]: the two tests of a variant share one run, and variants that differ in frequencies one compilation."""
    tokens = np.frombuffer(tokens, np.int32)[None, :length]
    return np.asarray(forward(variant.loaded_to_run(), jnp.asarray(tokens))[0])


def check(variant, run: dict[str, np.ndarray]):
    tokens = run["tokens"].tobytes()
    whole = our_logits(variant, len(run["tokens"]), tokens)
    np.testing.assert_allclose(whole, run.get("full_logits", run["logits"]), atol=TOLERANCE, rtol=0)
    if variant.dynamic:  # the frequencies of the prompt alone are others than those of the whole text
        prompt = our_logits(variant, PROMPT, tokens)
        np.testing.assert_allclose(prompt, run["logits"][:PROMPT], atol=TOLERANCE, rtol=0)


@each_variant
def test_equals_stored_logits(variant):
    check(variant, golden(variant))


@each_variant
def test_equals_torch(variant):
    pytest.importorskip("torch")
    run = run_torch(variant)
    stored = golden(variant)
    np.testing.assert_array_equal(run["tokens"], stored["tokens"])
    np.testing.assert_allclose(run["logits"], stored["logits"], atol=TOLERANCE, rtol=0)
    check(variant, run)


def test_every_rope_and_window_matters():
    """These share the weights and prompt of "plain" and have other logits: an ignored setting would be seen."""
    plain = golden(VARIANTS[0])["logits"][:PROMPT]
    for variant in VARIANTS:
        if variant.name.startswith(("rope", "mistral-window8")) and variant.name != "rope-dynamic-crossing":
            difference = np.abs(golden(variant)["logits"][:PROMPT] - plain).max()
            assert difference > 100 * TOLERANCE, (variant.name, difference)


def test_goldens_are_those_of_the_variants():
    with np.load(GOLDEN) as stored:
        assert {name.split(".")[0] for name in stored.files} == {v.name for v in VARIANTS} | {"source"}
    assert GOLDEN.stat().st_size < 300_000


def test_rows_of_a_batch_are_independent():
    variant = VARIANTS[0]
    run, model = golden(variant), variant.loaded()
    tokens = jnp.asarray(run["tokens"])
    logits = forward(model, jnp.stack([jnp.roll(tokens, 1), tokens]))
    np.testing.assert_allclose(logits[1], run["logits"], atol=TOLERANCE, rtol=0)
