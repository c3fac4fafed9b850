"""Outlier channels by rewriting: the same logits, the profile that was asked for, and what per-token codes suffer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model.variants import VARIANTS

import kvjax
from kvjax import decode
from kvjax.calibrate import preset as calibration
from kvjax.codecs import NUQChannelCodec, NUQTokenCodec
from kvjax.model.forward import causal_attention, forward, forward_with_kv
from kvjax.model.outliers import LLAMA2_7B, OutlierProfile, key_factors, profile_of, rewrite, value_factors
from kvjax.model.rope import cos_sin, rotate
from kvjax.model.weights import ASSETS, load

# Random tokens will not do for the profile: what no text looks like has other outliers.
TEXT = (
    "The river rises in the hills to the north of the town and flows for some forty miles before it reaches the sea . "
    "It was first bridged in the twelfth century , and the bridge was rebuilt in 1784 after a flood had carried away "
    "two of its arches . In the following years the harbour grew , and by 1840 it had become the second largest port "
    "of the county , with a railway , a theatre and three churches ."
)
BY_NAME = {variant.name: variant for variant in VARIANTS}
# Grouped heads, one head each, one kv head for all, biases, frequencies that depend on the length, a sliding window.
NAMES = ("plain", "head80-mha", "head96-mqa", "attention-bias", "rope-dynamic", "mistral-window8")


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_equal_and_keys_and_values_scaled(name):
    variant = BY_NAME[name]
    model, tokens = variant.loaded(), variant.prompt[None]
    rewritten = rewrite(model)
    logits, k, v = forward_with_kv(model, tokens)
    new_logits, new_k, new_v = forward_with_kv(rewritten, tokens)
    np.testing.assert_allclose(new_logits, logits, rtol=0, atol=1e-5)
    for new, old, factors in (
        (new_k, k, key_factors(model.config, LLAMA2_7B)),
        (new_v, v, value_factors(model.config, LLAMA2_7B)),
    ):
        assert factors.max() > 1
        np.testing.assert_allclose(new, old * factors[:, None, None], rtol=1e-5, atol=1e-5)
    assert rewritten.fingerprint != model.fingerprint
    untouched = {"embedding", "attention_norm", "gate", "up", "down", "mlp_norm", "norm", "head", "o_bias"}
    assert all(rewritten.state[n] is model.state[n] for n in untouched & model.state.keys())


def test_the_cache_gives_equal_logits():
    """Prefill of rows with their own lengths, then steps."""
    model = BY_NAME["attention-bias"].loaded()
    tokens = np.random.default_rng(0).integers(0, model.config.vocab, (2, 9))

    def run(model):
        cache = decode.init_cache(model, kvjax.policy("f32", model), batch=2, capacity=16, block=32)
        logits, cache = decode.prefill(model, cache, tokens[:, :6], np.array([6, 4]))
        out = [logits]
        for i in range(6, 9):
            logits, cache = decode.step(model, cache, tokens[:, i])
            out.append(logits)
        return np.stack(out)

    np.testing.assert_allclose(run(rewrite(model)), run(model), rtol=0, atol=1e-5)


def test_pairs_share_a_factor_inside_the_band():
    config = BY_NAME["head128-gqa"].loaded().config
    profile = OutlierProfile(key_fraction=1 / 16, key_factors=(4, 8), key_band=(0.5, 1.0), seed=3)
    factors = key_factors(config, profile)
    assert factors.shape == (config.layers, config.kv_heads, 128)
    np.testing.assert_array_equal(factors[..., :64], factors[..., 64:])
    pairs = factors[..., :64]
    assert (pairs[..., :32] == 1).all() and ((pairs > 1).sum(-1) == 4).all() and set(pairs.ravel()) <= {1, 4, 8}
    np.testing.assert_array_equal(factors, key_factors(config, profile))
    assert not np.array_equal(factors, key_factors(config, dataclasses.replace(profile, seed=4)))
    assert not np.array_equal(factors[0], factors[1]) and not np.array_equal(factors[:, 0], factors[:, 1])
    values = value_factors(config, profile)
    assert ((values > 1).sum(-1) == 16).all() and set(values.ravel()) == {1, 2}


def test_nothing_to_scale_changes_nothing():
    model = BY_NAME["plain"].loaded()
    same = rewrite(model, OutlierProfile(key_fraction=0, value_fraction=0))
    assert all(np.array_equal(same.state[n], model.state[n]) for n in model.state)


def test_the_tiny_model_gets_the_profile():
    """Keys 5 to 20 times the median, values 2 to 4 (the module's table), and in bfloat16 too the same bits.

    One layer goes beyond 20, to 23 on WikiText and to 31 on this paragraph: the typical layer is held to the
    published range, and each layer to twice its end.
    """
    model = load("tiny", "bfloat16")
    tokens = np.asarray(model.tokenizer(TEXT)["input_ids"], np.int32)[None]
    rewritten = rewrite(model)
    measured, before = profile_of(rewritten, tokens), profile_of(model, tokens)
    assert (measured.keys > before.keys).all()
    assert 5 < np.median(measured.keys) < 20 and (measured.keys > 5).all() and (measured.keys < 40).all()
    assert (measured.values > 1.8).all() and (measured.values < 5).all()
    assert (measured.key_outliers > 1 / 64).all() and (measured.key_outliers < 1 / 8).all()
    np.testing.assert_array_equal(forward(rewritten, tokens), forward(model, tokens))


def test_abstract_weights_keep_shapes_and_dtypes():
    model = BY_NAME["plain"].loaded("bfloat16")
    shapes = jax.eval_shape(rewrite, model)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key_factors": (6.0,)}, r"`key_factors=\(6.0,\)` must be powers of two"),
        ({"value_factors": ()}, "`value_factors="),
        ({"value_factors": (-2.0,)}, "`value_factors="),
        ({"key_factors": (float("nan"),)}, "`key_factors="),
        ({"key_fraction": 1.5}, "`key_fraction=1.5`"),
        ({"key_band": (0.8, 0.2)}, "`key_band="),
        ({"seed": -1}, "`seed=-1`"),
    ],
)
def test_bad_profiles_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        OutlierProfile(**changes)


def test_a_band_too_narrow_is_refused():
    with pytest.raises(ValueError, match=r"`key_fraction=0.5` asks for 16 pairs .* holds 8 of 32"):
        rewrite(BY_NAME["plain"].loaded(), OutlierProfile(key_fraction=0.5))


def test_per_token_codes_collapse_and_per_channel_ones_do_not():
    """Attention outputs with 3-bit keys, before and after key channels grow: KVQuant's axis does not notice."""
    config = BY_NAME["plain"].loaded().config
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.standard_normal(shape, np.float32))
        for shape in ((1, 128, 2, 2, 64), (1, 128, 2, 64), (1, 128, 2, 64))
    )
    positions = jnp.arange(128)[None]
    cos, sin = (x[:, :, None] for x in cos_sin(BY_NAME["plain"].loaded().rope, positions))
    per_token = NUQTokenCodec(bits=3, table="uniform")
    per_channel = NUQChannelCodec(bits=3, table="uniform", ranges="block")

    def through(codec, x):
        return codec.decode(codec.encode(x.swapaxes(1, 2)), None).swapaxes(1, 2)

    def errors(factors):
        def out(k_rotated):
            scaled_q = rotate(q / factors[..., None, :], cos[..., None, :], sin[..., None, :])
            return causal_attention(scaled_q, k_rotated, v, positions, positions)

        scaled = k * factors
        exact = out(rotate(scaled, cos, sin))
        stored = out(through(per_token, rotate(scaled, cos, sin))), out(rotate(through(per_channel, scaled), cos, sin))
        return [float(jnp.linalg.norm(s - exact) / jnp.linalg.norm(exact)) for s in stored]

    plain = errors(jnp.ones((1, 1, 2, 64)))
    grown = errors(jnp.asarray(key_factors(config, LLAMA2_7B)[:1, None]))
    assert grown[0] > 3 * plain[0] and grown[0] > 3 * grown[1]
    np.testing.assert_allclose(grown[1], plain[1], rtol=1e-3)


