"""The whole calibration against a float64 transcription in plain numpy, on a random model of two layers."""

import dataclasses

import jax
import numpy as np
import pytest

from kvjax.calibrate.collect import collect
from kvjax.calibrate.fisher import activations_and_gradients
from kvjax.calibrate.fit import WEIGHTINGS, fit_tables
from kvjax.calibrate.histogram import bin_points, weighted_error
from kvjax.calibrate.kmeans import weighted_kmeans
from kvjax.model.config import ModelConfig
from kvjax.model.forward import forward_with_kv
from kvjax.model.rope import make_rope
from kvjax.model.weights import init_random

CONFIG = ModelConfig(
    layers=2, width=24, mlp_width=40, q_heads=4, kv_heads=2, head_dim=8, vocab=50, max_positions=64,
    attention_bias=True, initializer_range=0.3,
)  # fmt: skip
# 0.12 / 2 of 20 is no integer: no element lies exactly at the end of its range, where rounding would decide.
SINKS, FRACTION, SLOTS = 2, 0.12, 1


@pytest.fixture(scope="module")
def model():
    model = init_random(CONFIG, make_rope(CONFIG.head_dim, CONFIG.max_positions), seed=0)
    rng = np.random.default_rng(0)
    state = dict(model.state)
    # One loud channel per head and one that is constant but for its bias, as keys have.
    state["k"] = state["k"].at[:, :, 3].mul(8.0)
    for name in ("q_bias", "k_bias", "v_bias"):
        state[name] = np.float32(rng.normal(0, 0.5, state[name].shape))
    return dataclasses.replace(model, state=jax.tree.map(jax.numpy.asarray, state))


@pytest.fixture(scope="module")
def tokens():
    # No token twice: in layer 0 it would have the same keys, and rounding would decide which side of a range they are.
    return np.random.default_rng(1).permutation(CONFIG.vocab)[:27].reshape(3, 9).astype(np.int32)


def run(model, tokens, batch=1):
    """One combination of static arguments for nearly all tests: it compiles once."""
    return collect(model, tokens, outlier_fractions=(FRACTION, 0.0), sinks=SINKS, batch=batch, progress=False)


