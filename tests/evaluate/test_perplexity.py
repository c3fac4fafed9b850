"""Both protocols against float64 statistics of logits made another way."""

import dataclasses

import jax
import numpy as np
import pytest
from cases import make_policy

from kvjax.evaluate.compress import kv_map
from kvjax.evaluate.perplexity import Candidate, path_of, perplexity
from kvjax.model.forward import forward
from kvjax.policy import bind, preset
from kvjax.presets import kvquant

KEYS = ["quant", "bits_per_element", "nll", "perplexity", "kl", "top1_agreement", "tokens", "seconds"]


@pytest.fixture(scope="module")
def kvquant3():
    return make_policy(kvquant(3), 2, 2, 32, name="kvquant3")


def policies(*names: str):
    return [bind(name, preset(name), 2) for name in names]


def all_logits(model, windows, policy):
    through = kv_map(policy, model)
    return np.asarray(jax.jit(lambda model, tokens: forward(model, tokens, kv_map=through))(model, windows))


def in_float64(reference, logits, targets):
    """Mean NLL, mean KL and agreement, from the definitions."""
    log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (np.float64(reference), np.float64(logits)))
    nll = -np.take_along_axis(log_q, targets[..., None], -1).mean()
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1).mean()
    return nll, kl, (reference.argmax(-1) == logits.argmax(-1)).mean()


def test_all_against_float64(model, windows, kvquant3):
    results = perplexity(model, [kvquant3], windows, progress=False)
    reference = all_logits(model, windows, policies("bf16")[0])[:, :-1]
    for result, policy in zip(results, [*policies("bf16"), kvquant3]):
        logits = all_logits(model, windows, policy)[:, :-1]
        nll, kl, agreement = in_float64(reference, logits, windows[:, 1:])
        assert result.quant == policy.name
        assert result.nll == pytest.approx(nll, rel=1e-6)
        assert result.kl == pytest.approx(kl, rel=1e-3, abs=1e-12)
        assert result.top1_agreement == pytest.approx(agreement, abs=1e-12)
        assert result.perplexity == pytest.approx(np.exp(nll), rel=1e-5)
        assert result.tokens == 5 * 79
    assert results[0].bits_per_element == 16.0
    assert results[1].kl > 0.01 and results[1].top1_agreement < 1 and results[1].without_slot > 0


def test_reference_row(model, windows):
    """It comes first, wherever it is listed, and does not diverge from itself."""
    rows = perplexity(model, policies("int4", "bf16"), windows[:2], progress=False)
    assert [row.quant for row in rows] == ["bf16", "int4"]
    assert rows[0].kl == 0.0 and rows[0].top1_agreement == 1.0
    assert list(rows[0].to_json()) == KEYS


def test_batch_size_does_not_matter(model, windows):
    """In batches of two the last of three windows is filled up, and the filling not counted."""
    whole, parts = (perplexity(model, policies("f16"), windows[:3], batch=n, progress=False) for n in (3, 2))
    for row, other in zip(whole, parts):
        assert row.tokens == other.tokens
        assert row.nll == pytest.approx(other.nll, rel=1e-6)
        assert row.kl == pytest.approx(other.kl, rel=1e-2)


def test_decode_against_whole_windows(model, windows, kvquant3):
    """Behind a prefill of the sink alone, a decode step sees every other token as stored, its own too: as in "all"."""
    tokens = windows[:3, :48]
    f32 = policies("f32")[0]
    rows = perplexity(model, [f32, kvquant3], tokens, protocol="decode", prefill=1, batch=2, progress=False)
    reference = all_logits(model, tokens, policies("bf16")[0])[:, 1:-1]
    for row, policy in zip(rows[1:], (f32, kvquant3)):
        logits = all_logits(model, tokens, policy)[:, 1:-1]
        nll, kl, agreement = in_float64(reference, logits, tokens[:, 2:])
        assert row.nll == pytest.approx(nll, rel=1e-4)
        # The reference's first token is exact in its prefill, and here rounded to bfloat16.
        assert row.kl == pytest.approx(kl, rel=2e-2, abs=1e-4)
        assert row.top1_agreement == pytest.approx(agreement, abs=0.02)
        assert row.tokens == 3 * 46


def test_path(model, kvquant3):
    assert "encode and decode" in path_of(model, kvquant3, "all")
    assert "layers 0 to 1" in path_of(model, kvquant3, "decode")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prefill": 8}, "prefill=8"),
        ({"protocol": "decode", "prefill": 79}, "between 1 and 78"),
        ({"protocol": "decode", "prefill": 0}, "between 1 and 78"),
        ({"protocol": "half"}, "protocol='half'"),
        ({"batch": 0}, "batch=0"),
    ],
)
def test_settings_that_make_no_evaluation(model, windows, settings, message):
    with pytest.raises(ValueError, match=message):
        perplexity(model, policies("int4"), windows, progress=False, **settings)


def test_windows_and_policies_that_do_not_fit(model, windows):
    with pytest.raises(ValueError, match="windows"):
        perplexity(model, policies("int4"), windows[0], progress=False)
    with pytest.raises(ValueError, match="covers 3 layers"):
        perplexity(model, [Candidate(bind("int4", preset("int4"), 3))], windows, progress=False)
    with pytest.raises(ValueError, match="not calibrated"):
        perplexity(
            model, [dataclasses.replace(policies("int4")[0], segments=bind("k", kvquant(3), 2).segments)], windows
        )
