"""Combinations of codecs chosen at call time equal real policies; the search covers all prefixes."""

import dataclasses

import numpy as np
import pytest

from kvjax.analysis.mixture import EXACT, Mixture
from kvjax.analysis.search import Point, best_by_bits, pareto, search
from kvjax.evaluate.compress import bits_of
from kvjax.evaluate.perplexity import perplexity
from kvjax.policy import bind, preset


@pytest.fixture(scope="module")
def points(model, windows):
    return search(model, windows[:3], batch=2, progress=False)


def test_the_search_equals_real_policies(model, windows, points):
    assert [(p.key_layers, p.value_layers) for p in points] == [(k, v) for k in range(3) for v in range(3)]
    names = ["asymkv-0-0", "asymkv-1-0", "asymkv-0-2", "asymkv-2-1"]
    found = {point.quant: point for point in points}
    policies = [bind(name, preset(name), 2) for name in (*names, "kivi1-twomean")]
    rows = perplexity(model, policies, windows[:3], progress=False)[1:]
    for name, policy, row in zip(names, policies, rows):
        point = found[name]
        assert point.bits_per_element == row.bits_per_element == bits_of(model, policy, capacity=80)
        assert point.nll == pytest.approx(row.nll, rel=1e-6)
        assert point.kl == pytest.approx(row.kl, rel=1e-4)
        assert point.perplexity == pytest.approx(row.perplexity, rel=1e-5)
        assert (point.top1_agreement, point.tokens) == (row.top1_agreement, row.tokens)
    # One bit at two means instead of the extremes, at the same cost.
    assert rows[-1].bits_per_element == points[0].bits_per_element and rows[-1].kl < points[0].kl


def test_exact_choices(model, windows):
    """All exact is the reference; before and after RoPE may be mixed, and sinks are the policies' own."""
    sinks = bind("s", dataclasses.replace(preset("int2"), sinks=80), 2)
    int2 = bind("int2", preset("int2"), 2)
    mixture = Mixture(model, [int2, sinks], [int2], windows[:2], batch=1)
    assert mixture.measure([[EXACT, EXACT]] * 2).kl == 0
    assert mixture.measure([[1, EXACT], [EXACT, EXACT]]).kl < 1e-4 < mixture.measure([[0, EXACT], [1, EXACT]]).kl


def test_known_points_are_not_measured_again(model, windows, points):
    new: list[Point] = []
    marked = [dataclasses.replace(point, kl=-1.0) for point in points[:-1]]
    again = search(model, windows[:3], known=marked, on_point=new.append, batch=2, progress=False)
    assert [p.kl for p in again[:-1]] == [-1.0] * 8 and [p.quant for p in new] == ["asymkv-2-2"]
    assert new[0].kl == pytest.approx(points[-1].kl)
    with pytest.raises(ValueError, match="must be fewer bits"):
        search(model, windows, high=1, low=2)


def test_best_and_pareto():
    def point(bits, kl):
        return Point("q", 0, 0, bits, 0.0, 0.0, kl, 0.0, 1)

    points = [point(2.0, 3.0), point(2.5, 1.0), point(2.5, 0.5), point(2.25, 4.0), point(3.0, 0.5), point(4.0, 0.1)]
    assert [(p.bits_per_element, p.kl) for p in best_by_bits(points)] == [
        (2.0, 3.0), (2.25, 4.0), (2.5, 0.5), (3.0, 0.5), (4.0, 0.1),
    ]  # fmt: skip
    assert [p.bits_per_element for p in pareto(points)] == [2.0, 2.5, 4.0]
    assert np.isfinite([p.kl for p in pareto(points)]).all()