class Float64Model:
    """Llama in numpy float64, one sequence at a time; `delta` is added to one layer's keys or values."""

    def __init__(self, model):
        self.w = {name: np.asarray(array, np.float64) for name, array in model.state.items()}
        self.inv_freq = np.asarray(model.rope.inv_freq, np.float64)

    def norm(self, x, weight):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.norm_eps) * weight

    def rotate(self, x, sign=1):
        angle = sign * np.arange(len(x))[:, None] * self.inv_freq
        cos, sin = (f(angle).reshape(len(x), *[1] * (x.ndim - 2), -1) for f in (np.cos, np.sin))
        a, b = np.split(x, 2, -1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def run(self, tokens, where=None, delta=0.0):
        """`(loss, keys [L, S, K, H], values)`; `where` is (0 for keys or 1 for values, layer, s, k, h)."""
        w, x = self.w, self.w["embedding"][tokens]
        kept = [[], []]
        for layer in range(CONFIG.layers):
            h = self.norm(x, w["attention_norm"][layer])
            q = np.einsum("sd,kghd->skgh", h, w["q"][layer]) + w["q_bias"][layer]
            kv = [np.einsum("sd,khd->skh", h, w[n][layer]) + w[f"{n}_bias"][layer] for n in "kv"]
            if where is not None and where[1] == layer:
                kv[where[0]][where[2:]] += delta
            for tensor, list_ in zip(kv, kept):
                list_.append(tensor)
            scores = np.einsum("skgh,tkh->kgst", self.rotate(q), self.rotate(kv[0])) / np.sqrt(CONFIG.head_dim)
            scores = np.where(np.tri(len(tokens), dtype=bool), scores, -np.inf)
            p = np.exp(scores - scores.max(-1, keepdims=True))
            out = np.einsum("kgst,tkh->skgh", p / p.sum(-1, keepdims=True), kv[1])
            x = x + np.einsum("skgh,dkgh->sd", out, w["o"][layer]) + w["o_bias"][layer]
            h = self.norm(x, w["mlp_norm"][layer])
            gate = h @ w["gate"][layer].T
            x = x + (gate / (1 + np.exp(-gate)) * (h @ w["up"][layer].T)) @ w["down"][layer].T
        logits = self.norm(x, w["norm"]) @ w["head"].T
        log_sum = np.log(np.exp(logits[:-1]).sum(-1))
        loss = (log_sum - np.take_along_axis(logits[:-1], tokens[1:, None], -1)[:, 0]).sum()
        return loss, np.stack(kept[0]), np.stack(kept[1])

    def gradients(self, tokens, step=1e-5):
        """Central differences of the loss by every key and value: `[2, L, S, K, H]`."""
        grad = np.zeros((2, CONFIG.layers, len(tokens), CONFIG.kv_heads, CONFIG.head_dim))
        for where in np.ndindex(*grad.shape):
            grad[where] = (self.run(tokens, where, step)[0] - self.run(tokens, where, -step)[0]) / (2 * step)
        return grad


@pytest.fixture(scope="module")
def reference(model, tokens):
    """Keys, values `[L, n, S, K, H]` and their gradients, all float64."""
    exact = Float64Model(model)
    runs = [exact.run(t) for t in tokens]
    grads = np.stack([exact.gradients(t) for t in tokens], 2)
    return np.stack([r[1] for r in runs], 1), np.stack([r[2] for r in runs], 1), grads[0], grads[1]


def transcribe_keys(k, grad, fraction, slots):
    """Section 3.4 and Eq. 7 of arXiv 2401.18079, element by element, for one layer: values, weights, scale, zero."""
    k, grad = k[:, SINKS:].reshape(-1, *k.shape[2:]), grad[:, SINKS:].reshape(-1, *k.shape[2:])
    low, high = np.quantile(k, fraction / 2, axis=0), np.quantile(k, 1 - fraction / 2, axis=0)
    scale, zero = (high - low) / 2, (high + low) / 2
    elements, weights, in_slots, dropped = [], [], 0, 0
    for t, head in np.ndindex(*k.shape[:2]):
        normalized = (k[t, head] - zero[head]) / scale[head]
        outside = [h for h in np.argsort(-np.abs(normalized)) if abs(normalized[h]) > 1 + 1e-6]
        in_slots += len(outside[:slots])
        dropped += len(outside[slots:])
        for h in set(range(k.shape[2])) - set(outside[:slots]):
            elements.append(normalized[h])
            weights.append([1, grad[t, head, h] ** 2, (grad[t, head, h] * scale[head, h]) ** 2])
    return np.array(elements), np.array(weights).T, scale, zero, in_slots, dropped


def transcribe_values(v, grad, slots):
    """The same for values: the farthest of each head leave, the range is what is left of the token."""
    v, grad = v[:, SINKS:].reshape(-1, *v.shape[2:]), grad[:, SINKS:].reshape(-1, *v.shape[2:])
    elements, weights, in_slots = [], [], 0
    for token, g in zip(v, grad):
        outlier = np.zeros(token.shape, bool)
        for head, row in enumerate(np.abs(token - token.mean())):
            outlier[head, np.argsort(-row)[:slots]] = True
        in_slots += outlier.sum()
        low, high = token[~outlier].min(), token[~outlier].max()
        scale, zero = np.float64(np.float16((high - low) / 2)), np.float64(np.float16((high + low) / 2))
        elements.append(((token - zero) / scale)[~outlier])
        weights.append([[1] * len(elements[-1]), g[~outlier] ** 2, (g[~outlier] * scale) ** 2])
    return np.concatenate(elements), np.concatenate(weights, 1), in_slots


def test_gradients_are_those_of_the_loss(model, tokens, reference):
    acts = jax.jit(activations_and_gradients)(model, tokens)
    for name, want in zip(("k", "v", "k_grad", "v_grad"), reference):
        got = getattr(acts, name)
        np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max(), err_msg=name)


def test_post_rope_keys_and_gradients(model, tokens):
    stretched = dataclasses.replace(model, rope=dataclasses.replace(model.rope, attention_factor=1.25))
    before = jax.jit(activations_and_gradients)(stretched, tokens)
    after = jax.jit(activations_and_gradients, static_argnums=2)(stretched, tokens, False)

    def turned(x):  # each [S, K, H]
        return np.stack([[1.25 * Float64Model(model).rotate(sequence) for sequence in layer] for layer in x])

    k = turned(np.asarray(before.k, np.float64))
    np.testing.assert_allclose(after.k, k, atol=1e-5 * np.abs(k).max())
    # The same change of the keys changes the loss as much, before and after the rotation.
    change = np.random.default_rng(3).normal(size=k.shape)
    directional = [
        np.sum(np.asarray(g, np.float64) * c) for g, c in ((before.k_grad, change), (after.k_grad, turned(change)))
    ]
    np.testing.assert_allclose(*directional, rtol=1e-4)


def test_statistics_equal_the_transcription(model, tokens, reference):
    k, v, k_grad, v_grad = reference
    stats = run(model, tokens)
    for fraction, slots in ((FRACTION, SLOTS), (0.0, 0)):
        got = stats[fraction]
        assert (got.slots, got.sinks, got.tokens, got.pre_rope) == (slots, SINKS, tokens.size, True)
        for layer in range(CONFIG.layers):
            x, weights, scale, zero, *counts = transcribe_keys(k[layer], k_grad[layer], fraction, slots)
            np.testing.assert_allclose(got.scale[layer, :, 0], scale, rtol=1e-4)
            np.testing.assert_allclose(got.zero[layer, :, 0], zero, atol=1e-4 * scale.max())
            assert [got.keys.in_slots[layer], got.keys.dropped[layer]] == counts
            compare(got.keys, layer, x, weights)
            x, weights, in_slots = transcribe_values(v[layer], v_grad[layer], slots)
            assert got.values.in_slots[layer] == in_slots and got.values.dropped[layer] == 0
            compare(got.values, layer, x, weights)


