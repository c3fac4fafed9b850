"""Calibration files come back as they were written, or say in one line why not."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from kvjax.calibrate import artefact
from kvjax.calibrate.artefact import Meta, TensorMeta
from kvjax.model.rope import make_rope

KEYS = TensorMeta(bits=2, table="fisher*s2", outliers=0.01, slots=1, pre_rope=True)
META = Meta(
    preset="kvquant2", keys=KEYS, values=dataclasses.replace(KEYS, pre_rope=False), sinks=1, qnorm=False,
    model="abc123", layers=3, kv_heads=2, head_dim=8, rope='{"rope_theta":10000.0}', source="text.txt sha256:0",
    tokens=64, kvjax="0.1.0",
)  # fmt: skip


def tables():
    rng = np.random.default_rng(0)
    levels = np.sort(rng.uniform(-1, 1, (4, 3, 4))).astype(np.float32)
    ranges = rng.uniform(0.1, 1, (2, 3, 2, 1, 8)).astype(np.float32)
    return {
        "keys": {"levels": levels[0], "decode_levels": levels[1], "scale": ranges[0], "zero": ranges[1]},
        "values": {"levels": levels[2], "decode_levels": levels[3]},
    }


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "tiny.safetensors"
    artefact.save(path, tables(), META)
    return path


def test_round_trip(path):
    loaded, meta = artefact.load(path, META.flat())
    assert meta == META
    for tensor, arrays in tables().items():
        assert loaded[tensor].keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(loaded[tensor][name], array)
            assert loaded[tensor][name].dtype == np.float32


OTHER = {
    "keys.bits": 3, "keys.table": "fisher", "keys.outliers": 0.0, "keys.slots": 2, "keys.pre_rope": False,
    "values.bits": 4, "values.slots": 0, "sinks": 4, "qnorm": True, "model": "def456", "layers": 4, "kv_heads": 1,
    "head_dim": 16, "rope": '{"rope_theta":500000.0}',
}  # fmt: skip


@pytest.mark.parametrize("field", OTHER)
def test_each_mismatch_has_its_error(path, field):
    with pytest.raises(ValueError) as error:
        artefact.load(path, {field: OTHER[field]})
    message = str(error.value)
    assert "\n" not in message and "scripts/calibrate.py" in message
    for part in (str(path), f"`{field}`", repr(META.flat()[field]), repr(OTHER[field])):
        assert part in message


def break_file(path, how):
    content = bytearray(path.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    elif how == "empty":
        content = b""
    elif how == "flipped bit":
        content[-5] ^= 1
    elif how == "text":
        content = b"these are not tensors at all"
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["truncated", "empty", "flipped bit", "text"])
def test_damaged_files(path, how):
    break_file(path, how)
    with pytest.raises(ValueError, match="damaged") as error:
        artefact.load(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_foreign_and_future_files(path):
    save_file({"weight": np.zeros(3, np.float32)}, path)
    with pytest.raises(ValueError, match="no kvjax calibration"):
        artefact.load(path)
    save_file({"weight": np.zeros(3, np.float32)}, path, {"format": json.dumps(2)})
    with pytest.raises(ValueError, match="`format` is 2 but this kvjax reads 1"):
        artefact.load(path)
    save_file({"weight": np.zeros(3, np.float32)}, path, {"format": json.dumps(1)})
    with pytest.raises(ValueError, match=r"metadata preset, keys.bits, .* missing"):
        artefact.load(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.safetensors does not exist; recalibrate"):
        artefact.load(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize(
    "tensor, name, change, message",
    [
        ("keys", "levels", lambda a: a * np.nan, "not finite"),
        ("values", "levels", lambda a: a[:, ::-1], "not sorted"),
        ("keys", "scale", lambda a: a * 0, "not positive"),
        ("keys", "zero", lambda a: a[:, :, 0], "float32"),
    ],
)
def test_unusable_tables_are_refused_on_both_sides(path, monkeypatch, tensor, name, change, message):
    broken = tables()
    broken[tensor][name] = change(broken[tensor][name])
    with pytest.raises(ValueError, match=message):
        artefact.save(path, broken, META)
    artefact.load(path)  # the file of before is still there
    monkeypatch.setattr(artefact, "_fault", lambda *_: None)
    artefact.save(path, broken, META)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=message):
        artefact.load(path)


def test_a_failed_write_leaves_nothing(path, monkeypatch):
    before = path.read_bytes()
    monkeypatch.setattr(artefact.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        artefact.save(path, tables(), META)
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1
    with pytest.raises(FileNotFoundError, match="create it first"):
        artefact.save(path.parent / "none" / "x.safetensors", tables(), META)


def test_rope_descriptions():
    linear = make_rope(8, 64, rope_type="linear", factor=2.0)
    assert artefact.describe_rope(linear) == '{"factor":2.0,"rope_theta":10000.0,"rope_type":"linear"}'
    bare = dataclasses.replace(linear, parameters=())
    assert artefact.describe_rope(bare) == '{"attention_factor":1.0,"inv_freq":[0.5,0.0005]}'
    dynamic = [make_rope(8, n, rope_type="dynamic", factor=2.0) for n in (64, 128)]
    assert len({artefact.describe_rope(rope) for rope in dynamic}) == 2
