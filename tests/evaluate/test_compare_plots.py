"""Plots are drawn from rows alone, the same bytes each time; labels keep apart."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvjax.evaluate.compare_plots import pareto, plot_all
from kvjax.evaluate.labels import place, spread
from kvjax.evaluate.memory import cache_shape

pytest.importorskip("matplotlib")


def row(quant, bits, loss, recall):
    cells = [{"length": 256, "depth": d, "trials": 5, "correct": recall, "recall": recall / 5} for d in (0.25, 0.75)]
    return {"quant": quant, "bits_per_element": bits, "shape": "2x2x32", "passkey": cells} | {
        f"all_{key}": value for key, value in (("vs_bf16", loss), ("kl", abs(loss)))
    } | {"decode_vs_bf16": None, "decode_kl": None}  # fmt: skip


ROWS = [row("bf16", 16.0, 0.0, 5), row("int4", 4.3, -0.001, 4), row("int3", 3.3, 0.02, 3), row("nf3", 3.3, 0.03, 0)]


def test_all_plots(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        folder.mkdir()
        written = plot_all(ROWS, cache_shape("2x2x32"), folder)
        assert [path.name for path in written] == [
            f"{name}.{suffix}" for name in ("quality", "memory", "passkey") for suffix in ("png", "svg")
        ]
    for path in written:
        assert path.stat().st_size > 5000
        assert path.read_bytes() == (first / path.name).read_bytes()


def test_only_what_the_rows_hold(tmp_path):
    bare = [r | {"passkey": [], "all_vs_bf16": None, "all_kl": None} for r in ROWS]
    assert {path.stem for path in plot_all(bare, cache_shape("2x2x32"), tmp_path)} == {"memory"}


def test_pareto():
    assert pareto([(4, 1), (2, 3), (3, 3), (3, 2), (5, 1), (2, 5)]) == [(2, 3), (3, 2), (4, 1)]


@given(st.lists(st.floats(-50, 50, width=16), max_size=8))
def test_spread(wanted):
    places = spread(wanted, 2.0)
    order = np.argsort(wanted, kind="stable")
    assert (np.diff(places[order]) > 2.0 - 1e-6).all()
    assert abs(places.sum() - sum(wanted)) < 1e-6  # least squares moves the mean of no pool
    np.testing.assert_allclose(spread(places, 2.0 - 1e-6), places)


def test_labels_keep_apart():
    from kvjax.evaluate.report import plotting

    figure, axis = plotting().subplots(figsize=(5, 5))
    axis.set(xlim=(0, 1), ylim=(0, 1))
    points = [(0.5, 0.5), (0.5, 0.505), (0.51, 0.5), (0.98, 0.5), (0.02, 0.98)]
    place(axis, points, [f"preset{i}" for i in range(5)], ["k"] * 5)
    renderer = figure.canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for text in axis.texts]
    assert len(boxes) == 5
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    plotting().close(figure)
