"""Prefill, steps and generation of a model through the cache."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import make_policy

import kvjax
from kvjax import decode
from kvjax.codecs import IdentityCodec, NUQChannelCodec, NUQTokenCodec
from kvjax.model import cached
from kvjax.model.config import ModelConfig
from kvjax.model.forward import forward
from kvjax.model.rope import make_rope
from kvjax.model.weights import init_random
from kvjax.policy import Override, Preset, SegmentPolicy, bind, preset
from kvjax.presets import kivi

B, T, K, H, L = 3, 32, 2, 16, 3
CONFIG = ModelConfig(
    layers=L, width=32, mlp_width=48, q_heads=4, kv_heads=K, head_dim=H, vocab=97, initializer_range=0.1
)
KVQUANT = Preset(NUQChannelCodec(bits=3, outliers=0.01, pre_rope=True), NUQTokenCodec(bits=3, outliers=0.01), sinks=1)
F32 = Preset(IdentityCodec(dtype="float32"), IdentityCodec(dtype="float32"))
PRESETS = {
    "f32": F32,
    "kvquant": KVQUANT,
    "grouped-windowed": Preset(
        NUQChannelCodec(bits=4, table="uniform", ranges="block"),
        NUQTokenCodec(bits=4, table="uniform"),
        v_window=20,
    ),
}


@pytest.fixture(scope="module")
def model():
    return init_random(CONFIG, make_rope(H, 2048), seed=0, dtype=jnp.float32)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, CONFIG.vocab, (B, 140))


def policy_of(name):
    return make_policy(PRESETS[name], L, K, H)


def new_cache(model, name, batch=B, capacity=200):
    return decode.init_cache(model, policy_of(name), batch=batch, capacity=capacity, block=T)


def prefill_in(model, name, tokens, lengths, cuts, attention):
    """Prefills rows in several calls, cut at the same fractions of each row."""
    cache, done = new_cache(model, name), np.zeros(B, int)
    for cut in [*cuts, 1.0]:
        end = np.maximum((lengths * cut).astype(int), done + 1)
        size = (end - done).max()
        part = np.stack([np.pad(row[d:e], (0, size - e + d)) for row, d, e in zip(tokens, done, end, strict=True)])
        logits, cache = decode.prefill(model, cache, part, end - done, attention)
        done = end
    return logits, cache


def codes_of(cache, row):
    """The packed words of a row's sealed blocks."""
    blocks = [np.asarray(jax.tree.leaves(block)[0])[:, row] for s in cache.segments for block in (s.k, s.v)]
    return np.concatenate([words.reshape(-1) for words in blocks])


def assert_same_logits(logits, cache, wanted, wanted_cache):
    """Within 1e-4, row by row, where both caches hold the same codes.

    K/V of the same text differ in the last float32 bit with the shape of the matrix product that made them. Such a
    bit can carry an element over the midpoint of two levels; from that token on the row's logits differ by what
    quantization itself costs. That is allowed in one word in 500 (ten codes) and to small effect, and must not happen
    in every row.
    """
    flipped = []
    for b in range(len(logits)):
        words, wanted_words = codes_of(cache, b), codes_of(wanted_cache, b)
        flips = (words != wanted_words).mean() if cache.segments[0].k_codec.needs_params else 0.0
        flipped.append(flips > 0)
        assert flips < 2e-3
        np.testing.assert_allclose(logits[b], wanted[b], atol=5e-2 if flips else 1e-4)
    assert not all(flipped)


@pytest.mark.parametrize("name", PRESETS)
def test_cached_prefill_does_not_depend_on_the_split_and_equals_steps(model, tokens, name):
    lengths = np.array([2 * T + 1, T + 1, 2 * T + 1])  # behind the sink all is sealed: the words hold every code
    whole, cache = prefill_in(model, name, tokens, lengths, [], "cached")
    for cuts in ([0.5], [0.1, 0.33]):
        split, split_cache = prefill_in(model, name, tokens, lengths, cuts, "cached")
        assert_same_logits(split, split_cache, whole, cache)
    stepped = new_cache(model, name)
    logits = np.zeros((B, CONFIG.vocab), np.float32)
    for i in range(lengths.max()):
        out, stepped = decode.step(model, stepped, tokens[:, i], active=i < lengths)
        logits = np.where((i == lengths - 1)[:, None], out, logits)
    assert_same_logits(logits, stepped, whole, cache)
    np.testing.assert_array_equal(stepped.length, cache.length)


