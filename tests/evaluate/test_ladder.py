"""The ablation: its steps hang together, and a step is what the same policy measures by itself."""

import numpy as np
import pytest

from kvjax.calibrate.collect import collect
from kvjax.calibrate.fit import fit_tables
from kvjax.evaluate import report
from kvjax.evaluate.ladder import ladder, steps
from kvjax.evaluate.perplexity import REFERENCE, perplexity
from kvjax.evaluate.text import Text
from kvjax.policy import bind
from kvjax.presets import PRESETS, kvquant


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_step_changes_an_earlier_one(bits):
    seen = [REFERENCE]
    for step in steps(bits):
        assert step.against in seen and step.name not in seen
        seen.append(step.name)
        if step.name in PRESETS:
            assert step.preset == PRESETS[step.name]
    by_name = {step.name: step.preset for step in steps(bits)}
    assert by_name[f"1 % outliers (kvquant{bits})"] == PRESETS[f"kvquant{bits}"]
    assert by_name[f"1 exact sink (kvquant{bits}-dense)"] == PRESETS[f"kvquant{bits}-dense"]


def test_ladder(model, windows):
    calibration = np.random.default_rng(1).integers(0, 64, (3, 80))
    chosen = [s for s in steps(3) if s.name.startswith(("1 exact", "1 % outliers (", "dense, K ranges"))]
    rows = ladder(model, windows[:2], calibration, chosen, progress=False)
    assert [row.result.quant for row in rows] == [REFERENCE, *(step.name for step in chosen)]
    measured = {row.result.quant: row.result for row in rows}
    assert [row.delta is None for row in rows] == [True, True, False, False]  # the rest lacks what it changes
    assert rows[2].delta == rows[2].result.perplexity - rows[1].result.perplexity
    assert all(np.isfinite(row.result.nll) and row.result.kl > 0 for row in rows[1:])

    tables = fit_tables(collect(model, calibration, outlier_fractions=(0.0, 0.01), progress=False)[0.01], 3)
    alone = bind("alone", kvquant(3), 2, tables["keys"], tables["values"])
    (_, result) = perplexity(model, [alone], windows[:2], progress=False)
    assert result.nll == pytest.approx(measured["1 % outliers (kvquant3)"].nll, rel=1e-6)
    assert result.bits_per_element == measured["1 % outliers (kvquant3)"].bits_per_element

    text = Text(windows.reshape(-1), 1000, "t", "newline")
    assert report.ladder_table(rows, text).row_count == len(rows)
    assert list(rows[1].to_json())[-2:] == ["against", "delta"]
