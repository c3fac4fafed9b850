"""The forward pass around the logits: attention by hand, K/V maps, probes, long texts, low precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model.variants import VARIANTS, golden

import kvjax.model.forward as forward_module
from kvjax.model.config import ModelConfig
from kvjax.model.forward import causal_attention, forward, forward_with_kv
from kvjax.model.llama import product_of_one
from kvjax.model.rope import cos_sin, make_rope, rotate
from kvjax.model.weights import init_random

CONFIG = ModelConfig(layers=2, width=32, mlp_width=48, q_heads=4, kv_heads=2, head_dim=16, vocab=64)


@pytest.fixture(scope="module")
def model():
    return init_random(CONFIG, make_rope(16, 64), seed=0)


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 12)))


def test_attention_by_hand():
    """Two tokens, H=1: the second query scores ln 3 on key 0 and 0 on key 1, so it weighs the values 3 : 1."""
    q = jnp.asarray([[5.0], [np.log(3.0)]]).reshape(1, 2, 1, 1, 1).astype(jnp.float32)
    k = jnp.asarray([1.0, 0.0]).reshape(1, 2, 1, 1)
    v = jnp.asarray([8.0, 4.0]).reshape(1, 2, 1, 1)
    positions = jnp.asarray([[0, 1]])
    out = causal_attention(q, k, v, positions, positions)
    np.testing.assert_allclose(out.reshape(2), [8.0, 7.0], rtol=1e-6)
    out = causal_attention(q, k, v, positions, positions, sliding_window=1)
    np.testing.assert_allclose(out.reshape(2), [8.0, 4.0], rtol=1e-6)
    hidden = jnp.asarray([[0, 1000]])  # a position beyond every query's
    out = causal_attention(q, k, v, positions, hidden)
    np.testing.assert_allclose(out.reshape(2), [8.0, 8.0], rtol=1e-6)


def test_kv_of_the_forward_pass(model, tokens):
    logits, k, v = forward_with_kv(model, tokens)
    assert k.shape == v.shape == (2, 2, 12, 2, 16)
    np.testing.assert_allclose(logits, forward(model, tokens), atol=1e-6)

    @jax.jit
    def first_layer(model, tokens):
        llama = model.module()
        return llama.qkv(0, llama.embed(tokens))

    _, k0, v0 = first_layer(model, tokens)
    np.testing.assert_allclose(k[0], k0, atol=1e-6)
    np.testing.assert_allclose(v[0], v0, atol=1e-6)


def test_kv_map_replaces_what_attention_sees(model, tokens):
    plain = forward(model, tokens)
    cos, sin = cos_sin(model.rope, jnp.arange(12)[None])

    def rotated(layer, k, v):
        return rotate(k, cos[:, :, None], sin[:, :, None]), v, True

    def without_last_layer(layer, k, v):
        return k, v * (layer == 0).astype(v.dtype), False

    def run(kv_map):
        return jax.jit(lambda model, tokens: forward(model, tokens, kv_map))(model, tokens)

    np.testing.assert_allclose(run(rotated), plain, atol=1e-6)
    changed = run(without_last_layer)
    blind = model.with_state({**model.state, "v": model.state["v"].at[1].set(0)})
    np.testing.assert_allclose(changed, forward(blind, tokens), atol=1e-6)
    assert np.abs(changed - plain).max() > 1e-6


def test_gradients_of_weights_and_of_k_and_v(model, tokens):
    """Along a random direction the probe's gradient predicts the central difference; every weight has a gradient."""
    shape = (2, 2, 12, 2, 16)
    direction = tuple(jnp.asarray(np.random.default_rng(i).standard_normal(shape), jnp.float32) for i in (1, 2))

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def loss(probe, state):
        log_probabilities = jax.nn.log_softmax(forward(model.with_state(state), tokens, probe=probe)[:, :-1])
        return -jnp.take_along_axis(log_probabilities, tokens[:, 1:, None], axis=-1).mean()

    _, (gradient, of_weights) = loss(jax.tree.map(np.zeros_like, direction), model.state)
    for name, leaf in of_weights.items():
        assert np.abs(leaf).max() > 0, name
    assert gradient[0].shape == gradient[1].shape == shape
    step = 0.003  # a few percent of k and v
    ahead, behind = (loss(tuple(s * step * d for d in direction), model.state)[0] for s in (1, -1))
    predicted = sum(float(jnp.vdot(g, d)) for g, d in zip(gradient, direction, strict=True))
    assert (ahead - behind) / (2 * step) == pytest.approx(predicted, rel=0.02)
    for part in gradient:  # no token after the last is predicted from it
        assert np.all(np.asarray(part)[:, :, -1] == 0) and np.abs(part[:, :, 0]).min() > 0


def test_long_texts_go_through_in_pieces(monkeypatch):
    variant = next(v for v in VARIANTS if v.name == "mistral-window8")
    run, model = golden(variant), variant.loaded()
    monkeypatch.setattr(forward_module, "QUERIES_AT_ONCE", 16)  # 44 tokens: two whole pieces and a part
    logits = jax.jit(lambda m, t: forward(m, t, lambda layer, k, v: (k, v, False)))(model, run["tokens"][None])
    np.testing.assert_allclose(logits[0], run["logits"], atol=1e-4)


def test_bfloat16_stays_close():
    variant = VARIANTS[0]
    run = golden(variant)
    logits, k, v = forward_with_kv(variant.loaded("bfloat16"), jnp.asarray(run["tokens"])[None])
    assert logits.dtype == jnp.float32 and k.dtype == v.dtype == jnp.bfloat16
    assert np.abs(logits[0] - run["logits"]).mean() < 0.05


@pytest.mark.parametrize(
    ("equation", "size"), [("...d,kghd->...kgh", (3, 2, 2, 5, 8)), ("...kgh,dkgh->...d", (3, 8, 2, 2, 5))]
)
def test_the_product_of_one_token_is_the_matrix_product(equation, size):
    rng = np.random.default_rng(0)
    stack = jnp.asarray(rng.standard_normal(size), jnp.float32)
    axes = len(equation.split(",")[0].removeprefix("..."))
    x = jnp.asarray(rng.standard_normal((1, 1, *size[-axes:])), jnp.float32)
    expected = jnp.einsum(equation, x, stack[1])
    np.testing.assert_allclose(product_of_one(x, stack, jnp.int32(1), axes), expected, rtol=1e-5, atol=1e-5)