@pytest.mark.parametrize("attention", ["exact", "cached"])
def test_an_uncompressed_cache_changes_nothing(model, tokens, attention):
    """f32: logits of prefill in two calls and of steps are those of the model without a cache, row by row."""
    wanted = np.asarray(forward(model, tokens))
    lengths = np.array([1, T - 1, 70])
    first, cache = decode.prefill(model, new_cache(model, "f32"), tokens[:, :70], lengths, attention)
    np.testing.assert_allclose(first, wanted[np.arange(B), lengths - 1], atol=1e-4)
    more = np.array([40, 2, 33])
    part = np.stack([tokens[b, lengths[b] : lengths[b] + 40] for b in range(B)])
    second, cache = decode.prefill(model, cache, part, more, attention)
    np.testing.assert_allclose(second, wanted[np.arange(B), lengths + more - 1], atol=1e-4)
    at = lengths + more
    for i in range(20):
        out, cache = decode.step(model, cache, tokens[np.arange(B), at + i])
        np.testing.assert_allclose(out, wanted[np.arange(B), at + i], atol=1e-4)


def test_exact_prefill_of_a_prompt_sees_no_quantization(model, tokens):
    """KVQuant section 6.2: attention of the prompt uses the exact K/V, the cache is then written compressed."""
    exact, cache = decode.prefill(model, new_cache(model, "kvquant"), tokens[:, :100])
    np.testing.assert_allclose(exact, forward(model, tokens[:, :100])[:, -1], atol=1e-4)
    cached, _ = decode.prefill(model, new_cache(model, "kvquant"), tokens[:, :100], attention="cached")
    assert np.abs(exact - cached).max() > 1e-2
    stored = jax.tree.leaves(cache.segments[0].k)[0]
    assert (np.asarray(stored)[:, :, :3] != 0).any()


@pytest.mark.parametrize("lengths", [(1, T - 1, T), (T + 1, T + 2, 2)], ids=str)
def test_prompt_lengths_around_a_block(model, tokens, lengths):
    """At once and one by one, and three steps more."""
    lengths = np.array(lengths)
    whole, cache = decode.prefill(model, new_cache(model, "kvquant"), tokens[:, : 2 * T], lengths, "cached")
    single, logits = new_cache(model, "kvquant"), np.zeros((B, CONFIG.vocab), np.float32)
    for i in range(lengths.max()):
        out, single = decode.step(model, single, tokens[:, i], active=i < lengths)
        logits = np.where((i < lengths)[:, None], out, logits)
    assert_same_logits(logits, single, whole, cache)
    for i in range(3):
        following = tokens[np.arange(B), lengths + i]
        a, cache = decode.step(model, cache, following)
        b, single = decode.step(model, single, following)
        assert_same_logits(b, single, a, cache)
    assert cache.length.tolist() == (lengths + 3).tolist()


def test_layers_may_use_different_codecs(model, tokens):
    """Segments: the first layer in f32, the others in kvquant, equal to one by one steps."""
    part = policy_of("kvquant").segments[0]
    rest = jax.tree.map(lambda p: p[1:], (part.k_params, part.v_params))
    mixed = dataclasses.replace(
        policy_of("kvquant"),
        segments=(SegmentPolicy((0,), F32.keys, F32.values), SegmentPolicy((1, 2), part.k_codec, part.v_codec, *rest)),
    )

    def cache():
        return decode.init_cache(model, mixed, batch=B, capacity=100, block=T)

    whole, _ = decode.prefill(model, cache(), tokens[:, :60], attention="cached")
    logits, _ = decode.score(model, cache(), tokens[:, :60])
    np.testing.assert_allclose(logits[:, -1], whole, atol=5e-2)
    assert decode.explain(cache()).count("reference") == 2


@pytest.mark.parametrize("attention", ["exact", "cached"])
def test_alternating_layers_in_one_scan_equal_segments_one_by_one(model, tokens, monkeypatch, attention):
    """A mask by layer: as three segments of consecutive layers, or one for each codec pair that a scan switches to."""
    mask = dataclasses.replace(kivi(2, 16, 32), overrides=(Override((1,), keys=kivi(4, 16).keys),))
    in_order = bind("mask", mask, L)
    monkeypatch.setattr(sys.modules["kvjax.policy"], "MAX_RUNS", 0)
    by_pair = bind("mask", mask, L)
    assert [s.layer_ids for s in in_order.segments] == [(0,), (1,), (2,)]
    assert [s.layer_ids for s in by_pair.segments] == [(0, 2), (1,)]
    lengths = np.array([100, 3, T])
    results = []
    for policy in (in_order, by_pair):
        cache = decode.init_cache(model, policy, batch=B, capacity=140, block=T)
        logits, cache = decode.prefill(model, cache, tokens[:, :100], lengths, attention)
        for i in range(3):
            more, cache = decode.step(model, cache, tokens[:, i])
            logits = logits + more
        results.append((logits, cache))
    (a, in_order), (b, by_pair) = results
    np.testing.assert_allclose(a, b, atol=1e-4)
    for layer, (segment, at) in enumerate([(0, 0), (1, 0), (0, 1)]):
        left, right = in_order.segments[layer], by_pair.segments[segment]
        for x, y in zip(jax.tree.leaves((left.k, left.v)), jax.tree.leaves((right.k, right.v))):
            np.testing.assert_array_equal(x[0], y[at])
    assert "layers 0, 2:" in decode.explain(by_pair)


