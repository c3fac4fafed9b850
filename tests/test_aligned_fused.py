"""Caches of planes behind kernels: they read at least what the rules ask for, and count what they read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import make_policy, random_kv
from test_aligned import Float16Side, by_budget, rotated

from kvjax import attention, decode, fused, sharding
from kvjax.codecs import AlignRule, PlanesCodec
from kvjax.codecs.planes import PlanesBlock
from kvjax.model.config import ModelConfig
from kvjax.model.rope import make_rope
from kvjax.model.weights import init_random
from kvjax.policy import Preset, bind, preset
from pallas_kernels.decode_attention import api, tpu_planes

attend_in_part = api.attend_in_part
B, K, G, H, T = 3, 2, 2, 32, 32
SINKS = 1
LENGTHS = np.array([SINKS + T, SINKS + 5 * T + 5, 20])
WIDTHS = np.array([0, 8, 12, 16])


def one_step(rules, monkeypatch, run, sliding_window=None, mesh=None):
    """A step after rows of `LENGTHS` by the plain definition, in runs of blocks; on a mesh levels are not told.

    Returns:
      The output `[B, K*G, H]`, the counters `[B, 6]`, the levels of keys and values `[B, U, K]`, blocks in the cache,
      and the keys, values and queries of all tokens, after RoPE and as scored.
    """
    told = []

    def attend_in_part(q, k, v, *, layer, first, last, implementation, chip):
        partial, levels = api.reference.attend_in_part(q, k, v, layer, first, last)
        told.extend((k.levels, levels) if mesh is None else (jnp.zeros(()),) * 2)
        return partial, levels

    monkeypatch.setitem(fused.FAST, (PlanesBlock, "cpu"), "reference")
    monkeypatch.setattr(api, "attend_in_part", attend_in_part)
    monkeypatch.setattr(api, "run", lambda k, name: run)
    rng, n = np.random.default_rng(0), LENGTHS.max() + 1
    # Blocks of unequal sizes, and channels too: levels differ.
    scale = 2.0 ** np.repeat(rng.integers(-4, 3, n // T + 1), T)[:n, None, None] * 2.0 ** rng.integers(-3, 1, H)
    k, v = (random_kv(rng, B, n, K, H) * scale.astype("f4") for _ in range(2))
    q = rng.normal(size=(B, n, K * G, H)).astype("f4")
    shape = decode.CacheShape(1, K * G, K, H, make_rope(H, 2048), sliding_window)
    policy = make_policy(Preset(*(c for c in rules), sinks=SINKS), 1, K, H)
    cache = decode.init_cache(shape, policy, batch=B, capacity=n, block=T, dtype=jnp.float32, target="cpu", mesh=mesh)
    cache = decode.advance(decode.append(cache, 0, k, v, LENGTHS), LENGTHS)
    rows = np.arange(B)

    @jax.jit
    def step(cache):
        one = [jnp.asarray(x[rows, LENGTHS][:, None]) for x in (q.reshape(B, n, K, G, H), k, v)]
        qs, new = attention.layer_inputs(cache, cache.segments[0], *one, jnp.ones(B, jnp.int32))
        return attention.attend_layer(cache, cache.segments[0], jnp.int32(0), qs, new, "cached"), tuple(told)

    (out, counts), levels = step(cache)
    every = [[rotated(k[b], n) for b in rows], v, [rotated(q[b], n) / np.float32(np.sqrt(H)) for b in rows]]
    blocks = cache.segments[0].k.top.shape[2]
    return np.asarray(out)[:, 0].reshape(B, K * G, H), np.asarray(counts), *map(np.asarray, levels), blocks, every


def needed_levels(rule, weights, total, count, sides, unit=1.0):
    """The highest level that one of `sides` asks for; `weights`: of each query and side."""
    if rule.mode == "criterion":
        return 3  # the channel with the largest product; values are never read twice
    levels = (
        by_budget(rule, rule.budget * unit, np.broadcast_to(w, side.top.shape), t, count, side.errors(side.top))
        for per_query, t in zip(weights, total)
        for w, side in zip(per_query, sides)
    )
    return max(level.max() for level in levels)


RULES = {
    "rms": (AlignRule("rms", 1.0), AlignRule("rms", 2.0**-8, skip=True)),
    "criterion": (AlignRule(), AlignRule(scope="running")),
    "worst": (AlignRule("worst", 2.0, "running"), AlignRule("worst", 2.0**-6, skip=True)),
}


@pytest.mark.parametrize(
    "name, run, window", [("rms", 2, None), ("worst", 4, None), ("rms", 1, 70), ("criterion", 2, None)]
)
def test_what_is_read_is_what_the_rules_ask_for_and_is_counted(name, run, window, monkeypatch):
    rules = RULES[name]
    codecs = PlanesCodec("tokens", rules[0]), PlanesCodec("channels", rules[1])
    out, counts, k_levels, v_levels, blocks, (k, v, q) = one_step(codecs, monkeypatch, run, window)
    assert len(np.unique([k_levels[1], v_levels[1]])) > (name != "criterion")
    same = []
    for b, n in enumerate(LENGTHS):
        first = 0 if window is None else max(n - window + 1 - SINKS, 0)
        sealed = range(first // T, (n - SINKS) // T)
        exact = [
            t for t in [*range(SINKS), *range(SINKS + (n - SINKS) // T * T, n + 1)] if window is None or n - t < window
        ]
        wanted = np.zeros((6,))
        for h in range(K):
            sides = [
                {j: Float16Side(codec, x[b][SINKS + j * T : SINKS + (j + 1) * T, h]) for j in sealed}
                for codec, x in zip(codecs, (k, v))
            ]
            faces = []
            for j in sealed:
                weights = abs(q[b][n, h * G : (h + 1) * G])
                near = [sides[0][i] for i in sealed if rules[0].scope == "running" or i // run == j // run]
                need = needed_levels(rules[0], [[w] * len(near) for w in weights], weights.sum(-1), H, near)
                assert k_levels[b, j // run, h] == need
                faces.append(sides[0][j].faces()[need])
            tokens = [t for j in sealed for t in range(j * T, (j + 1) * T) if t >= first]
            at = [t - sealed.start * T for t in tokens]
            keys = np.concatenate([k[b][exact, h], *([np.concatenate(faces)[at]] if faces else [])])
            p = [np.exp(keys @ q[b][n, g]) / np.exp(keys @ q[b][n, g]).sum() for g in range(h * G, (h + 1) * G)]
            unit = max((Float16Side.errors(s.top)[0].max() for s in sides[1].values()), default=0.0)
            seen = np.zeros((G, (sealed.stop if sealed else 0) * T))
            seen[:, tokens] = [x[len(exact) :] for x in p]
            values = [v[b][exact, h]]
            for j in sealed:
                near = [i for i in sealed if i // run == j // run]
                weights = [[x[i * T : (i + 1) * T] for i in near] for x in seen]
                need = needed_levels(rules[1], weights, [1.0] * G, n + 1, [sides[1][i] for i in near], unit)
                level = v_levels[b, j // run, h]
                assert level >= need
                same.append(level == need)
                values.append(sides[1][j].faces()[level])
            values = np.concatenate([values[0], *([np.concatenate(values[1:])[at]] if faces else [])])
            for g in range(G):
                np.testing.assert_allclose(out[b, h * G + g], p[g] @ values, rtol=1e-3, atol=2e-4)
            for i, levels in ((0, k_levels), (3, v_levels)):
                width = WIDTHS[levels[b, :, h]] * H
                per_run = np.bincount(np.asarray(tokens, int) // (run * T), minlength=len(width))
                wanted[i : i + 3] += len(tokens) * H, (per_run * width).sum(), (width[per_run > 0] * run * T).sum()
        meta = 0 if name == "criterion" else 8 * K * np.array([H, T])
        wanted[[1, 4]] += -(-len(tokens) // T) * meta
        wanted[[2, 5]] += blocks * meta
        np.testing.assert_allclose(counts[b], wanted, rtol=1e-5)
    assert np.mean(same) > 0.5  # the largest error and the largest probability of a run may be different tokens'


def test_devices_read_their_heads(monkeypatch):
    codecs = PlanesCodec("tokens", RULES["rms"][0]), PlanesCodec("channels", RULES["rms"][1])
    one, spread = (one_step(codecs, monkeypatch, 2, mesh=mesh)[:2] for mesh in (None, sharding.make_mesh("tensor=2")))
    for a, b in zip(one, spread):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def interpreted(*arguments, implementation, **more):
    if implementation == "mosaic_gpu":
        from jax.experimental.pallas import mosaic_gpu as plgpu

        return attend_in_part(*arguments, implementation=implementation, interpret=plgpu.InterpretGPUParams(), **more)
    return attend_in_part(*arguments, implementation=implementation, interpret=True, **more)


def test_steps_by_the_kernels_are_the_references_within_the_budget(monkeypatch):
    """Interpreted but on CPU; rows of 1 token, of a block and of three; three steps each, over the seal of a block."""
    monkeypatch.setattr(api, "attend_in_part", interpreted)
    monkeypatch.setattr(fused, "NATIVE_TOKENS", 0)
    monkeypatch.setattr(tpu_planes, "UNIT_TOKENS", {0: 128})
    config = ModelConfig(
        layers=1, width=64, mlp_width=96, q_heads=4, kv_heads=2, head_dim=128, vocab=97, initializer_range=0.2
    )
    model = init_random(config, make_rope(128, 1024), seed=0, dtype=jnp.float32)
    tokens = np.random.default_rng(0).integers(0, 97, (3, 384))
    filled = decode.init_cache(
        model, bind("alignedkv-budget", preset("alignedkv-budget"), 1), batch=3, capacity=500, target="reference"
    )
    _, filled = decode.prefill(model, filled, tokens, np.array([1, 127, 384]))
    kernels = {"tpu:v5e": "mosaic_tpu", "gpu:sm_90": "mosaic_gpu", "cpu": "numba_cpu"}
    if jax.__version_info__ < (0, 11):
        del kernels["gpu:sm_90"]
    logits, reads = {}, {}
    for target in (*kernels, "reference"):
        cache = dataclasses.replace(jax.tree.map(jnp.copy, filled), target=target)
        steps = []
        for i in range(3):
            out, cache = decode.step(model, cache, tokens[:, i])
            steps.append(np.asarray(out))
        logits[target], reads[target] = np.stack(steps), decode.bits_read(cache)
        path = f"{kernels.get(target)} in decode steps (levels by runs of 128 tokens"
        assert (path in decode.explain(cache)) == (target in kernels)
    for target in kernels:
        np.testing.assert_allclose(logits[target], logits["reference"], atol=0.05 * logits["reference"].std())
        assert reads["reference"]["all"] <= reads[target]["all"] < 16
