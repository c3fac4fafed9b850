"""Names of methods: families, pairs, rotation and TOML files."""

import numpy as np
import pytest

import kvjax
from kvjax.calibrate import preset as calibration
from kvjax.codecs import AffineCodec, RotatedCodec
from kvjax.policy import bind, preset
from kvjax.presets import PRESETS


def bits(name, layers=32):
    """Bits of the keys' and of the values' codes, by layer."""
    pairs = preset(name).codecs(layers)
    return [k.bits for k, _ in pairs], [v.bits for _, v in pairs]


@pytest.mark.parametrize(("keys", "values"), [(16, 0), (32, 0), (0, 16), (6, 32), (32, 32), (0, 0)])
def test_asymkv_is_a_prefix_of_each(keys, values):
    k, v = bits(f"asymkv-{keys}-{values}")
    assert k == [2] * keys + [1] * (32 - keys) and v == [2] * values + [1] * (32 - values)
    assert (np.array([k, v]) == 1).sum() == 2 * 32 - keys - values
    segments = bind("a", preset(f"asymkv-{keys}-{values}"), 32).segments
    assert len(segments) <= 3 and sum((s.layer_ids for s in segments), ()) == tuple(range(32))


def test_asymkv_16_0_has_48_of_64_matrices_at_one_bit():
    assert (np.array(bits("asymkv-16-0")) == 1).sum() == 48


def test_names_with_numbers():
    assert bits("asymkv-4/1-16-2") == ([4] * 16 + [1] * 16, [4] * 2 + [1] * 30)
    chosen = preset("asymkv-8/3-1-1-g64-w512-eta")
    assert chosen.keys == AffineCodec(3, 64, "tokens", "eta") and chosen.values == AffineCodec(3, 64, "channels", "eta")
    assert (chosen.k_window, chosen.v_window) == (512, 513)
    assert preset("kivi2-eta-m8").values == AffineCodec(2, 32, "channels", "eta", "int8")
    assert preset("kivi2-g128").keys == AffineCodec(2, 128, "tokens")
    assert preset("kivi4") == PRESETS["kivi4"] == preset("kivi4-g32-w128")
    early, late = (preset("asymkv-1-1-twomean").codecs(2)[i][0].levels for i in (0, 1))
    assert (early, late) == ("minmax", "two_mean")


def test_a_pair_takes_keys_of_one_and_values_of_the_other():
    chosen = preset("asymkv-3-1:kvquant4")
    assert chosen.values == PRESETS["kvquant4"].values and chosen.sinks == 1
    assert (chosen.k_window, chosen.v_window) == (128, 0)
    pairs = chosen.codecs(4)
    assert [k.bits for k, _ in pairs] == [2, 2, 2, 1] and all(v == chosen.values for _, v in pairs)


def test_rotation_wraps_every_codec():
    chosen = preset("asymkv-1-0-rot")
    assert all(isinstance(codec, RotatedCodec) for pair in chosen.codecs(2) for codec in pair)
    assert chosen.codecs(2)[0][0].inner == preset("asymkv-1-0").codecs(2)[0][0]


def test_a_pair_with_fitted_halves_finds_their_calibrations():
    tiny = kvjax.load("tiny")
    policy = kvjax.policy("kvquant4:kivi2", tiny)
    (segment,) = policy.segments
    fitted = kvjax.policy("kvquant4", tiny).segments[0]
    np.testing.assert_array_equal(segment.k_params["scale"], fitted.k_params["scale"])
    assert segment.v_params is None and (policy.sinks, policy.k_window, policy.v_window) == (1, 0, 129)
    with pytest.raises(ValueError, match="`calibration` is of a built-in preset"):
        kvjax.policy("kvquant4:kivi2", tiny, calibration="x.safetensors")


TOML = """
keys = "kvquant3"
values = "kivi2"
sinks = 4
[[layers]]
ids = [0, -1]
quant = "kvquant4"
[[layers]]
ids = [1]
values = "bf16"
"""