def test_bad_prompts_and_full_caches_are_errors_that_lose_nothing(model, tokens):
    cache = new_cache(model, "kvquant", capacity=60)
    for lengths in ([0, 5, 5], [5, 41, 5]):
        with pytest.raises(ValueError, match="must lie between 1 and 40"):
            decode.prefill(model, cache, tokens[:, :40], lengths)
    with pytest.raises(ValueError, match="empty prompt"):
        decode.prefill(model, cache, tokens[:, :0])
    with pytest.raises(ValueError, match="valid are 0 to 96"):
        decode.prefill(model, cache, np.full((B, 4), 97))
    with pytest.raises(ValueError, match="B=3 rows"):
        decode.prefill(model, cache, tokens[:2])
    with pytest.raises(ValueError, match='"exact" or "cached"'):
        decode.prefill(model, cache, tokens[:, :4], attention="flash")
    empty = cache
    _, cache = decode.prefill(model, cache, tokens[:, :60])
    for use in (lambda: decode.score(model, empty, tokens[:, :1]), lambda: decode.crop(empty, [0, 0, 0])):
        with pytest.raises(ValueError, match=r"`cache` was consumed .* use the one that the last call returned"):
            use()
    for token, active, message in (
        (tokens[:, :1], None, r"`token` of shape \(3, 1\) and type int64 must be 3 integers, one per row"),
        (np.zeros(B), None, "`token` of shape .* and type float64 must be 3 integers"),
        ([0, 97, 0], None, "`token` hold the id 97; valid are 0 to 96"),
        (tokens[:, 0], [1, 0, 1], "`active` of shape .* and type int64 must be 3 booleans"),
        (tokens[:, 0], [True], r"`active` of shape \(1,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            decode.step(model, cache, token, active)
    with pytest.raises(ValueError, match=r"`capacity=65`.*holds 60 and would need 66"):
        decode.prefill(model, cache, tokens[:, :6])
    logits, cache = decode.score(model, cache, tokens[:, :5])
    with pytest.raises(ValueError, match="larger `capacity`"):
        decode.step(model, cache, tokens[:, 0])
    assert cache.length.tolist() == [65] * B and decode.statistics(cache)["overrun"] == 0
    again = decode.crop(cache, np.full(B, 60))
    np.testing.assert_allclose(decode.score(model, again, tokens[:, :5])[0], logits, atol=1e-5)


def test_one_trace_for_any_number_of_steps_and_the_cache_is_donated(model, tokens):
    # A capacity of its own: no other test has compiled this step.
    _, cache = decode.prefill(model, new_cache(model, "kvquant", capacity=300), tokens[:, :10])
    before = cached.step._cache_size()
    for i in range(2 * T):  # seals twice
        leaf = cache.segments[0].k.codes
        _, cache = decode.step(model, cache, tokens[:, i])
        assert leaf.is_deleted()
    assert cached.step._cache_size() == before + 1


def compiled_step(model, capacity):
    cache = jax.eval_shape(lambda: new_cache(model, "kvquant", capacity=capacity))
    i32 = jax.ShapeDtypeStruct((B,), jnp.int32)
    return cache, cached.step.lower(model, cache, i32, i32).compile().memory_analysis()


def test_a_step_updates_the_cache_in_place_and_never_dequantizes_the_context(model):
    cache, memory = compiled_step(model, 16384)
    assert memory.alias_size_in_bytes == decode.nbytes(cache)
    _, longer = compiled_step(model, 65536)
    # The temporaries are those of one chunk: they do not follow the context.
    assert longer.temp_size_in_bytes < 1.05 * memory.temp_size_in_bytes


@pytest.mark.parametrize("attention", ["exact", "cached"])
def test_temporaries_of_a_long_prompt_are_bounded(model, attention):
    run = cached.prefill_exact if attention == "exact" else cached.prefill_cached
    sizes = {}
    for tokens in (1024, 4096):
        cache = jax.eval_shape(lambda: new_cache(model, "kvquant", batch=1, capacity=8192))
        args = jax.ShapeDtypeStruct((1, tokens), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
        sizes[tokens] = run.lower(model, cache, *args).compile().memory_analysis().temp_size_in_bytes
    # Exact: hidden states and one layer's K (rotated and not) and V, each perhaps twice in a loop; cached: the ids.
    per_token = 2 * 4 * (CONFIG.width + 3 * K * H) if attention == "exact" else 2 * 4
    assert sizes[4096] - sizes[1024] <= per_token * 3072 + 4096


@pytest.mark.parametrize("attention", ["exact", "cached"])
def test_temporaries_of_a_prompt_do_not_follow_the_context(model, attention):
    if attention == "exact" and jax.__version_info__ < (0, 11):
        pytest.skip("XLA in JAX 0.10.2 copies part of the cache in exact prefill; README, Limits")
    run = cached.prefill_exact if attention == "exact" else cached.prefill_cached
    sizes = []
    for capacity in (16384, 65536):
        cache = jax.eval_shape(lambda capacity=capacity: new_cache(model, "kvquant", batch=1, capacity=capacity))
        args = jax.ShapeDtypeStruct((1, 256), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
        sizes.append(run.lower(model, cache, *args).compile().memory_analysis().temp_size_in_bytes)
    assert sizes[1] < 1.05 * sizes[0]


def test_generate_ends_rows_at_eos_and_repeats_by_seed(model, tokens):
    def run(rows=slice(None), eos=(), seed=1):
        cache = new_cache(model, "kvquant", batch=len(tokens[rows]))
        out, cache = decode.generate(
            model, cache, tokens[rows, :9], max_new_tokens=20, temperature=1.0, top_k=50, top_p=0.9, seed=seed, eos=eos
        )
        return out, cache

    free, _ = run()
    assert free.shape == (B, 20) and (free == run()[0]).all() and (free != run(seed=2)[0]).any()
    np.testing.assert_array_equal(run(slice(0, 1))[0], free[:1])  # a row's draws do not depend on the others
    ended, cache = run(eos=(int(free[1, 4]),))
    stop = [int(np.argmax(row == free[1, 4])) if (row == free[1, 4]).any() else 19 for row in free]
    for b in range(B):
        np.testing.assert_array_equal(ended[b, : stop[b] + 1], free[b, : stop[b] + 1])
        assert (ended[b, stop[b] :] == ended[b, stop[b]]).all()
    assert int(cache.length[1]) == 9 + stop[1]  # the ended row took no more tokens
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        decode.generate(model, cache, tokens[:, :9], max_new_tokens=0)


def test_bf16_cache_generates_what_the_model_does_without_one():
    tiny = kvjax.load("tiny")
    prompt = np.asarray(tiny.tokenizer("The old man went down to the river, and")["input_ids"])[None]
    cache = decode.init_cache(tiny, kvjax.policy("bf16", tiny), batch=1, capacity=200)
    new, _ = decode.generate(tiny, cache, prompt, max_new_tokens=150, eos=())
    logits = forward(tiny, np.concatenate([prompt, new], axis=1))
    greedy = np.asarray(logits[0, prompt.shape[1] - 1 : -1].argmax(-1))
    np.testing.assert_array_equal(new[0], greedy)


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize(("suffix", "limit"), [("", 0.42), ("-dense", 0.02)])
def test_bits_at_llama_7b_shape_and_131072_tokens(bits, suffix, limit):
    """The paper's accounting (spec section 7) on the arrays that a cache of that shape would allocate."""
    shape = decode.CacheShape(32, 32, 32, 128, make_rope(128, 4096))
    policy = make_policy(preset(f"kvquant{bits}{suffix}"), 32, 32, 128)
    cache = jax.eval_shape(lambda: decode.init_cache(shape, policy, batch=1, capacity=131072, dtype=jnp.bfloat16))
    assert bits < decode.bits_per_element(cache) <= bits + limit
    formula = np.mean(
        [c.bits_per_element(128, 32, 128) for c in (policy.segments[0].k_codec, policy.segments[0].v_codec)]
    )
    assert decode.bits_per_element(cache) == formula
    assert decode.nbytes(cache) < 1.02 * (bits + limit) / 8 * 2 * 32 * 4096 * 131072


def test_explain_names_the_path_and_strict_refuses_the_reference(model):
    cache = new_cache(model, "kvquant")
    assert "xla_cpu in decode steps" in decode.explain(cache, strict=True)
    cache = decode.init_cache(model, make_policy(preset("fp8"), CONFIG.layers, K, H), batch=1, capacity=100)
    assert "reference (chunked jnp), no kernel for Float8Block on tpu" in decode.explain(cache, "tpu")
    with pytest.raises(NotImplementedError, match="strict"):
        decode.explain(cache, strict=True)


def test_an_unknown_preset_lists_the_near_ones():
    with pytest.raises(ValueError, match=r"`quant=kvqant3` is not a preset; the nearest are kvquant3"):
        preset("kvqant3")


def test_a_policy_that_needs_calibration_says_so(model):
    with pytest.raises(ValueError, match="not calibrated"):
        decode.init_cache(model, bind("kvquant3", preset("kvquant3"), L), batch=1, capacity=64)