def test_a_rewritten_model_is_calibrated_and_does_not_take_the_originals_file(monkeypatch, tmp_path):
    class CalibratesError(Exception):
        pass

    def calibrate(*_, **__):
        raise CalibratesError

    monkeypatch.setenv("KVJAX_CACHE", str(tmp_path))
    monkeypatch.setattr(calibration, "calibrate", calibrate)
    model = load("tiny")
    assert kvjax.policy("kvquant3", model).segments  # the file beside the model
    rewritten = rewrite(model)
    assert rewritten.path == model.path and rewritten.tokenizer("sea")["input_ids"]
    with pytest.raises(CalibratesError):
        kvjax.policy("kvquant3", rewritten)


@pytest.fixture
def main(load_script):
    return load_script("make_outliers").main


def test_script_writes_a_model_with_equal_logits(main, tmp_path, capsys):
    out = tmp_path / "grown"
    assert main(["--model", "tiny", "--out", str(out), "--tokens", "64", "--key-factor", "8", "--seed", "5"]) == 0
    printed = capsys.readouterr().out
    assert "largest difference of any logit, 1 x 64 tokens of random ids: 0" in printed and " -> " in printed
    model, written = load("tiny", "float32"), load(out, "float32")
    expected = rewrite(model, OutlierProfile(key_factors=(8.0,), seed=5))
    for name in expected.state:
        np.testing.assert_array_equal(written.state[name], expected.state[name])
    # As small as the original: powers of two are exact in the dtype of its file.
    assert (out / "model.safetensors").stat().st_size < 1.01 * (ASSETS / "tiny" / "model.safetensors").stat().st_size
    assert written.config.eos_ids == model.config.eos_ids
    assert written.tokenizer("the sea") == model.tokenizer("the sea") and not (out / "calibration").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "{assets}"], "has a model in it (config.json)"),
        (["--out", "{file}"], "is a file"),
        (["--key-factor", "6"], "`key_factors=(6.0,)` must be powers of two"),
        (["--key-fraction", "1"], "`key_fraction=1.0` asks for 32 pairs per head"),
        (["--tokens", "1"], "`tokens=1`"),
        (["--text", "/nowhere.txt"], "/nowhere.txt"),
        (["--model", "/nowhere"], "/nowhere"),
    ],
)
def test_script_refuses_in_one_line(main, tmp_path, capsys, arguments, message):
    file = tmp_path / "file"
    file.touch()
    given = [a.format(assets=ASSETS / "tiny", file=file) for a in arguments]
    with pytest.raises(SystemExit) as stop:
        main(["--model", "tiny", "--out", str(tmp_path / "new"), *given])
    errors = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0]
    assert not (tmp_path / "new").exists()
