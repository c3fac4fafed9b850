"""bench_decode.py: attention and the headline at small sizes on CPU, what they count, and what they refuse."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax import decode, fused
from kvjax.evaluate.bench import accuracy, attention, contents, device, headline, report, session, timing
from kvjax.evaluate.memory import abstract_cache
from kvjax.model.rope import make_rope
from kvjax.policy import preset
from pallas_kernels.decode_attention import api, reference, specs
from pallas_kernels.decode_attention.formats import shape_of

SMALL = ["--implementation", "reference", "--heads", "2", "--group", "2", "--channels", "32", "--layers", "1"]


@pytest.fixture
def main(monkeypatch, load_script):
    monkeypatch.setattr(device, "ceiling_bytes", lambda: 1 << 20)
    return load_script("bench_decode").main


@pytest.mark.parametrize("joined", [1, 2])
def test_attention(main, tmp_path, capsys, monkeypatch, joined):
    monkeypatch.setattr(attention.Settings, "joined", joined)  # as a TPU would have it
    file = tmp_path / "attention.json"
    arguments = ["--attention", *SMALL, "--quant", "kivi2", "--contexts", "300", "--rounds", "2", "--json", str(file)]
    assert main(arguments) == 0
    figures = json.loads(file.read_text())
    assert {"command", "date", "machine", "platform", "versions", "chip", "settings"} < set(figures)
    rows = {row["storage"]: row for row in figures["rows"]}
    assert list(rows) == ["bf16", "kivi2", "dense float32", "jax xla"]
    for row in rows.values():
        assert row["status"] == "ok" and row["context"] == 300 and row["us"] > 0
        assert row["gb_per_s"] == pytest.approx(row["total_bytes"] / row["us"] / 1e3)
        assert row["share_of_read"] == pytest.approx(row["gb_per_s"] / row["read_gb_per_s"])
        assert row["speedup"]["bf16"] == pytest.approx(rows["bf16"]["us"] / row["us"])
    # 3 blocks of 128 tokens, 2 heads of 32 channels: 24576 elements of 2 bits, a scale and a zero for each 32.
    parts = {"keys": 6144, "values": 6144, "metadata": 6144, "slots": 0, "query": 512, "outputs": 512 + 2 * 16}
    assert rows["kivi2"]["bytes"] == parts and rows["kivi2"]["total_bytes"] == sum(parts.values())
    assert rows["kivi2"]["error"] <= rows["kivi2"]["bound"]
    out = capsys.readouterr().out
    assert "x bf16" in out and "ceilings" in out and "3.000" in out  # bits per element


def test_planes_are_timed_as_they_are_read(main, tmp_path, capsys):
    file = tmp_path / "attention.json"
    arguments = ["--attention", *SMALL, "--quant", "alignedkv-8", "--contexts", "300", "--rounds", "2"]
    assert main([*arguments, "--implementation", "numba_cpu", "--json", str(file)]) == 0
    row = next(row for row in json.loads(file.read_text())["rows"] if row["storage"] == "alignedkv-8")
    assert row["status"] == "ok" and row["error"] <= row["bound"]
    # 3 blocks of 128 tokens, 2 heads of 32 channels: 8 of 16 bits of each, and a level for each block and head.
    assert [row["bytes"][x] for x in ("keys", "values", "metadata")] == [24576, 24576, 2 * 24]
    assert main([*arguments, "--implementation", "xla_cpu"]) == 0
    assert "xla_cpu does not read float16 planes" in capsys.readouterr().out


def test_what_is_not_right_is_reported_and_not_timed(monkeypatch):
    def small_case(kinds, *_):
        if kinds == specs.STORAGES["int8"]:
            raise NotImplementedError("not on\nthis chip")
        error = accuracy.Error(0.5, 0.0) if kinds == specs.STORAGES["kivi4"] else accuracy.Error(0.0, 0.0)
        return lambda: (error, accuracy.Error(0.1, 0.1))

    monkeypatch.setattr(accuracy, "small_case", small_case)
    monkeypatch.setattr(device, "ceiling_bytes", lambda: 1 << 20)
    settings = attention.Settings(("kivi4", "int8", "int4"), (64,), heads=1, group=1, channels=32, seconds=0.0)
    refused, late = attention.measure(settings, lambda _: None)
    assert [(row["storage"], row["status"]) for row in refused] == [("kivi4", "wrong"), ("int8", "unsupported")]
    assert refused[1]["reason"] == "not on this chip"
    assert {row["status"] for row in late} == {"left out"} and "kivi4" not in {row["storage"] for row in late}
    assert len(report.notes([*refused, *late])) == len(refused) + len(late)


@pytest.mark.parametrize("storage", ["bf16", "kvquant3", "int4"])
def test_bytes_are_those_of_the_arrays(storage):
    shape, kinds = specs.Shape(3, 2, 2, 2, 1, 64), specs.STORAGES[storage]
    k, v = contents.fill(kinds.keys, shape, 0), contents.fill(kinds.values, shape, 1)
    q = jnp.ones((2, 2, 1, 64))
    parts = contents.bytes_by_part(k, v, q, (q, q[..., 0], q[..., 0]))
    assert sum(parts.values()) == sum(x.nbytes for x in jax.tree.leaves((k, v))) // 3 + 2 * q.nbytes + 2 * 16


@pytest.mark.parametrize("storage", ["kvquant2", "kivi4"])
def test_contents_on_the_device_are_like_those_made_on_the_host(storage, monkeypatch):
    monkeypatch.setattr(contents, "_FEW", 0)
    shape = specs.Shape(2, 1, 3, 2, 1, 64)
    for kind in (specs.STORAGES[storage].keys, specs.STORAGES[storage].values):
        made, like = contents.fill(kind, shape, 0), specs.make(kind, shape, np.random.default_rng(0))
        assert jax.tree.structure(made) == jax.tree.structure(like)
        for x, y in zip(jax.tree.leaves(made), jax.tree.leaves(like)):
            assert x.shape == y.shape and x.dtype == y.dtype
        decoded = [np.asarray(jax.jit(reference.dequantize)(x, 1)) for x in (made, like)]
        assert 0.5 < decoded[0].std() / decoded[1].std() < 2
        assert len({block.tobytes() for block in decoded[0][0]}) == shape.blocks  # no two are the same


@pytest.mark.parametrize(("storage", "channels"), [("kvquant3", 64), ("kivi4", 96), ("int8", 128)])
def test_a_tpu_is_timed_on_what_its_caches_hold(storage, channels):
    empty = decode.CacheShape(1, 32, 8, channels, make_rope(channels, 4096))
    cache = abstract_cache(storage, preset(storage), empty, 2048, target="tpu:v5e")
    held = jax.eval_shape(fused.formats, cache.segments[0])
    context = shape_of(held[0])[2] * cache.block
    settings = attention.Settings((storage,), (), channels=channels, implementation="mosaic_tpu", chip="v5e")
    shape, kinds = settings.stored(storage, context), specs.STORAGES[storage]
    k, v, cuts = jax.eval_shape(attention.filler(kinds, shape, context, 0, settings))
    api.check(k, v, settings.group, settings.implementation, settings.chip, kinds.pre_rope)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves((k, v))] == [(x.shape, x.dtype) for x in jax.tree.leaves(held)]
    assert {shape_of(x)[3] for x in cuts[0]} == {8}  # heads apart


def test_large_contexts_are_checked_at_both_ends():
    assert accuracy.windows(8192) == [(0, 8192)]
    assert accuracy.windows(20_000) == [(0, 1000), (19_000, 20_000)]
    kinds, shape = specs.STORAGES["kvquant2"], specs.Shape(2, 1, 6, 1, 2, 32)
    assert accuracy.blocks_of((0, 250), shape) == (0, 3) and accuracy.blocks_of((450, 700), shape) == (3, 3)
    rng = np.random.default_rng(0)
    k, v = (specs.make(kind, shape, rng) for kind in (kinds.keys, kinds.values))
    q, rows = jnp.asarray(specs.query(shape, rng)), np.ones(1, np.int32)
    arrays = [jax.tree.map(jnp.asarray, x) for x in (k, v)]
    first, last = (jnp.asarray(rows * n) for n in (450, 700))
    rotation = contents.rotation(shape.channels, rows * 700)
    got = jax.jit(lambda *x: reference.decode_attention(*x, rotation))(q, *arrays, jnp.int32(1), first, last)
    cut = [contents.cut(x, 1, 3, 3) for x in (k, v)]
    error, bound = accuracy.compare_window(got, q, *cut, (450, 700), 3, 700)
    assert error.within(bound) and max(error) < 1e-4
    elsewhere, _ = accuracy.compare_window(got, q, *cut, (400, 700), 3, 700)
    assert elsewhere.log_sum > 100 * error.log_sum
    broken = got._replace(acc=got.acc * jnp.nan)
    assert accuracy.compare_window(broken, q, *cut, (450, 700), 3, 700)[0].output == np.inf


def test_keys_are_turned_by_exact_angles():
    offset, inv_freq = 1_000_003, 10000.0 ** -(np.arange(0, 128, 2) / 128)
    cos, sin = contents.rotation(128, np.zeros(1)).angles(jnp.asarray([offset]))
    np.testing.assert_allclose(cos[0], np.cos(offset * inv_freq), atol=1e-6)
    np.testing.assert_allclose(sin[0], np.sin(offset * inv_freq), atol=1e-6)


def test_times_are_taken_in_turn():
    calls = []
    candidates = {name: timing.Candidate(lambda name=name: calls.append(name), 4, 0) for name in "ab"}
    timed = timing.interleave(candidates, 3)
    assert "".join(calls[:8]) == "aabbaabb" and len(calls) == 2 * 2 * (2 + 2 * 3)
    assert 0 < timed["a"].quartiles[0] <= timed["a"].median <= timed["a"].quartiles[1]


def test_headline(main, tmp_path, capsys):
    file = tmp_path / "headline.json"
    small = ["--headline-model", "small", "--headline-layers", "1", "--headline-tokens", "300", "--rounds", "3"]
    assert main(["--headline", *small, "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    # KVQuant keeps one sink: the block of the tokens 129 to 256 is full at length 257, in the second step timed.
    assert figures["first_length"] == 252 and figures["last_length"] == 258
    assert figures["bits_per_element"] == 2.125 and figures["ms_per_token"] > 0 and figures["argument_bytes"] > 0
    assert figures["path"] and "kvquant2-dense, one row of 300 tokens" in capsys.readouterr().out


def test_a_headline_that_does_not_fit_is_refused_before_anything_is_allocated(monkeypatch):
    monkeypatch.setattr(device, "memory_bytes", lambda: 1 << 20)
    with pytest.raises(ValueError, match=r"kvquant2-dense needs 0\.\d\d GiB, but JAX gives 0\.00; use fewer tokens"):
        headline.measure("small", "kvquant2-dense", 300, 3, layers=1)


@pytest.mark.parametrize("target", ["cpu", "tpu:v5e"])
def test_a_random_cache_is_like_an_empty_one(monkeypatch, target, quant="kvquant3"):
    monkeypatch.setattr(decode, "default_target", lambda mesh: target)
    model = headline.abstract_model(dataclasses.replace(headline.MODELS["small"], layers=1), 300, jnp.bfloat16)
    shape = headline._shape(model)
    made = headline.random_cache(quant, shape, 300, jnp.bfloat16, 290)
    empty = abstract_cache(quant, preset(quant), shape, 300)
    assert jax.tree.structure(made) == jax.tree.structure(empty)
    for (path, x), y in zip(jax.tree.leaves_with_path(made), jax.tree.leaves(empty), strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype, path
    assert int(made.length[0]) == 290 and decode.nbytes(made) == decode.nbytes(empty)
    assert all(np.asarray(x).any() for x in jax.tree.leaves((made.segments[0].k, made.segments[0].v)))
    decode.explain(made, strict=True)


def test_a_check_goes_on_after_a_crash(tmp_path):
    script = tmp_path / "crashes.py"
    script.write_text(
        "import json, os, sys\n"
        "names = sys.argv[sys.argv.index('--quant') + 1].split(',')\n"
        "rows = []\n"
        "for name in names:\n"
        "    if name == 'b':\n"
        "        os._exit(134)\n"
        "    rows.append({'storage': name, 'status': 'ok'})\n"
        "    open(sys.argv[-1], 'w').write(json.dumps({'chip': 'x', 'rows': rows}))\n"
    )
    for names, crashed in ((["a", "b", "c"], 1), (["b", "a"], 0)):
        rows = session.check(str(script), [], names, tmp_path / "check.json")
        assert [row["storage"] for row in rows] == names
        assert [row["status"] for row in rows] == ["failed" if name == "b" else "ok" for name in names]
        assert rows[crashed]["reason"] == "the process ended with code 134"
        assert json.loads((tmp_path / "check.json").read_text()) == {"chip": "x", "rows": rows}


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        {"storage": name, "context": n, "us": n / bits, "speedup": {"bf16": 16 / bits}, "share_of_read": 0.5}
        | {"implementation": "rival" if " " in name else "reference"}
        for name, bits in (("bf16", 16), ("kivi2", 3), ("jax xla", 16))
        for n in (4096, 100_003)
    ]
    report.plot(rows, "title", tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="nothing was timed"):
        report.plot([], "title", tmp_path / "b.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--attention", "--quant", "kivi33"], "`quant=kivi33` is not a storage; there are bf16, f16"),
        (["--quant", "kvquant33"], "`quant=kvquant33` is not a preset"),
        (["--json", "/nowhere/a.json"], "`json=/nowhere/a.json`: its directory does not exist"),
        (["--attention", "--plot", "/"], "`plot=/` is a directory"),
        (["--attention", "--contexts", "0"], "`contexts=0` must be at least 1"),
        (["--attention", "--contexts", "many"], "--contexts"),
        (["--attention", "--implementation", "cuda"], "invalid choice: 'cuda'"),
        (["--attention", "--checked", "/nowhere.json", "--implementation", "reference"], "`checked='/nowhere.json'`"),
        (["--attention", "--checked", __file__, "--implementation", "reference"], f"`checked={__file__}` is not what"),
        (["--all", "--quant", "kivi33"], "`quant=kivi33`"),
        (["--all", "--out", __file__], f"`out={__file__}`: {__file__} is a file; name a directory"),
        (["--attention", "--quant", ""], "`quant=` is not a storage"),
        (["--headline", "--headline-layers", "0"], "`headline_layers=0` must be at least 1"),
        (["--headline", "--headline-quant", "kvquant33"], "`quant=kvquant33`"),
        (["--headline", "--headline-model", "small", "--headline-tokens", "20"], "`headline_tokens=20` must exceed"),
        (["--attention", "--headline"], "not allowed with"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(main, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    errors = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0]
