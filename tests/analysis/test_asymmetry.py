"""Errors of attention per layer, against a float64 computation of its own."""

import numpy as np
import pytest

from kvjax.analysis.asymmetry import asymmetry
from kvjax.codecs import AffineCodec
from kvjax.model.forward import causal_attention, queries_keys_values
from kvjax.model.rope import cos_sin, rotate
from kvjax.policy import bind, preset


@pytest.fixture(scope="module")
def rows(model, windows):
    one, two = (bind(name, preset(name), 2) for name in ("kivi1-g64", "kivi2"))
    return asymmetry(model, one, two, windows[:2], progress=False)


def test_against_float64(model, windows, rows):
    """All 80 queries of a window are taken; the last keys' group of 64 is filled up with copies of the last key."""
    q, k, v = (np.asarray(x, np.float64) for x in queries_keys_values(model, windows[:2]))
    position = np.arange(80)[None]
    cos, sin = cos_sin(model.rope, position[:, :, None], np.full((1, 1, 1), 80))
    k = np.stack([rotate(x.astype(np.float32), cos, sin) for x in k])
    q = np.stack([rotate(x.astype(np.float32), cos[..., None, :], sin[..., None, :]) for x in q])
    v = v.astype(np.float32)

    def through(codec, x):
        filled = np.concatenate([x, np.repeat(x[:, -1:], 48, 1)], 1).swapaxes(1, 2)
        return np.asarray(codec.roundtrip(filled)).swapaxes(1, 2)[:, :80]

    for layer, row in enumerate(rows):
        keys = through(AffineCodec(1, 64, "tokens"), k[layer])
        values = through(AffineCodec(2, 32, "channels"), v[layer])
        o, from_keys, from_values, both = (
            np.asarray(causal_attention(q[layer], a, b, position, position), np.float64)
            for a, b in ((k[layer], v[layer]), (keys, v[layer]), (k[layer], values), (keys, values))
        )
        for name, stored in (("from_keys", from_keys), ("from_values", from_values), ("from_both", both)):
            expected = np.sqrt(np.square(o - stored).sum() / np.square(o).sum())
            assert getattr(row, name) == pytest.approx(expected, rel=1e-4)
        assert row.k_error == pytest.approx(np.linalg.norm(keys - k[layer]) / np.linalg.norm(k[layer]), rel=1e-5)
        assert row.v_error == pytest.approx(np.linalg.norm(values - v[layer]) / np.linalg.norm(v[layer]), rel=1e-5)
        assert row.ratio == pytest.approx((row.from_keys / row.from_values) ** 2)


def test_the_theorem_holds_with_the_proofs_sign(rows):
    for row in rows:
        assert row.theorem < 1e-12 and row.printed > 0.01


def test_the_law_is_near_what_was_measured(rows):
    """The law takes errors of tokens and channels to be independent; a codec's are so only in part."""
    for row in rows:
        assert 0.5 < row.law_from_values / row.from_values < 2
        assert 0.3 < row.law_from_keys / row.from_keys < 3


def test_exact_storage_makes_no_error(model, windows):
    exact = bind("f32", preset("f32"), 2)
    row = asymmetry(model, exact, exact, windows[:1], progress=False)[1]
    assert row.from_keys == row.from_values == row.k_error == row.ratio * row.v_error == 0 or row.ratio == float("inf")
    with pytest.raises(ValueError, match="covers 3 layers"):
        asymmetry(model, bind("f32", preset("f32"), 3), exact, windows)
    with pytest.raises(ValueError, match="must be"):
        asymmetry(model, exact, exact, windows[0])