def compare(stats, layer, x, weights):
    """Total weight and first moment of every weighting, and tables as good as those of the elements themselves."""
    moments = stats.moments[layer]
    bins = moments.shape[-1]
    centres = (np.arange(bins) + 0.5) * 2 / bins - 1
    np.testing.assert_allclose(moments[:, 0].sum(-1), weights.sum(-1), rtol=1e-3)
    first = (moments[:, 0] * centres + moments[:, 1] * 2 / bins).sum(-1)
    np.testing.assert_allclose(first, (weights * x).sum(-1), atol=1e-3 * weights.sum(-1).max())
    assert moments[WEIGHTINGS.index("none"), 0].sum() == len(x)
    _, optimum = weighted_kmeans(x, weights[2], 4)
    points, mass, _ = bin_points(moments[2])
    levels, _ = weighted_kmeans(points, mass, 4)
    error = np.sum(weights[2] * ((x[:, None] - levels) ** 2).min(-1))
    assert optimum * (1 - 1e-9) <= error <= optimum * 1.01
    np.testing.assert_allclose(weighted_error(moments[2], levels), error, rtol=1e-2)


def test_batches_do_not_change_the_result(model, tokens):
    one, many = run(model, tokens)[FRACTION], run(model, tokens, batch=2)[FRACTION]
    np.testing.assert_allclose(many.scale, one.scale, rtol=1e-4)
    for a, b in ((one.keys, many.keys), (one.values, many.values)):
        np.testing.assert_array_equal(a.in_slots, b.in_slots)
        np.testing.assert_allclose(a.moments[..., 0, :].sum(-1), b.moments[..., 0, :].sum(-1), rtol=1e-4)
    a, b = (fit_tables(stats, 3) for stats in (one, many))
    for tensor in a:
        np.testing.assert_allclose(a[tensor]["levels"], b[tensor]["levels"], atol=2e-3)


def test_sinks_reach_neither_ranges_nor_tables(model, tokens):
    # Tokens that appear only as sinks get an embedding of their own.
    tokens = np.where(np.arange(tokens.shape[1]) < SINKS, tokens % 2, np.maximum(tokens, 2))
    embedding = np.random.default_rng(5).normal(size=CONFIG.width).astype(np.float32)
    loud = model.with_state(model.state | {"embedding": model.state["embedding"].at[:2].set(embedding)})
    keys = np.asarray(forward_with_kv(loud, tokens)[1])
    stats = run(loud, tokens)[0.0]
    high = (stats.zero + stats.scale)[:, :, 0]
    np.testing.assert_allclose(high, keys[:, :, SINKS:].max((1, 2)), rtol=1e-5, atol=1e-5)
    assert (keys[:, :, :SINKS].max((1, 2)) > high).any()
    counted = len(tokens) * (tokens.shape[1] - SINKS) * CONFIG.kv_heads * CONFIG.head_dim
    np.testing.assert_array_equal(stats.keys.moments[:, 0, 0].sum(-1), counted)


def test_constant_channels_have_a_usable_range(model, tokens):
    silent = model.with_state(model.state | {"k": model.state["k"].at[:, :, 5].set(0.0)})
    stats = run(silent, tokens)[0.0]
    assert (stats.scale > 0).all() and np.isfinite(stats.keys.moments).all()
    np.testing.assert_allclose(stats.zero[:, :, 0, 5], silent.state["k_bias"][:, :, 5], rtol=1e-6)


@pytest.mark.parametrize(
    "bad, message",
    [
        (np.zeros((2, 5), np.float32), r"`tokens` float32\[2, 5\] must be integers"),
        (np.zeros(5, np.int32), "must be integers"),
        (np.full((2, 5), 50), r"must be in 0\.\.49"),
        (np.zeros((1, 65), np.int32), "at most the model's context of 64"),
        (np.zeros((1, 1), np.int32), "have length 1"),
    ],
)
def test_bad_tokens_are_refused(model, bad, message):
    with pytest.raises(ValueError, match=message):
        collect(model, bad, progress=False)


def test_a_batch_of_nothing_is_refused(model, tokens):
    with pytest.raises(ValueError, match="`batch=0`"):
        collect(model, tokens, batch=0, progress=False)


def test_a_broken_model_is_noticed(model, tokens):
    broken = model.with_state(model.state | {"head": model.state["head"] * np.float32(np.nan)})
    with pytest.raises(ValueError, match="gradients are not finite"):
        run(broken, tokens)
    broken = model.with_state(model.state | {"k": model.state["k"] * np.float32(np.nan)})
    with pytest.raises(ValueError, match="keys are not finite"):
        run(broken, tokens)
