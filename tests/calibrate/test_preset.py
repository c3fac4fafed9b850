"""A preset's calibration from text to file and back, and the script around it."""

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from kvjax.cache import CacheShape
from kvjax.calibrate.preset import calibrate, load, save
from kvjax.codecs.kvquant import NUQChannelCodec, NUQTokenCodec
from kvjax.model.rope import make_rope
from kvjax.model.weights import init_random
from kvjax.model.weights import load as load_model
from kvjax.policy import Preset, bind
from kvjax.policy import preset as named_preset

PRESET = Preset(
    keys=NUQChannelCodec(bits=3, outliers=0.1, pre_rope=True),
    values=NUQTokenCodec(bits=2, q_norm=True, table="nf"),
    sinks=1,
)


@pytest.fixture(scope="module")
def calibration(small):
    return calibrate(small, "mixed", PRESET, samples=2, length=20, progress=False)


def test_keys_and_values_are_fitted_for_their_own_codecs(small, calibration):
    keys, values = calibration.params
    assert keys["levels"].shape == (2, 8) and values["levels"].shape == (2, 4)
    assert (calibration.meta.keys.table, calibration.meta.values.table) == ("fisher*s2", "nf")
    assert (calibration.meta.keys.slots, calibration.meta.values.slots) == (1, 0)
    policy = bind("mixed", PRESET, small.config.layers, keys, values)
    policy.check(CacheShape(2, 2, 1, 8, small.rope))
    x = jax.random.normal(jax.random.key(0), (1, 5, 8))
    layer = {name: array[0] for name, array in keys.items()}
    assert np.isfinite(PRESET.keys.roundtrip(x, layer)).all()


def test_the_report_has_a_row_per_layer_and_tensor(calibration):
    rows = calibration.report()
    assert [(row["layer"], row["tensor"]) for row in rows] == [(i, t) for i in (0, 1) for t in ("keys", "values")]
    keys = rows[0]
    assert 0 < keys["outliers"] <= 1 / 8 and 0 <= keys["dropped"] < 0.1 and keys["error_vs_uniform"] < 1
    assert rows[1]["outliers"] == 0


def test_file_and_back(small, calibration, tmp_path):
    path = tmp_path / "mixed.safetensors"
    save(path, calibration)
    loaded = load(path, small, "mixed", PRESET)
    assert loaded.meta == calibration.meta and loaded.report() == []
    jax.tree.map(np.testing.assert_array_equal, loaded.params, calibration.params)
    # Q-Norm is the codec's choice between two tables of one file.
    load(path, small, "mixed", dataclasses.replace(PRESET, values=NUQTokenCodec(bits=2, table="nf")))

    other = init_random(small.config, make_rope(8, 64), seed=1)
    with pytest.raises(
        ValueError, match=r"`model` is .* recalibrate with scripts/calibrate.py --model M --quant mixed"
    ):
        load(path, other, "mixed", PRESET)
    stretched = dataclasses.replace(small, rope=make_rope(8, 64, rope_type="linear", factor=2.0))
    with pytest.raises(ValueError, match="`rope` is"):
        load(path, stretched, "mixed", PRESET)
    for change, message in [
        ({"sinks": 4}, "`sinks` is 1 in the file but must be 4"),
        ({"weights": "fisher"}, r"`keys.table` is 'fisher\*s2' in the file but must be 'fisher'"),
        ({"keys": dataclasses.replace(PRESET.keys, bits=4)}, "`keys.bits` is 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            load(path, small, "mixed", dataclasses.replace(PRESET, **change))


def test_bad_requests_are_refused(small):
    with pytest.raises(ValueError, match="`quant=bf16` needs no calibration"):
        calibrate(small, "bf16", named_preset("bf16"))
    with pytest.raises(ValueError, match="`samples=0`"):
        calibrate(small, "mixed", PRESET, samples=0)
    with pytest.raises(
        ValueError, match="`length=65` must be more than 2 tokens and at most the model's context of 64"
    ):
        calibrate(small, "mixed", PRESET, length=65)
    swapped = dataclasses.replace(PRESET, keys=NUQTokenCodec(bits=3))
    with pytest.raises(ValueError, match="`quant=swapped` cannot be calibrated"):
        calibrate(small, "swapped", swapped)


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    monkeypatch.delitem(sys.modules, "calibrate", raising=False)
    import calibrate

    return calibrate.main


def test_script_writes_a_file_that_loads(script, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("The whale is a fish. Call me anything else.\n" * 40, encoding="utf-8")
    out = tmp_path / "kvquant2.safetensors"
    arguments = ["--model", "tiny", "--quant", "kvquant2", "--text", str(text), "--samples", "2", "--length", "40"]
    assert script([*arguments, "--out", str(out)]) == 0
    report = capsys.readouterr().out
    assert "kvquant2 fitted on 80 tokens (text.txt sha256:" in report
    tiny = load_model("tiny")
    assert load(out, tiny, "kvquant2", named_preset("kvquant2")).meta.tokens == 80


@pytest.mark.parametrize(
    "change, message",
    [
        ({"--quant": "kvquant9"}, "kvquant9"),
        ({"--quant": "int4"}, "needs no calibration"),
        ({"--model": "nowhere"}, "nowhere"),
        ({"--text": "nowhere.txt"}, "nowhere.txt"),
        ({"--length": "5000"}, "`length=5000`"),
        ({"--out": "nowhere/x.safetensors"}, "create it first"),
    ],
)
def test_script_refuses_bad_input_in_one_line(script, tmp_path, capsys, change, message):
    text = tmp_path / "text.txt"
    text.write_text("Too short.", encoding="utf-8")
    arguments = {"--model": "tiny", "--quant": "kvquant2", "--text": str(text), "--out": str(tmp_path / "x")} | change
    with pytest.raises(SystemExit) as error:
        script([part for pair in arguments.items() for part in pair])
    stderr = capsys.readouterr().err
    assert error.value.code == 2
    assert stderr.startswith("error: ") and stderr.count("\n") == 1 and message in stderr