def test_a_toml_file_is_a_preset(tmp_path):
    path = tmp_path / "edges.toml"
    path.write_text(TOML)
    chosen = preset(str(path))
    assert (chosen.sinks, chosen.v_window) == (4, 129)
    kinds = [(k.bits, type(v).__name__) for k, v in chosen.codecs(5)]
    assert kinds == [
        (4, "NUQTokenCodec"), (3, "IdentityCodec"), (3, "AffineCodec"), (3, "AffineCodec"), (4, "NUQTokenCodec"),
    ]  # fmt: skip
    tiny = kvjax.load("tiny")
    policy = kvjax.policy(str(path), tiny)  # constants of two calibrations, each for its layers
    shapes = {s.layer_ids: s.k_params["levels"].shape for s in policy.segments}
    assert shapes == {(0, 4): (2, 16), (1,): (1, 8), (2, 3): (2, 8)}
    wanted = kvjax.policy("kvquant3", tiny).segments[0].k_params["levels"][2:4]
    np.testing.assert_array_equal(policy.segments[2].k_params["levels"], wanted)
    keys, values = preset(f"{path}:int4"), preset(f"int4:{path}")
    assert (keys.keys, keys.values) == (chosen.keys, PRESETS["int4"].values)
    assert (values.keys, values.values) == (PRESETS["int4"].keys, chosen.values)
    odd = tmp_path / "a:b.toml"
    odd.write_text("quant = 'kivi2'")
    assert preset(str(odd)) == PRESETS["kivi2"]


def test_a_file_with_other_windows_takes_the_fitted_constants_of_its_preset(tmp_path, monkeypatch):
    path = tmp_path / "window.toml"
    path.write_text("quant = 'kvquant2'\nk_window = 128\nv_window = 128")
    monkeypatch.setattr(calibration, "calibrate", None)
    tiny = kvjax.load("tiny")
    policy, plain = (kvjax.policy(name, tiny) for name in (str(path), "kvquant2"))
    assert (policy.sinks, policy.k_window, policy.v_window) == (1, 128, 128)
    for name in ("k_params", "v_params"):
        ours, theirs = (getattr(p.segments[0], name)["levels"] for p in (policy, plain))
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quant = 3", "must be the name of a preset"),
        ("quant = 'kivi2'\nkeys = 'bf16'", "stands for both"),
        ("keys = 'kivi2'", "must set `quant`, or `keys` and `values`"),
        ("quant = 'kivi2'\nwindow = 3", "unknown key `window`; known are quant, keys"),
        ("quant = 'kivi2'\nsinks = -1", "`sinks=-1` must be a number of tokens"),
        ("quant = 'kivi2'\n[[layers]]\nquant = 'kivi4'", r"`ids=None` of \[\[layers\]\]"),
        ("quant = 'kivi2'\n[[layers]]\nids = [0]", "must set `quant`, `keys` or `values`"),
        ("quant = 'kivi2'\n[[layers]]\nids = [0]\nquant = 'asymkv-1-0'", "differs by layer"),
        ("quant = 'kivi2'\nlayers = 3", "must be tables"),
        ("keys = 'kivi2:int4'\nvalues = 'bf16'", "'kivi2:int4' is a pair; name one preset as `keys`"),
        ("quant = ", "is not TOML"),
        ("quant = 'nosuch'", "`quant=nosuch` is not a preset"),
    ],
)
def test_toml_that_makes_no_preset_is_told_in_one_line(tmp_path, text, message):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        preset(str(path))
    assert "\n" not in str(error.value)


def test_names_that_make_no_preset():
    with pytest.raises(OSError, match="cannot be read"):
        preset("none.toml")
    for name, message in {
        "kivi": "`quant=kivi` is not a preset; the nearest are kivi",
        "kivi5": "`bits=5` cannot be packed",
        "kivi2-twomean": "-twomean is of 1-bit codes",
        "asymkv-auto@2:kivi2": "use it alone",
        "kivi2:int4:bf16": "`quant=kivi2:int4:bf16` has more than two parts",
        "kvquant3-rot": "fitted constants",
    }.items():
        with pytest.raises(ValueError, match=message):
            preset(name)
    with pytest.raises(ValueError, match="sets layer 5, but the model has 5 layers, 0 to 4"):
        preset("asymkv-16-0").codecs(5)
    tiny = kvjax.load("tiny")
    for name, message in {
        "kivi2-w48": "must be a multiple of the 32 tokens that share a group",
        "kivi2-g48": "`group=48` of int2 per channel, groups of 48 must divide `block=128`, as 32, 64 and 128 do",
        "kivi2-g0": "`group=0` must be at least 1 element",
    }.items():
        with pytest.raises(ValueError, match=message):
            kvjax.decode.init_cache(tiny, kvjax.policy(name, tiny), batch=1, capacity=100)
