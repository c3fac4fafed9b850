"""Policies: presets by name, shipped calibrations, and where calibrations are looked for."""

import shutil

import numpy as np
import pytest

import kvjax
from kvjax import decode
from kvjax.calibrate import preset as calibration
from kvjax.model.weights import ASSETS
from kvjax.presets import PRESETS


@pytest.fixture(scope="module")
def tiny():
    return kvjax.load("tiny")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_ready_for_the_model_that_ships(tiny, name, monkeypatch):
    """No preset calibrates: each finds its file beside the model, and says how many bits it stores."""
    monkeypatch.setattr(calibration, "calibrate", None)
    policy = kvjax.policy(name, tiny)
    assert policy.name == name and policy.sinks == PRESETS[name].sinks
    cache = decode.init_cache(tiny, policy, batch=1, capacity=128)
    # kv width 128: a value's scale and zero cost 32/128 bits; one slot of 24 bits per token and head of 64.
    preset = PRESETS[name]
    bits = np.mean([codec.bits_per_element(128, 2, 64) for codec in (preset.keys, preset.values)])
    assert decode.bits_per_element(cache) == bits
    if name.startswith("kvquant"):
        assert bits == int(name[7]) + 0.125 + (0 if "dense" in name else 0.375)


def test_q_norm_decodes_with_its_own_table(tiny):
    plain, matched = (kvjax.policy(n, tiny).segments[0] for n in ("kvquant2", "kvquant2-qnorm"))
    np.testing.assert_array_equal(plain.v_params["levels"], matched.v_params["levels"])
    assert np.abs(matched.v_params["decode_levels"] - matched.v_params["levels"]).max() > 1e-3


def test_a_missing_calibration_is_made_once_and_kept(tmp_path, monkeypatch):
    """A model directory without calibrations: the model writes its own text, and the result is found again."""
    bare = tmp_path / "model"
    shutil.copytree(ASSETS / "tiny", bare, ignore=shutil.ignore_patterns("calibration"))
    monkeypatch.setenv("KVJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(calibration, "LENGTH", 32)
    monkeypatch.setattr(calibration.calibrate, "__kwdefaults__", calibration.calibrate.__kwdefaults__ | {"samples": 1})
    model = kvjax.load(bare)
    first = kvjax.policy("kvquant3", model, progress=False)
    assert len(list((tmp_path / "cache").rglob("kvquant3.safetensors"))) == 1
    monkeypatch.setattr(calibration, "calibrate", None)
    again = kvjax.policy("kvquant3", model)
    np.testing.assert_array_equal(first.segments[0].k_params["scale"], again.segments[0].k_params["scale"])


def test_a_calibration_for_something_else_is_refused(tiny, tmp_path):
    other = ASSETS / "tiny" / "calibration" / "kvquant2.safetensors"
    with pytest.raises(ValueError, match=r"`keys.bits` is 2 .* must be 3 .*recalibrate"):
        kvjax.policy("kvquant3", tiny, calibration=other)
    for options, message in (
        ({"calibration": other}, r"`calibration=.*kvquant2.safetensors`: `quant=kivi2` needs no calibration"),
        ({"text": "/none"}, "`text=/none`: `quant=kivi2` needs no calibration"),
        ({"text": "/none", "calibration": other}, "pass one of them"),
    ):
        with pytest.raises(ValueError, match=message):
            kvjax.policy("kivi2", tiny, **options)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(other.read_bytes()[:-20])
    with pytest.raises(ValueError, match="damaged"):
        kvjax.policy("kvquant2", tiny, calibration=damaged)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        kvjax.policy("kvquant2", tiny, calibration=tmp_path / "none.safetensors")
